"""What a trial costs beside its training: many trials of next to nothing, on warm workers.

    python benchmarks/sweep_overhead.py --trials 20 --repeats 5
    python benchmarks/sweep_overhead.py --many 500
    python benchmarks/sweep_overhead.py --quick

Prints, for each repeat, the wall time of the whole process, the median time between the ends of
two trials of one slot, in the first and in the last quarter, and the largest resident memory of
the driver and of all its workers in both quarters. --many: one sweep, and a row for each tenth.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

TRIVIAL = [
    "+experiment=lenet300", "data.train=64", "data.validation=64", "data.test=64",
    "phases.train.fit.epochs=1", "cluster.workers=1", "sweep.slots=2", "sweep.pruner=none",
    "sweep.recycle_after=1000",
    'sweep.params={optimizer.lr: "tag(log, interval(1e-3,1e-1))"}',
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--many", type=int, metavar="TRIALS")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.repeats = 4, 1
    if options.many:
        print(
            "| trials | s per trial and slot | MB driver | MB workers |\n| --- | --- | --- | --- |"
        )
        options.trials, options.repeats = options.many, 1
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            print(once(options.trials, folder, bool(options.many)), flush=True)


def once(trials: int, folder: str, rows: bool) -> str:
    """One sweep in a process of its own; prints `rows` on the way."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *TRIVIAL, f"sweep.trials={trials}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    ends: list[float] = []
    memory: list[tuple[float, float]] = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial "):
            ends.append(time.monotonic())
            memory.append(resident(process.pid))
            if rows and len(ends) % (tenth := max(2, trials // 10)) == 0:
                driver, workers = memory[-1]
                print(
                    f"| {len(ends)} | {pause(ends[-tenth:]):.3f} | {driver:.0f} | {workers:.0f} |",
                    flush=True,
                )
    assert process.wait() == 0
    whole = time.monotonic() - begun
    quarter = max(2, len(ends) // 4)
    first, last = ends[:quarter], ends[-quarter:]
    pauses = [pause(part) for part in (first, last)]
    early, late = memory[quarter - 1], memory[-1]
    return (
        f"{trials} trials in {whole:.1f} s; s per trial and slot: first quarter {pauses[0]:.3f}, "
        f"last {pauses[1]:.3f}; MB driver {early[0]:.0f} -> {late[0]:.0f}, "
        f"workers {early[1]:.0f} -> {late[1]:.0f}"
    )


def pause(ends: list[float]) -> float:
    """Median time between the ends of two trials of one of the two slots."""
    return 2 * statistics.median(b - a for a, b in itertools.pairwise(ends))


def resident(pid: int) -> tuple[float, float]:
    """Megabytes of the driver, and of its Ray workers together."""
    driver = psutil.Process(pid)
    workers = [p for p in driver.children(recursive=True) if p.name().startswith("ray::Worker")]
    return driver.memory_info().rss / 1e6, sum(p.memory_info().rss for p in workers) / 1e6


if __name__ == "__main__":
    main()
