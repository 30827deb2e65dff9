"""The time of a training step between two hosts, by method, beside DistributedDataParallel.

    python benchmarks/step_time.py [--rates 1gbit 100mbit] [--nets "AlexNet fc" ResNet-20]
        [--repeats 3] [--quick]

Two processes, one thread each, in two network namespaces (trainer/testing/hosts.py; Linux, root)
with a link of each rate. They train the fully connected layers of AlexNet (9216-4096-4096-1000) or
ResNet-20 on random samples, 32 per process and step, with SGD and momentum in fp32:

    DDP             torch's DistributedDataParallel, gloo
    dense           `Train`
    pruned          `Retrain` after `Prune(0.9)`: only weights that are not zero are trained
    shared          `Share(bits=4)` after `Prune(0.9)`: only the shared values are trained
    wire=...        as dense, with 16 or 8 bits for each number that is sent
    powersgd        as dense, with gradients of rank 4
    local_steps     as dense, with an average of the weights every 10 steps (DiLoCo)

All methods take turns. A turn takes some steps that are not counted, and then as many that are. The
table shows their mean on rank 0: the median over the turns.
"""

import argparse
import copy
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import AllReduceConfig, FitConfig
from trainer.data.split import TensorSplit
from trainer.engine.loop import fit
from trainer.engine.optim import parse_optimizer
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.models import ResNetCifar
from trainer.phases import Prune, Retrain, Share
from trainer.testing.hosts import Hosts

BATCH = 32  # samples of each process
LOCAL_STEPS = 10
PORT, DDP_PORT = 29556, 29557
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
ONCE = FitConfig(epochs=1)


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    linear = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
    return nn.Sequential(*[part for layer in linear for part in (layer, nn.ReLU())][:-1])


def pruned(model: nn.Module, world: World) -> None:
    Prune(0.9, fit=FitConfig()).enter(model, world)
    Retrain(fit=ONCE).enter(model, world)


def shared(model: nn.Module, world: World) -> None:
    Prune(0.9, fit=FitConfig()).enter(model, world)
    Share(bits=4, fit=ONCE).enter(model, world)


def unchanged(model: nn.Module, world: World) -> None:
    pass


@dataclass
class Method:
    """A way of training with this framework."""

    allreduce: dict[str, Any] = field(default_factory=dict)
    enter: Callable[[nn.Module, World], None] = unchanged


METHODS = {
    "dense": Method(),
    "pruned": Method(enter=pruned),
    "shared": Method(enter=shared),
    "wire=bf16": Method({"wire": "bf16"}),
    "wire=int8": Method({"wire": "int8"}),
    "powersgd": Method({"compression": "powersgd", "rank": 4, "whole_steps": 0}),
    "local_steps": Method({"local_steps": LOCAL_STEPS}),
}
Steps = Iterator[int]
"""Takes a step for each item, which is the number of bytes that this process has sent for it."""


