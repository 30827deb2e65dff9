"""A sweep beside Ray Tune with OptunaSearch: the same trials, two at a time, one thread each.

    python -m venv TUNE
    TUNE/bin/pip install . 'ray[tune]==2.60.0' -c constraints.txt
    python benchmarks/sweep_vs_tune.py --python TUNE/bin/python [--trials 20] [--repeats 5]
    python benchmarks/sweep_vs_tune.py --python TUNE/bin/python --convnet [--minutes 3 6 10]
        [--seeds 0 1 2]

Without --convnet: wall time of the whole process for trials of next to nothing (LeNet-300-100, one
epoch on 64 digits); the two take turns. With it: the space of convnet_sweep, its settings of a
trial and its time, Tune with ASHA; trials that ended (of them, run through all their epochs) and
the best validation accuracy of these, so many minutes after the command was given. Tune runs
benchmarks/tune_side.py, whose trials go through the same training code.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from sweep_overhead import TRIVIAL

HERE = Path(__file__).resolve()
SPARE_S = 120.0  # beyond its budget, before a process is given up
DURING = ["data.train=10000", "phases.train.fit.epochs=4"]  # sweep.trial_overrides of convnet_sweep


@dataclass(frozen=True)
class End:
    """A trial that ended."""

    seconds: float  # after the command was given
    whole: bool  # it ran all its epochs
    accuracy: float  # validation, at its last epoch


def run(command: list[str], folder: Path, limit_s: float) -> tuple[float, float]:
    """Run to the end, silently. Returns the time of day at its start, and seconds."""
    given = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = given | {
        "PYTHONPATH": str(HERE.parent.parent),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # ours sets its own
        "RAY_worker_niceness": "0",  # as ours
    }
    with (folder / "output").open("w+") as output:
        at, begun = time.time(), time.monotonic()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(limit_s)
        finally:
            process.kill()
        seconds = time.monotonic() - begun
        if code:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: failed:\n{output.read()[-4000:]}")
    return at, seconds


def ours(arguments: list[str], folder: Path, limit_s: float) -> tuple[list[End], float]:
    """A sweep. Its trials that ended, and the seconds of the whole process."""
    at, seconds = run([sys.executable, "-m", "trainer", *arguments], folder, limit_s)
    (path,) = folder.glob("outputs/*/sweep/study.db")
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{path}")
    ends = [
        End(t.datetime_complete.timestamp() - at, t.state.name == "COMPLETE", t.value)
        for t in optuna.load_study(study_name=study.study_name, storage=f"sqlite:///{path}").trials
        if t.datetime_complete and t.value is not None
    ]
    return ends, seconds


def theirs(
    python: str, experiment: list[str], options: list[str], folder: Path, limit_s: float
) -> tuple[list[End], float]:
    """Ray Tune, likewise. `options` as tune_side.py takes them, beginning with the space."""
    run([sys.executable, "-m", "trainer", *experiment, "--cfg"], folder, limit_s)
    config, out = folder / "config.yaml", folder / "ends.jsonl"
    config.write_bytes((folder / "output").read_bytes())
    space, *rest = options
    side = str(HERE.with_name("tune_side.py"))
    at, seconds = run([python, side, str(config), space, str(out), *rest], folder, limit_s)
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    whole = max((entry["epochs"] or 0 for entry in entries), default=0)
    ends = [
        End(e["at"] - at, e["epochs"] == whole, e["accuracy"])
        for e in entries
        if e["accuracy"] is not None
    ]
    return ends, seconds


def compare_trivial(python: str, trials: int, repeats: int) -> None:
    times: dict[str, list[float]] = {"ours": [], "Ray Tune": []}
    for _ in range(repeats):
        for name, seconds in times.items():
            with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
                limit = SPARE_S + 20 * trials
                if name == "ours":
                    arguments = [*TRIVIAL, f"sweep.trials={trials}"]
                    ends, took = ours(arguments, Path(folder), limit)
                else:
                    options = ["trivial", f"--trials={trials}"]
                    ends, took = theirs(python, TRIVIAL, options, Path(folder), limit)
            assert len(ends) == trials, f"{name}: {len(ends)} of {trials} trials ended well"
            seconds.append(took)
    print(f"| {trials} trials | whole process, s | min - max | n |\n| --- | --- | --- | --- |")
    for name, seconds in times.items():
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} - "
            f"{max(seconds):.1f} | {len(seconds)} |"
        )
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    print(f"| ours / Ray Tune, median of pairs | {ratio:.2f} | | |")


def compare_convnet(python: str, minutes: list[float], seeds: list[int]) -> None:
    budget = 60 * max(minutes)
    marks = " | ".join(f"{m:g} min: trials (whole), best" for m in minutes)
    print(f"| | seed | {marks} |\n| --- | --- |{' --- |' * len(minutes)}")
    experiment = ["+experiment=convnet_sweep", "cluster.device=cpu"]
    for seed in seeds:
        sweep = ["sweep.slots=2", "sweep.trials=null", "sweep.refit=false"]
        arguments = [*experiment, *sweep, f"seed={seed}", f"sweep.seconds={budget}"]
        options = ["convnet", f"--seconds={budget}", f"--seed={seed}"]
        for name in ("ours", "Ray Tune"):
            with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
                limit = budget + SPARE_S
                if name == "ours":
                    ends, _ = ours(arguments, Path(folder), limit)
                else:
                    same = [*experiment, *DURING, f"seed={seed}"]
                    ends, _ = theirs(python, same, options, Path(folder), limit)
            told = " | ".join(state_after(60 * m, ends) for m in minutes)
            print(f"| {name} | {seed} | {told} |", flush=True)


def state_after(seconds: float, ends: list[End]) -> str:
    """How far a search had come."""
    done = [end for end in ends if end.seconds <= seconds]
    best = max((end.accuracy for end in done), default=float("nan"))
    return f"{len(done)} ({sum(end.whole for end in done)}), {best:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", required=True, help="of the environment with ray[tune]")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--convnet", action="store_true")
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 6, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print(
        f"# A sweep beside Ray Tune, {datetime.date.today()}\n\n"
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}, optuna {optuna.__version__}; "
        f"command: python {' '.join(sys.argv)}\n",
        flush=True,
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.convnet:
        compare_convnet(args.python, args.minutes, args.seeds)
    else:
        compare_trivial(args.python, args.trials, args.repeats)


if __name__ == "__main__":
    main()
