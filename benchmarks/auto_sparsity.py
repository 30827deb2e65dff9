"""sparsity=auto against the best sparsity set by hand: LeNet-300-100 on MNIST.

    python benchmarks/auto_sparsity.py --out FOLDER [--drop 0.002] [--seed 0]
        [--sparsities 0.90,0.92,0.94,0.95,0.96,0.97] [--as-long] [--quick]
        [key=value ...]

One after the other, each alone in its process and on one thread:

    auto       +experiment=auto_prune_lenet300 with phases.prune.max_drop=DROP
    by hand    +experiment=prune_lenet300 (20 epochs dense, 8 along a ramp, 12 of retraining)
               for each sparsity of fc1; fc2 one point below it, fc3 as the experiment has it

The best by hand is the largest sparsity whose validation accuracy stays within DROP of its own
dense model's; the test set has no say in that, and is told for the two that are compared alone.
Wall times are of whole runs, from the command to the end; by hand all tries count. `--as-long`
retrains each by hand until it has had as many epochs as `auto`. More overrides go to all runs. Runs
that are done are skipped.
"""

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

QUICK = [
    *("data.train=128", "data.validation=64", "data.test=64", "phases.train.fit.epochs=1"),
    *("phases.prune.fit.epochs=1", "phases.prune.rounds=2"),
]
BEFORE_RETRAINING = 28  # epochs of prune_lenet300
COLUMNS = ("run", "sparsity", "validation accuracy %", "against dense", "epochs", "wall time s")


@dataclass
class Run:
    """A run that has ended."""

    name: str
    folder: Path
    seconds: float  # from the command to its end

    @cached_property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))

    @property
    def sparsity(self) -> float:
        """Of the weights; biases are never pruned and do not count."""
        return float(self.summary["phases"][-1]["sparsity"])

    @property
    def dense(self) -> float:
        """Validation accuracy before the pruning."""
        return float(self.summary["phases"][0]["accuracy"])

    @property
    def accuracy(self) -> float:
        """Validation accuracy at the end."""
        return float(self.summary["phases"][-1]["accuracy"])

    @property
    def epochs(self) -> int:
        """All that were trained."""
        settings = yaml.safe_load((self.folder / "config.yaml").read_text())["phases"]
        return sum(
            settings[phase["name"]]["fit"]["epochs"] * max(1, len(phase["rounds"]))
            for phase in self.summary["phases"]
        )

    def row(self) -> str:
        """A line of the table."""
        cells = (
            self.name,
            f"{self.sparsity:.2%}",
            f"{100 * self.accuracy:.2f}",
            f"{100 * (self.accuracy - self.dense):+.2f}",
            str(self.epochs),
            f"{self.seconds:.0f}",
        )
        return f"| {' | '.join(cells)} |"


def run(name: str, out: Path, arguments: list[str]) -> Run:
    """Run the trainer in a folder of its own, or take what an equal run has left there."""
    folder, note = out / name, out / f"{name}.json"
    command = ["cluster=inline", "cluster.threads=1", "limits.max_accuracy_drop=null", *arguments]
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        began = time.perf_counter()
        with (out / f"{name}.log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "trainer", *command, f"hydra.run.dir={folder}"],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}; see {log.name}")
        note.write_text(json.dumps({"arguments": command, "seconds": seconds}))
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    known = json.loads(note.read_text())
    if known["arguments"] != command:
        raise SystemExit(f"{folder} was run with other settings: use another --out")
    return Run(name, folder, known["seconds"])


def by_hand(sparsity: float, epochs: int | None) -> list[str]:
    """The settings of a run whose sparsity is set. Args: epochs: in all; None: the recipe's."""
    longer = [] if epochs is None else [f"phases.retrain.fit.epochs={epochs - BEFORE_RETRAINING}"]
    return [
        *longer,
        "+experiment=prune_lenet300",
        f"phases.prune.sparsity={sparsity:g}",
        f"phases.prune.overrides.fc2={sparsity - 0.01:g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--drop", type=float, default=0.002, help="of validation accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparsities", default="0.90,0.92,0.94,0.95,0.96,0.97")
    parser.add_argument("--as-long", action="store_true", help="as many epochs by hand")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_intermixed_args()
    if args.quick:
        args.overrides += QUICK
        args.sparsities, args.drop = "0.9", 0.5
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shared = [f"seed={args.seed}", *args.overrides]
    auto = ["+experiment=auto_prune_lenet300", f"phases.prune.max_drop={args.drop:g}"]
    found = run("auto", out, [*auto, "artifact.make=false", *shared])
    epochs = found.epochs if args.as_long else None
    suffix = "-as-long" if args.as_long else ""
    tries = [
        run(f"by-hand-{sparsity:g}{suffix}", out, [*by_hand(sparsity, epochs), *shared])
        for sparsity in map(float, args.sparsities.split(","))
    ]
    print(
        f"# sparsity=auto against sparsity by hand, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}; "
        f"n = 1 (seed {args.seed}); command: python {' '.join(sys.argv)}\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
    )
    for each in (found, *tries):
        print(each.row())
    held = [each for each in tries if each.accuracy >= each.dense - args.drop - 1e-12]
    best = max(held, key=lambda each: each.sparsity, default=None)
    stopped = found.summary["phases"][1]["rounds"][-1]["stopped"]
    print(f"\nauto: {found.sparsity:.2%} sparse in {found.seconds:.0f} s; it stopped as {stopped}.")
    if best is None:
        print(f"By hand: no sparsity that was tried stays within {100 * args.drop:g} points.")
        return
    print(
        f"By hand: {best.sparsity:.2%} sparse ({best.name}), {best.seconds:.0f} s, and "
        f"{sum(each.seconds for each in tries):.0f} s for all {len(tries)} tries.\n"
        f"Test accuracy: auto {found.summary['accuracy']:.2%}, by hand "
        f"{best.summary['accuracy']:.2%}."
    )


if __name__ == "__main__":
    main()
