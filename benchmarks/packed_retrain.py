"""Retraining at 90% sparsity: packed survivors against masked dense training.

AlexNet's fully connected layers (9216-4096-4096-1000), data-parallel over the ring on this machine,
one thread per worker, fused Adam, fp32. Three ways take turns, step by step, in the same processes:

    packed   Retrain: only the survivors are learnt, sent and kept in the optimizer
    masked   torch.nn.utils.prune: dense parameters, multiplied by a mask in every forward pass
    dense    no mask at all: what a step costs without pruning

    python benchmarks/packed_retrain.py [--workers 2] [--steps 7] [--batch 32] [--sparsity 0.9]
        [--quick]

Prints the medians over the steps of rank 0. `--batch` is per worker.
"""

import argparse
import copy
import multiprocessing
import platform
import statistics
import time
from multiprocessing.queues import SimpleQueue

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from trainer.compress.select import weights
from trainer.config import AllReduceConfig, FitConfig
from trainer.engine.reducer import Reducer
from trainer.engine.world import World
from trainer.phases import Prune, Retrain

TRAINING = FitConfig(epochs=1)


def fully_connected(inputs: int) -> nn.Sequential:
    """The layers for 9216 inputs; for fewer, everything is as much smaller."""
    hidden, classes = 4096 * inputs // 9216, 1000 * inputs // 9216
    return nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
        nn.Linear(hidden, classes),
    )


class Way:
    """One way of training, with all that it keeps between steps."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model = model
        parameters = list(model.parameters())
        self.reducer = Reducer(parameters, world, AllReduceConfig())
        self.optimizer = torch.optim.Adam(parameters, 1e-4, fused=True)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.reducer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.reducer.arm()
        loss.backward()
        self.reducer.finish()
        self.optimizer.step()
        return time.perf_counter() - started

    def optimizer_bytes(self) -> int:
        return sum(v.nbytes for state in self.optimizer.state.values() for v in state.values())


def join(rank: int, size: int, meetings: "SimpleQueue[tuple[int, str]]") -> World:
    """The group of all workers; rank 0 tells the others where it meets."""
    device = torch.device("cpu")
    if size == 1:
        return World.single(device)
    server = None
    if rank == 0:
        server = World.listen("127.0.0.1")
        for _ in range(size - 1):
            meetings.put((server.port, server.token))
    port, token = (server.port, server.token) if server else meetings.get()
    return World.connect(rank, size, "127.0.0.1", port, device, 120.0, server, token)


def worker(rank: int, meetings: "SimpleQueue[tuple[int, str]]", args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    world = join(rank, args.workers, meetings)
    torch.manual_seed(0)
    inputs = 288 if args.quick else 9216
    pruned = fully_connected(inputs)
    Prune(args.sparsity, fit=FitConfig()).enter(pruned, world)
    packed, masked, dense = (copy.deepcopy(pruned) for _ in range(3))
    Retrain(fit=TRAINING).enter(packed, world)
    for places in list(weights(masked).values()):
        module, name = places[0]
        torch_prune.custom_from_mask(module, name, places[0].value != 0)
    ways = {"packed": packed, "masked": masked, "dense": dense}
    made = {name: Way(model, world) for name, model in ways.items()}
    torch.manual_seed(rank)
    x, y = torch.randn(args.batch, inputs), torch.randint(0, pruned[-1].out_features, (args.batch,))
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(args.steps + 1):
        for name, way in made.items():
            world.barrier()
            took = way.step(x, y)
            if number:  # the first step warms up
                seconds[name].append(took)
    if rank == 0:
        survivors = all(
            torch.equal(a[0].value != 0, b[0].value != 0)
            for a, b in zip(weights(packed).values(), weights(pruned).values(), strict=True)
        )
        print(
            f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
            f"{world.size} workers, batch {args.batch} each, {args.sparsity:.0%} zeros, "
            f"median of {args.steps}; zeros kept: {survivors}"
        )
        print(f"{'':8} {'ms/step':>9} {'min':>7} {'sent MB':>9} {'optimizer MB':>13} {'ratio':>7}")
        base = statistics.median(seconds["masked"])
        for name, way in made.items():
            median = statistics.median(seconds[name])
            print(
                f"{name:8} {median * 1e3:9.0f} {min(seconds[name]) * 1e3:7.0f} "
                f"{way.reducer.sent_bytes / 1e6:9.1f} {way.optimizer_bytes() / 1e6:13.1f} "
                f"{median / base:6.2f}x"
            )
    for way in made.values():
        way.reducer.close()
    world.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    meetings = context.SimpleQueue()
    processes = [
        context.Process(target=worker, args=(rank, meetings, args), daemon=True)
        for rank in range(1, args.workers)
    ]
    for process in processes:
        process.start()
    worker(0, meetings, args)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed")


if __name__ == "__main__":
    main()
