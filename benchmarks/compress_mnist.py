"""README's tables of accuracy and of Deep Compression on MNIST: errors and bytes, seed by seed.

    python benchmarks/compress_mnist.py --out FOLDER [--experiments NAME,...] [--seeds 0,1,2]
        [--jobs 2] [--collect] [--quick] [key=value ...]

For each experiment and seed one run of `python -m trainer`, one thread each, `--jobs` at a time:

    prune_lenet300, prune_lenet5                   pruned to 8%; beside each a dense control: NET
                                                   with as many epochs as all its phases together
    deep_compression_lenet300, deep_compression    down to model.dcz, decoded and measured again

By default all four. More overrides go to all runs (those of phases.prune and phases.retrain not to
the controls). Runs that are done are skipped, so the same command goes on after an interruption;
`--collect` runs nothing. Everything printed is read from what the runs left: test errors in %; of
the pruned ones the weights that are not zero, biases not counted; of the compressed ones bytes and
ratio of model.dcz, and the bytes of the same weights in the published format, Huffman codes
included. `before` is the dense stage of the same run. Published: Han et al., NIPS 2015, table 1,
and Han, Mao & Dally, ICLR 2016, tables 1, 4 and 5.
"""

import argparse
import datetime
import json
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

PRUNED = {  # the dense experiment, and the published errors before and after, and weights
    "prune_lenet300": ("lenet300", 1.64, 1.59, "22K"),
    "prune_lenet5": ("lenet5", 0.80, 0.77, "36K"),
}
QUICK = [
    *("data.train=128", "data.validation=64", "data.test=64", "phases.train.fit.epochs=1"),
    *("phases.prune.fit.epochs=1", "phases.retrain.fit.epochs=1"),
]
COMPRESSED = {  # published: error before, ratio, error after
    "deep_compression_lenet300": (1.64, 40, 1.58),
    "deep_compression": (0.80, 39, 0.74),
}


@dataclass(frozen=True)
class Run:
    """One run of the trainer, in a folder of its own."""

    folder: Path
    arguments: list[str]

    @property
    def done(self) -> bool:
        """Whether it has ended well. Exits where it was run with other arguments."""
        if not (self.folder / "summary.json").exists() or self.summary["status"] != "done":
            return False
        if json.loads(self._said().read_text()) != self.arguments:
            raise SystemExit(f"{self.folder} was run with other settings: use another --out")
        return True

    @property
    def summary(self) -> dict[str, Any]:
        """What it left in summary.json."""
        content: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return content

    def start(self) -> subprocess.Popen[bytes]:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was interrupted
        self._said().write_text(json.dumps(self.arguments))
        command = [sys.executable, "-m", "trainer", *self.arguments]
        command.append(f"hydra.run.dir={json.dumps(str(self.folder))}")
        with self.folder.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _said(self) -> Path:
        return self.folder.with_suffix(".arguments")


def run_of(experiment: str, seed: int, out: Path, overrides: Sequence[str]) -> Run:
    arguments = [f"+experiment={experiment}", "cluster=inline", "cluster.threads=1"]
    return Run(out / f"{experiment}-{seed}", [*arguments, f"seed={seed}", *overrides])


def control_of(run: Run, experiment: str, seed: int, out: Path, overrides: Sequence[str]) -> Run:
    """The dense run that is trained as long as all phases of `run` together."""
    composed = subprocess.run(
        [sys.executable, "-m", "trainer", *run.arguments, "--cfg"], stdout=subprocess.PIPE
    )
    if composed.returncode:
        raise SystemExit(composed.returncode)  # it has said what is wrong
    phases = yaml.safe_load(composed.stdout)["phases"]
    epochs = sum(phase["fit"]["epochs"] for phase in phases.values())
    alone = [f"{plus}phases.{name}." for plus in ("", "+") for name in phases if name != "train"]
    kept = [o for o in overrides if not o.startswith(tuple(alone))]
    control = run_of(PRUNED[experiment][0], seed, out, [*kept, f"phases.train.fit.epochs={epochs}"])
    return Run(out / f"{experiment}-dense-{seed}", control.arguments)


