"""What a trial costs beside its training: many trials of next to nothing, on warm workers.

    python benchmarks/sweep_overhead.py --trials 20 --repeats 5
    python benchmarks/sweep_overhead.py --many 500
    python benchmarks/sweep_overhead.py --quick
    python benchmarks/sweep_overhead.py --simulate 2000 --slots 64 --seconds 5 sweep.sampler=tpe

Prints, for each repeat, the wall time of the whole process, the median time between the ends of
two trials of one slot, in the first and in the last quarter, and the largest resident memory of
the driver and of all its workers in both quarters. --many: one sweep, and a row for each tenth.
--simulate: the driver alone; its trials take --seconds (0: none) on --slots without workers, report
three epochs and train nothing. Further arguments are overrides of convnet_sweep.
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
from collections.abc import Collection, Iterator
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
            wall, cpu, busy = (now - then for now, then in zip(marks[-1], marks[-2], strict=True))
            print(
                f"| {count} | {1000 * wall / tenth:.1f} | {1000 * cpu / tenth:.1f} | "
                f"{cpu / wall:.2f} | {busy / wall / slots:.0%} | {threading.active_count()} |",
                flush=True,
            )

    LiveTable.ended = mark  # type: ignore[method-assign]
    LiveTable.show = lambda *_: None  # type: ignore[method-assign]
    print("| trials | ms per trial | ms CPU per trial | CPU s per s | slots busy | threads |")
    print("| --- | --- | --- | --- | --- | --- |")
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
        self.ended = 0.0  # seconds of trials that ended
        self.running: dict[SimulatedGroup, float] = {}  # begin of its trial

    def open(self) -> None: ...

    def size(self) -> int:
        return self.slots

    def new_group(self) -> "SimulatedGroup":
        return SimulatedGroup(self)

    def wait(self, groups: Collection["SimulatedGroup"], timeout_s: float) -> list[Any]:
        first = min(group.due for group in groups) - time.monotonic()
        time.sleep(max(0.0, min(first, timeout_s)))
        now = time.monotonic()
        return [group for group in groups if group.due <= now]

    def close(self, groups: object) -> None: ...

    def busy(self) -> float:
        """Seconds that all slots have spent in trials."""
        return self.ended + sum(time.monotonic() - begun for begun in self.running.values())


class SimulatedGroup:
    """A worker group that reports epochs and trains nothing."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        self.fleet = fleet
        self.size, self.nodes = 1, ["simulated"]
        self.stop_requested = threading.Event()
        self.due = 0.0  # time of its next message

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def steps(self, function: object, experiment: Any, *_: object) -> Iterator[Any]:
        from trainer.cluster import Step
        from trainer.messages import EpochEnded, PhaseEnded, PhaseRecord, RunStarted, RunStopped

        fleet = self.fleet
        begun = fleet.running[self] = time.monotonic()
        yield RunStarted(1, "cpu", 1000, 100, 100, 100)
        (name, phase), *_rest = experiment.phases.items()
        epochs = phase.fit.epochs
        metrics = {"accuracy": fleet.random.random()}
        for epoch in range(1, epochs + 1):
            self.due = begun + fleet.seconds * epoch / epochs
            while time.monotonic() < self.due and not self.stop_requested.is_set():
                yield Step.WAIT
            if self.stop_requested.is_set():
                yield RunStopped()
                break
            yield EpochEnded(name, epoch, epoch, 1.0, 1.0, metrics, 0.1, 0.0, 100.0, 0)
        else:
            record = PhaseRecord(name, "train", fleet.seconds, epochs, 1.0, metrics, 1.0,
                                 1000, 1000, 1000, 0.0, 0, 100.0)  # fmt: skip
            yield PhaseEnded(0, record, b"")
        fleet.ended += time.monotonic() - fleet.running.pop(self)


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
