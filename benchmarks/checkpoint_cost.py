"""What checkpoints cost: AlexNet and its momentum, 488 MB, kept every 20 steps.

    python benchmarks/checkpoint_cost.py [--repeats 5] [--batch-size 16] [--quick]

Two warm Ray workers with one thread each train AlexNet on random images by the body that every run
executes; this process takes in what they report and writes the checkpoints, as the driver does.
Passes with and without checkpoints take turns. A pass is 61 steps; its time is from the end of step
20 to the end of step 60: two checkpoints are made in it, and each is written beside the 20 steps
that follow it.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from startup import STAMPS

from trainer.cluster import WorkerGroup, open_group
from trainer.data.split import Splits, TensorSplit
from trainer.experiment import Experiment
from trainer.messages import Checkpoint
from trainer.store.checkpoints import Checkpoints
from trainer.worker.run import Start, run_phases

EVERY = 20  # steps between two checkpoints
STEPS = 3 * EVERY + 1
TIMED = slice(EVERY - 1, 3 * EVERY)  # ends of steps, from just before a checkpoint on
ALEXNET = {"_target_": "trainer.models.AlexNet", "classes": 1000, "dropout": 0.5}


def images(seed: int, samples: int, size: int) -> Splits:
    """Random images; two each to validate and to test."""
    generator = torch.Generator().manual_seed(seed)

    def split(n: int) -> TensorSplit:
        pixels = torch.rand(n, 3, size, size, generator=generator)
        return TensorSplit(pixels, torch.randint(1000, (n,), generator=generator))

    return Splits(split(samples), split(2), split(2))


def config(batch_size: int, every: int | None, quick: bool) -> Experiment:
    small = {"_target_": "trainer.models.ResNetCifar", "classes": 1000}
    settings = {
        "name": "checkpoint-cost",
        "model": small if quick else ALEXNET,
        "data": {
            "_target_": "checkpoint_cost.images",
            "batch_size": batch_size,
            "samples": 4 * batch_size,
            "size": 8 if quick else 224,
        },
        "optimizer": {"_target_": "startup.StampedSGD", "lr": 1e-4, "momentum": 0.9},
        "phases": {
            "train": {
                "_target_": "trainer.phases.Train",
                "fit": {"epochs": STEPS, "max_steps": STEPS},
            }
        },
        "cluster": {"workers": 2, "device": "cpu", "threads": 1, "hang_timeout_s": 120},
        "checkpoint": {"every_steps": every, "every_seconds": None},
    }
    return Experiment.from_config(settings)


def measure(group: WorkerGroup, experiment: Experiment, stamps: Path) -> float:
    """Seconds per step of one pass, the checkpoints of which are written and thrown away."""
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        checkpoints = Checkpoints(Path(folder), experiment.config.checkpoint.keep)
        for file in stamps.iterdir():
            file.unlink()
        kept = 0
        for message in group.run(run_phases, experiment, Start(0)):
            if isinstance(message, Checkpoint):
                kept += 1
                checkpoints.save_within(0, "train", message.step, message.content)
        checkpoints.wait()
        checkpoints.close()
        assert kept == (STEPS // EVERY if experiment.config.checkpoint.every_steps else 0)
    columns = [[*map(float, file.read_text().split())] for file in stamps.iterdir()]
    ends = [max(pair) for pair in zip(*columns, strict=True)]
    assert len(ends) == STEPS
    timed = ends[TIMED]
    return (timed[-1] - timed[0]) / (len(timed) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="over both workers")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.batch_size = 1, 2
    import ray

    print(
        f"# What checkpoints cost, {datetime.date.today()}\n\n"
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}, ray {ray.__version__}; command: python {' '.join(sys.argv)}\n"
    )
    ways = {
        name: config(args.batch_size, every, args.quick)
        for name, every in (("without", None), ("with", EVERY))
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="stamps-") as stamps:
        os.environ[STAMPS] = stamps
        group = open_group(ways["with"].config.cluster)
        group.start()
        try:
            for number in range(args.repeats):
                for name in list(ways)[:: 1 if number % 2 else -1]:
                    times[name].append(measure(group, ways[name], Path(stamps)))
                    print(f"{name}: {times[name][-1]:.3f} s", file=sys.stderr, flush=True)
        finally:
            group.stop()
    print("| checkpoints | step, s | min - max | n |\n| --- | --- | --- | --- |")
    for name, row in times.items():
        print(
            f"| {name} | {statistics.median(row):.3f} | {min(row):.3f} - {max(row):.3f} | "
            f"{len(row)} |"
        )
    cost = statistics.median(b / a - 1 for a, b in zip(*times.values(), strict=True))
    print(f"| cost, median of pairs | {cost:.1%} | | |")


if __name__ == "__main__":
    main()