def execute(waiting: list[Run], jobs: int) -> None:
    """Run all, `jobs` at a time. Whatever ends this ends them."""
    running: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run.folder] = run.start()
            time.sleep(0.5)
            for folder, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[folder]
                    print(f"{folder.name}: exit code {code}", file=sys.stderr, flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def error(accuracy: float) -> float:
    """In %."""
    return 100 * (1 - accuracy)


def weights(run: Run) -> tuple[int, int]:
    """All weights of the final model, and those that are not zero."""
    tensors = [t for t in load_file(run.folder / "model.safetensors").values() if t.ndim > 1]
    return sum(t.numel() for t in tensors), sum(int(t.count_nonzero()) for t in tensors)


def print_pruned(experiment: str, runs: dict[int, list[Run]]) -> None:
    print("| seed | before | after | dense, trained as long | weights | not zero | kept |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for seed, (pruned, dense) in runs.items():
        if not (pruned.done and dense.done):
            print(f"| {seed} | not done | | | | | |")
            continue
        found = pruned.summary
        told = found["baseline_accuracy"], found["accuracy"], dense.summary["accuracy"]
        rows.append([error(accuracy) for accuracy in told])
        total, left = weights(pruned)
        print(f"| {seed} |{cells(rows[-1])} {total:,} | {left:,} | {left / total:.2%} |")
    if rows:
        print(f"| mean of {len(rows)} |{cells(means(rows))} | | |")
    _, before, after, kept = PRUNED[experiment]
    print(f"| published | {before:.2f} | {after:.2f} | | | {kept} | 8% |")


def print_compressed(experiment: str, runs: dict[int, list[Run]]) -> None:
    print("| seed | bytes of model.dcz | ratio | error, decoded | before | published format |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for seed, (run,) in runs.items():
        if not run.done:
            print(f"| {seed} | not done | | | | |")
            continue
        found = run.summary["artifact"]
        told = found["accuracy"], found["baseline_accuracy"]
        rows.append([found["ratio"], *(error(accuracy) for accuracy in told)])
        (coded,) = (s["bytes"] for s in found["stages"] if s["name"].endswith("(Han's format)"))
        row = f"{found['bytes']:,} | {found['ratio']:.1f} |{cells(rows[-1][1:])} {coded:,}"
        print(f"| {seed} | {row} |")
    if rows:
        ratio, *errors = means(rows)
        print(f"| mean of {len(rows)} | | {ratio:.1f} |{cells(errors)} |")
    before, ratio, after = COMPRESSED[experiment]
    print(f"| published | | {ratio} | {after:.2f} | {before:.2f} | |")


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def cells(numbers: Sequence[float]) -> str:
    return "".join(f" {number:.2f} |" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--experiments", default=",".join([*PRUNED, *COMPRESSED]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="only print what is done")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_intermixed_args()
    if args.quick:
        args.experiments = "prune_lenet300,deep_compression_lenet300"
        args.seeds, args.overrides = "0", [*args.overrides, *QUICK]
    chosen = args.experiments.split(",")
    if unknown := set(chosen) - PRUNED.keys() - COMPRESSED.keys():
        parser.error(f"--experiments: {', '.join(sorted(unknown))}: not one of those above")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[int, list[Run]]] = {}
    for name in chosen:
        runs[name] = {}
        for seed in map(int, args.seeds.split(",")):
            run = run_of(name, seed, out, args.overrides)
            runs[name][seed] = [run]
            if name in PRUNED:
                runs[name][seed].append(control_of(run, name, seed, out, args.overrides))
    every = [run for seeds in runs.values() for found in seeds.values() for run in found]
    if not args.collect:
        execute([run for run in every if not run.done], args.jobs)
    print(
        f"# Compressed on MNIST: test error in %, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}; "
        f"command: python {' '.join(sys.argv)}"
    )
    for name, seeds in runs.items():
        print(f"\n## {name}\n")
        (print_pruned if name in PRUNED else print_compressed)(name, seeds)
    if not args.collect and not all(run.done for run in every):
        raise SystemExit("some runs failed: see their .log files")


if __name__ == "__main__":
    main()
