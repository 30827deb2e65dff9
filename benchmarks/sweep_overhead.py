"""What a trial costs beside its training: many trials of next to nothing, on warm workers.

    python benchmarks/sweep_overhead.py --trials 20 --repeats 5
    python benchmarks/sweep_overhead.py --many 500
    python benchmarks/sweep_overhead.py --quick
    python benchmarks/sweep_overhead.py --simulate 2000 --slots 64 --seconds 5 sweep.sampler=tpe

Prints, for each repeat, the wall time of the whole process, the median time between the ends of
two trials of one slot, in the first and in the last quarter, and the largest resident memory of
the driver and of all its workers in both quarters. --many: one sweep, and a row for each tenth.
--simulate: the driver alone; its trials take --seconds (0: none) on --slots that exist only as
threads, report three epochs and train nothing. Further arguments are overrides of convnet_sweep.
"""

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

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
    parser.add_argument("--simulate", type=int, metavar="TRIALS")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if options.quick:
        options.trials, options.repeats = 4, 1
    if options.simulate:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chdir(folder)
            simulate(options.simulate, options.slots, options.seconds, options.overrides)
        return
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


def simulate(trials: int, slots: int, seconds: float, overrides: list[str]) -> None:
    """A sweep without workers in this process; prints a row for each tenth of it."""
    from trainer.__main__ import main as command
    from trainer.sweeps import pool
    from trainer.sweeps.show import LiveTable

    fleet = SimulatedFleet(slots, seconds)
    pool.Fleet = lambda *_: fleet  # type: ignore[assignment, misc]
    marks = [(time.monotonic(), time.process_time(), 0.0)]
    ended = itertools.count(1)
    tenth = max(1, trials // 10)

    def mark(*_: object) -> None:
        if (count := next(ended)) % tenth == 0:
            marks.append((time.monotonic(), time.process_time(), fleet.busy()))
            (wall, cpu, busy), (wall_, cpu_, busy_) = marks[-2:]
            share = (busy_ - busy) / (wall_ - wall) / slots
            print(
                f"| {count} | {1000 * (wall_ - wall) / tenth:.1f} | "
                f"{1000 * (cpu_ - cpu) / tenth:.1f} | {share:.0%} |",
                flush=True,
            )

    LiveTable.ended = mark  # type: ignore[method-assign]
    LiveTable.show = lambda *_: None  # type: ignore[method-assign]
    print("| trials | ms per trial | ms CPU per trial | slots busy |\n| --- | --- | --- | --- |")
    code = command([
        "+experiment=convnet_sweep", f"sweep.trials={trials}", f"sweep.slots={slots}",
        "sweep.refit=false", "sweep.recycle_after=1000000", "logger=[]", *overrides,
    ])  # fmt: skip
    assert code == 0, code


class SimulatedFleet:
    """Worker groups in the place of trainer.cluster.Fleet."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.slots, self.seconds = slots, seconds
        self.random = random.Random(0)
        self._lock = threading.Lock()
        self._busy = 0.0  # seconds of trials that ended
        self._running: dict[int, float] = {}  # begin of the trial in each thread

    def open(self) -> None: ...

    def size(self) -> int:
        return self.slots

    def new_group(self) -> "SimulatedGroup":
        return SimulatedGroup(self)

    def close(self, groups: object) -> None: ...

    def busy(self) -> float:
        """Seconds that all slots have spent in trials."""
        with self._lock:
            return self._busy + sum(time.monotonic() - begun for begun in self._running.values())

    def begin(self) -> None:
        with self._lock:
            self._running[threading.get_ident()] = time.monotonic()

    def end(self) -> None:
        with self._lock:
            self._busy += time.monotonic() - self._running.pop(threading.get_ident())


class SimulatedGroup:
    """A worker group that reports epochs and trains nothing."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet = fleet
        self.size, self.nodes = 1, ["simulated"]
        self.stop_requested = threading.Event()

    def start(self) -> None: ...

    def alive(self) -> bool:
        return True

    def stop(self) -> None: ...

    def run(self, function: object, experiment: Any, *_: object) -> Iterator[Any]:
        from trainer.messages import EpochEnded, PhaseEnded, PhaseRecord, RunStarted, RunStopped

        self.fleet.begin()
        try:
            yield RunStarted(1, "cpu", 1000, 100, 100, 100)
            (name, phase), *_rest = experiment.phases.items()
            metrics = {"accuracy": self.fleet.random.random()}
            for epoch in range(1, phase.fit.epochs + 1):
                if self.stop_requested.wait(self.fleet.seconds / phase.fit.epochs):
                    yield RunStopped()
                    return
                yield EpochEnded(name, epoch, epoch, 1.0, 1.0, metrics, 0.1, 0.0, 100.0, 0)
            record = PhaseRecord(name, "train", self.fleet.seconds, epoch, 1.0, metrics, 1.0,
                                 1000, 1000, 1000, 0.0, 0, 100.0)  # fmt: skip
            yield PhaseEnded(0, record, b"")
        finally:
            self.fleet.end()


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
