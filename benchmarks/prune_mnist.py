"""Test error before and after pruning to 8%, beside a dense control trained equally long.

    python benchmarks/prune_mnist.py --out FOLDER [--nets lenet300,lenet5] [--seeds 0,1,2]
        [--jobs 2] [--collect] [key=value ...]

For each net and seed two runs of `python -m trainer`, one thread each, `--jobs` at a time:

    pruned   +experiment=prune_NET: train, prune, retrain
    dense    +experiment=NET with as many epochs as all phases of prune_NET together

More overrides go to both (those of phases.prune and phases.retrain to `pruned` alone). Runs that
are done are skipped, so the same command goes on after an interruption; `--collect` runs nothing.
Prints a table per net: test errors in %, and the weights that are not zero (biases not counted).
`before` is the checkpoint of prune_NET's train phase. Published: Han et al., NIPS 2015, table 1.
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
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from trainer.config import Config, typed
from trainer.engine.evaluate import evaluate
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.run import build_data, build_model

PUBLISHED = {"lenet300": (1.64, 1.59, "22K"), "lenet5": (0.80, 0.77, "36K")}


@dataclass(frozen=True)
class Run:
    """One run of the trainer, in a folder of its own."""

    folder: Path
    arguments: list[str]

    @property
    def done(self) -> bool:
        """Whether it has ended well. Exits where it was run with other arguments."""
        summary = self.folder / "summary.json"
        if not summary.exists() or json.loads(summary.read_text())["status"] != "done":
            return False
        if json.loads(self._said().read_text()) != self.arguments:
            raise SystemExit(f"{self.folder} was run with other settings: use another --out")
        return True

    def start(self) -> subprocess.Popen[bytes]:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was interrupted
        self._said().write_text(json.dumps(self.arguments))
        command = [sys.executable, "-m", "trainer", *self.arguments]
        command.append(f"hydra.run.dir={json.dumps(str(self.folder))}")
        with self.folder.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _said(self) -> Path:
        return self.folder.with_suffix(".arguments")


def runs(net: str, seed: int, out: Path, overrides: list[str]) -> tuple[Run, Run]:
    """The pruned run and its dense control."""
    shared = ["cluster=inline", "cluster.threads=1", f"seed={seed}"]
    pruned = [f"+experiment=prune_{net}", *shared, *overrides]
    composed = subprocess.run(
        [sys.executable, "-m", "trainer", *pruned, "--cfg"], stdout=subprocess.PIPE, check=True
    )
    phases = yaml.safe_load(composed.stdout)["phases"]
    epochs = sum(phase["fit"]["epochs"] for phase in phases.values())
    alone = [f"{plus}phases.{name}." for plus in ("", "+") for name in phases if name != "train"]
    dense = [
        f"+experiment={net}",
        *shared,
        *(o for o in overrides if not o.startswith(tuple(alone))),
        f"phases.train.fit.epochs={epochs}",
    ]
    return Run(out / f"{net}-pruned-{seed}", pruned), Run(out / f"{net}-dense-{seed}", dense)


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


def error(run: Run) -> float:
    """Test error in % that the run measured at its end."""
    accuracy: float = json.loads((run.folder / "summary.json").read_text())["accuracy"]
    return 100 * (1 - accuracy)


def error_before(run: Run) -> float:
    """Test error in % of the dense net that was pruned then, in the run's own precision."""
    cfg = typed(Config, yaml.safe_load((run.folder / "config.yaml").read_text()))
    device = torch.device("cpu")
    runtime = Runtime(
        world=World.single(device),
        precision=cfg.precision,
        allreduce=cfg.allreduce,
        optimizer=cfg.optimizer,
        batch_size=cfg.data["batch_size"],
        seed=cfg.seed,
        channels_last=cfg.channels_last,
    )
    model = runtime.place(build_model(cfg))
    model.load_state_dict(load_file(run.folder / "checkpoints/01-train.safetensors"))
    return 100 * (1 - evaluate(model, build_data(cfg).test, runtime).accuracy)


def weights(run: Run) -> tuple[int, int]:
    """All weights of the final model, and those that are not zero."""
    tensors = [t for t in load_file(run.folder / "model.safetensors").values() if t.ndim > 1]
    return sum(t.numel() for t in tensors), sum(int(t.count_nonzero()) for t in tensors)


def print_table(net: str, pairs: dict[int, tuple[Run, Run]]) -> None:
    print(
        f"\n## {net}\n\n"
        "| seed | before | after | dense, trained as long | weights | not zero | kept |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    errors = []
    for seed, (pruned, dense) in pairs.items():
        if not (pruned.done and dense.done):
            print(f"| {seed} | not done | | | | | |")
            continue
        row = error_before(pruned), error(pruned), error(dense)
        errors.append(row)
        total, left = weights(pruned)
        print(f"| {seed} |{cells(row)} {total:,} | {left:,} | {left / total:.2%} |", flush=True)
    if errors:
        means = [statistics.mean(column) for column in zip(*errors, strict=True)]
        print(f"| mean of {len(errors)} |{cells(means)} | | |")
    before, after, kept = PUBLISHED[net]
    print(f"| published | {before:.2f} | {after:.2f} | | | {kept} | 8% |")


def cells(numbers: tuple[float, ...] | list[float]) -> str:
    return "".join(f" {number:.2f} |" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nets", default="lenet300,lenet5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--collect", action="store_true", help="only print what is done")
    args = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    nets = {n: {s: runs(n, s, out, args.overrides) for s in seeds} for n in args.nets.split(",")}
    todo = [r for pairs in nets.values() for pair in pairs.values() for r in pair if not r.done]
    if not args.collect:
        execute(todo, args.jobs)
    print(
        f"# Pruned to 8%: test error in %, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}; "
        f"command: python {' '.join(sys.argv)}"
    )
    for net, pairs in nets.items():
        print_table(net, pairs)
    if not args.collect and not all(r.done for p in nets.values() for x in p.values() for r in x):
        raise SystemExit("some runs failed: see their .log files")


if __name__ == "__main__":
    main()