@dataclass
class Net:
    """A network, and the samples it is trained on."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input
    classes: int

    def samples(self, count: int) -> TensorSplit:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(count, *self.shape, generator=generator)
        targets = torch.randint(0, self.classes, (count,), generator=generator)
        return TensorSplit(inputs, targets)


NETS = {
    "AlexNet fc": Net(lambda: layers(9216, 4096, 4096, 1000), (9216,), 1000),
    "ResNet-20": Net(ResNetCifar, (3, 32, 32), 10),
}
SMALL = {"AlexNet fc": Net(lambda: layers(288, 128, 128, 31), (288,), 31)}


class OfTheFramework:
    """Trains with one of the methods."""

    def __init__(self, method: Method, net: Net, model: nn.Module, world: World) -> None:
        self._model, self._world = model, world
        self._samples = net.samples(BATCH * world.size * LOCAL_STEPS)
        self._allreduce = AllReduceConfig(**method.allreduce)
        method.enter(model, world)

    def steps(self, number: int) -> Steps:
        """Take so many steps."""
        runtime = Runtime(
            world=self._world,
            precision="fp32",
            allreduce=self._allreduce,
            optimizer=parse_optimizer({"_target_": "torch.optim.SGD", **SGD}),
            batch_size=BATCH * self._world.size,
            seed=0,
        )
        cfg = FitConfig(epochs=number, max_steps=number)
        local = self._allreduce.local_steps
        for step in fit(self._model, self._samples, cfg, runtime, local_steps=local):
            yield step.sent_bytes


class Ddp:
    """Trains with DistributedDataParallel."""

    def __init__(self, net: Net, model: nn.Module, world: World) -> None:
        samples = net.samples(BATCH)
        self._batch = samples.inputs, samples.targets
        self._model = DistributedDataParallel(model)
        self._optimizer = torch.optim.SGD(model.parameters(), **SGD)
        weights = sum(p.nbytes for p in model.parameters())
        self._sent = 2 * weights * (world.size - 1) // world.size  # of a ring

    def steps(self, number: int) -> Steps:
        """Take so many steps."""
        inputs, targets = self._batch
        for _ in range(number):
            self._optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self._model(inputs), targets)
            loss.backward()
            self._optimizer.step()
            loss.item()
            yield self._sent


def measure(steps: Steps, skipped: int) -> tuple[float, float]:
    """Seconds and bytes of a step: means over the steps that are counted."""
    for _ in range(skipped):
        next(steps)
    begun = time.perf_counter()
    sent = list(steps)
    return (time.perf_counter() - begun) / len(sent), statistics.mean(sent)


def compare(world: World, name: str, net: Net, rate: str, repeats: int, counted: int) -> None:
    """What each process executes for a network. Rank 0 prints rows of the table."""
    torch.manual_seed(0)
    model = net.make()
    ways: dict[str, Ddp | OfTheFramework] = {"DDP": Ddp(net, copy.deepcopy(model), world)}
    for method in METHODS:
        ways[method] = OfTheFramework(METHODS[method], net, copy.deepcopy(model), world)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, training in ways.items():
            number = LOCAL_STEPS if way == "local_steps" else counted
            skipped = LOCAL_STEPS if way == "local_steps" else 1
            world.barrier()
            found[way].append(measure(training.steps(skipped + number), skipped))
    if world.rank == 0:
        base = statistics.median(seconds for seconds, _ in found["DDP"])
        for way, turns in found.items():
            median = statistics.median(seconds for seconds, _ in turns)
            print(
                f"| {rate} | {name} | {way} | {turns[-1][1] / 1e6:.2f} | {1000 * median:.0f} | "
                f"{median / base:.2f} |",
                flush=True,
            )


def work(rank: int, size: int, address: str, args: argparse.Namespace) -> None:
    """What each process executes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{DDP_PORT}", rank=rank, world_size=size
    )
    device = torch.device("cpu")
    world = World.connect(rank, size, address, PORT, device, 120.0) if size > 1 else None
    world = world or World.single(device)
    nets = SMALL if args.quick else {name: NETS[name] for name in args.nets}
    for name, net in nets.items():
        compare(world, name, net, args.rates[0], args.repeats, args.counted)
    world.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as tc has them")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each method")
    parser.add_argument("--counted", type=int, default=2, help="counted steps of a turn")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, 2, Hosts.address(1), args)
        return
    print(
        f"# Steps between two hosts, {datetime.date.today()}\n\n"
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch "
        f"{torch.__version__}; command: python {' '.join(sys.argv)}\n\n"
        "| link | net | method | MB sent per step | ms per step | of DDP's |\n"
        "| --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    if args.quick:
        args.repeats = 1
        work(0, 1, "127.0.0.1", args)
        return
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:]]
    for rate in args.rates:
        with Hosts(2, rate) as hosts:
            environ = {**hosts.environ(), "GLOO_SOCKET_IFNAME": "eth0"}
            processes = [
                hosts.popen(host, *command, "--rates", rate, "--rank", host - 1, env=environ)
                for host in hosts
            ]
            if any([process.wait() for process in processes]):
                raise SystemExit("a process failed")


if __name__ == "__main__":
    main()
