"""One training step with DDP and with the own reducer.

    python benchmarks/reducer.py [MIB ...] [--quick]

Two processes on this machine, one thread each; forward, backward, averaging and a fused SGD step.
All contestants train in the same two processes and take turns; the table shows medians of the
slower rank's times. MIB: sizes of `allreduce.bucket_mb` to compare (default: the shipped one).
"""

import argparse
import datetime
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed import TCPStore
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trainer.config import AllReduceConfig
from trainer.engine.reducer import Reducer
from trainer.engine.world import World
from trainer.models.lenet5 import LeNet5
from trainer.models.resnet import BasicBlock, ResNet

RANKS = 2
SECONDS = 10.0  # per contestant and net; at least 15 steps


def fully_connected() -> nn.Module:
    """AlexNet's three fully connected layers, 58.6 million weights."""
    return nn.Sequential(
        nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)
    )


# Name: model, shape of a sample, samples per rank.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet-5": (LeNet5, (1, 28, 28), 32),
    "ResNet-18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2), 10), (3, 32, 32), 8),
    "AlexNet, fully connected": (fully_connected, (9216,), 16),
}


class Contestant:
    """A net with its own optimizer, and a way to average gradients."""

    def __init__(
        self, world: World, build: Callable[[], nn.Module], config: AllReduceConfig | None
    ):
        torch.manual_seed(0)
        self.model = build()
        self.reducer = None
        if config is None:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        else:
            self.reducer = Reducer(self.model.parameters(), world, config)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        if self.reducer is None:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(inputs), targets).backward()
        else:
            self.reducer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), targets)
            self.reducer.arm()
            loss.backward()
            self.reducer.finish()
        self.optimizer.step()

    def close(self) -> None:
        if self.reducer is not None:
            self.reducer.close()


def worker(rank: int, ports: list[int], bucket_mb: list[float], quick: bool) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    store = TCPStore("127.0.0.1", ports[0], is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, timeout=limit, world_size=RANKS, rank=rank)
    world = World.connect(rank, RANKS, "127.0.0.1", ports[1], torch.device("cpu"), 60.0)
    nets = dict(list(NETS.items())[:1]) if quick else NETS
    for name, (build, shape, samples) in nets.items():
        configs: dict[str, AllReduceConfig | None] = {"DDP": None}
        for size in bucket_mb:
            for algorithm in ("ring", "native"):
                label = f"reducer, {algorithm}, {size:g} MiB"
                configs[label] = AllReduceConfig(algorithm=algorithm, bucket_mb=size)
        contestants = {label: Contestant(world, build, c) for label, c in configs.items()}
        batch = torch.randn(samples, *shape), torch.randint(0, 10, (samples,))
        times = race(world, list(contestants.values()), batch, quick)
        for label, seconds in zip(contestants, times, strict=True):
            if rank == 0:
                median = statistics.median(seconds)
                ratio = median / statistics.median(times[0])
                print(f"| {name} | {label} | {median * 1e3:.2f} | {ratio:.2f} | {len(seconds)} |")
        for contestant in contestants.values():
            contestant.close()
    world.close()
    dist.destroy_process_group()


def race(
    world: World, contestants: list[Contestant], batch: tuple[Tensor, Tensor], quick: bool
) -> list[list[float]]:
    """Seconds per step of the slower rank, for each contestant; they alternate step by step."""
    times: list[list[float]] = [[] for _ in contestants]
    rounds = 13
    done = -3  # the first steps are not counted: buckets, buffers and caches warm up
    while done < rounds:
        seconds = torch.zeros(len(contestants), world.size, dtype=torch.float64)
        for row, contestant in zip(seconds, contestants, strict=True):
            world.barrier()
            start = time.perf_counter()
            contestant.step(*batch)
            row[world.rank] = time.perf_counter() - start
        world.all_reduce(seconds)
        slowest = seconds.amax(1).tolist()
        done += 1
        if done == 0:
            rounds = min(400, max(15, int(SECONDS * len(contestants) / sum(slowest))))
            rounds = 2 if quick else rounds
        if done > 0:
            for column, value in zip(times, slowest, strict=True):
                column.append(value)
    return times


def second_worker(_: int, *arguments: Any) -> None:
    worker(1, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mib", nargs="*", type=float, help="sizes of allreduce.bucket_mb")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    bucket_mb = args.mib or [AllReduceConfig().bucket_mb]
    print(
        f"# A training step on {RANKS} processes of one machine, {datetime.date.today()}\n\n"
        f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {torch.__version__}; "
        f"command: python {' '.join(sys.argv)}\n\n"
        "| net | averaged by | ms | of DDP | n |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in free]
    for listener in free:
        listener.close()
    arguments = ports, bucket_mb, args.quick
    other = multiprocessing.spawn(second_worker, arguments, join=False)
    worker(0, *arguments)
    while not other.join():
        pass


if __name__ == "__main__":
    main()
