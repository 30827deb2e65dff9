"""Training over slow links: the time of a step, what it sends, and the accuracy, by method.

    python benchmarks/slow_links.py [--rates 1gbit 100mbit] [--steps 10] [--only NAME ...] [--quick]
    python benchmarks/slow_links.py --accuracy-steps 400 [--seeds 3] [--only NAME ...]

Two workers train LeNet-5 on MNIST in fp32, one thread each. In the first form they are processes in
two network namespaces (trainer/testing/hosts.py), connected by a link of each rate; this needs
Linux, root and iproute2. All methods take turns in these processes, three times; a turn has ten
steps that are not counted, and then those that are: the table shows the mean over the steps on
rank 0, of the median turn. The second form has no link: two threads train with each method and
seed, and the table shows the accuracy on 5,000 validation images: mean and sample standard
deviation over the seeds.
"""

import argparse
import datetime
import functools
import os
import platform
import statistics
import sys
import threading
import time
from typing import Any

import torch

from trainer.config import AllReduceConfig, FitConfig
from trainer.data import mnist
from trainer.data.split import Splits
from trainer.engine.evaluate import evaluate
from trainer.engine.loop import fit
from trainer.engine.optim import parse_optimizer
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.models import LeNet5
from trainer.testing.hosts import Hosts
from trainer.testing.ranks import run_ranks

METHODS: list[dict[str, Any]] = [
    {},
    {"wire": "bf16"},
    {"wire": "bf16", "error_feedback": True},
    {"wire": "int8"},
    {"wire": "int8", "error_feedback": False},
    {"compression": "powersgd", "rank": 2},
    {"compression": "powersgd", "rank": 8},
    {"compression": "topk", "fraction": 0.01},
    {"local_steps": 10},
    {"local_steps": 10, "wire": "int8"},
]
ROUNDS = 3  # turns of each method
WHOLE_STEPS = 20  # where accuracies are compared
SKIPPED = 10  # steps at the beginning of a turn that are not counted
PORT = 29555

building = threading.Lock()  # ranks that are threads share torch's random state


def train(
    world: World,
    data: Splits,
    method: dict[str, Any],
    steps: int,
    seed: int = 0,
    whole_steps: int = 0,
) -> tuple[list[float], list[int], float]:
    """Train for some steps.

    Returns:
        Of each step, the seconds and the bytes sent; accuracy on the validation data.
    """
    settings = {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.9}
    runtime = Runtime(
        world=world,
        precision="fp32",
        allreduce=AllReduceConfig(**method, whole_steps=whole_steps),
        optimizer=parse_optimizer(settings),
        batch_size=128,
        seed=seed,
    )
    with building:
        torch.manual_seed(seed)
        model = LeNet5()
    seconds, sent = [], []
    begun = time.perf_counter()
    cfg = FitConfig(epochs=100, max_steps=steps)
    for step in fit(model, data.train, cfg, runtime, local_steps=method.get("local_steps", 1)):
        seconds.append(time.perf_counter() - begun)
        sent.append(step.sent_bytes)
        begun = time.perf_counter()
    return seconds, sent, evaluate(model, data.validation, runtime).values["accuracy"]


def time_methods(rank: int, rate: str, steps: int) -> None:
    """What each of the two processes executes. Rank 0 prints the rows of the table."""
    torch.set_num_threads(1)
    world = World.connect(rank, 2, Hosts.address(1), PORT, torch.device("cpu"), 60.0)
    data = mnist(train=10 * 128, validation=100, test=1)  # 10 steps per epoch
    seconds: list[list[float]] = [[] for _ in METHODS]
    sent = [0.0] * len(METHODS)
    for _ in range(ROUNDS):
        for number, method in enumerate(METHODS):
            times, bytes_sent, _ = train(world, data, method, SKIPPED + steps)
            seconds[number].append(statistics.mean(times[SKIPPED:]))
            sent[number] = bytes_sent[-1]
    world.close()
    if rank == 0:
        medians = [statistics.median(times) for times in seconds]
        for method, median, size in zip(METHODS, medians, sent, strict=True):
            print(
                f"| {rate} | {name(method)} | {size / 1000:.1f} | {1000 * median:.1f} | "
                f"{median / medians[0]:.2f} |",
                flush=True,
            )


def time_over_link(rate: str) -> None:
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--rates", rate]
    with Hosts(2, rate) as hosts:
        hosts.run_on_all(lambda host: [*command, "--rank", host - 1])


def compare_accuracy(data: Splits, steps: int, seeds: int) -> None:
    print("| method | accuracy | difference to the default | n |\n| --- | --- | --- | --- |")
    base: list[float] = []
    for method in METHODS:
        found = []
        for seed in range(seeds):
            body = functools.partial(
                train, data=data, method=method, steps=steps, seed=seed, whole_steps=WHOLE_STEPS
            )
            found.append(run_ranks(2, body)[0][2])
        base = base or found
        change = [a - b for a, b in zip(found, base, strict=True)]
        print(f"| {name(method)} | {spread(found)} | {spread(change, '+')} | {seeds} |", flush=True)


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} ± {deviation:.4f}"


def name(method: dict[str, Any]) -> str:
    return " ".join(f"{key}={str(v).lower()}" for key, v in method.items()) or "default"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as tc has them")
    parser.add_argument(
        "--steps", type=int, default=10, help="counted steps of each turn, a multiple of 10"
    )
    parser.add_argument("--accuracy-steps", type=int, default=0, help="compare accuracies instead")
    parser.add_argument("--only", nargs="+", help="parts of the names of methods to compare")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        METHODS[1:] = [m for m in METHODS[1:] if any(part in name(m) for part in args.only)]
    if args.rank is not None:
        time_methods(args.rank, args.rates[0], args.steps)
        return
    print(
        f"# Training over slow links, {datetime.date.today()}\n\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}, torch {torch.__version__}; "
        f"command: python {' '.join(sys.argv)}\n",
        flush=True,
    )
    if args.quick:
        compare_accuracy(mnist(train=256, validation=50, test=1), 1, 1)
    elif args.accuracy_steps:
        torch.set_num_threads(1)
        compare_accuracy(mnist(test=1), args.accuracy_steps, args.seeds)
    else:
        print("| link | method | kB per step | ms per step | / default |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for rate in args.rates:
            time_over_link(rate)


if __name__ == "__main__":
    main()
