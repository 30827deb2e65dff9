"""A run killed, frozen and interrupted at random must end in the bits of an undisturbed one.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--quick]

LeNet-5 on 6,000 digits, trained, pruned along a ramp, retrained and shared by Ray workers, a
checkpoint every two seconds. Every 10 to 30 seconds one of these happens to it:

    worker killed       SIGKILL to a random worker
    worker frozen       SIGSTOP to a random worker; cluster.hang_timeout_s is 8
    driver killed       SIGKILL to the command's process
    Ctrl-C, SIGTERM     the command must save and exit 130 or 143
    Ctrl-C twice        the second one, a moment later, ends it at once

One command in three is hit early, while Ray or the workers start.

Whenever the command has ended, `resume=RUN_DIR` goes on. A run that got to its end is held against
an undisturbed one of the same settings, and the next run begins: two workers in fp32, then three in
bf16 that send bf16 in small buckets, and so on until the time is up. After each end of a command no
process of its, no file in its temporary folder, no Unix socket in there, and no shared-memory
segment of its may be left; what Ray needs to go after a SIGKILL is waited for.

--quick: one run without Ray, and one fault, to see that it runs.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import ray
import torch

ROOT = Path(__file__).resolve().parents[1]
PAUSE_S = (10.0, 30.0)  # between two faults
EARLY = 1 / 3  # of the commands get their first fault at their start
EARLY_S = (3.0, 8.0)  # after the start of the command, which has its handlers by then
SECOND_S = (0.0, 1.0)  # from the first Ctrl-C to the second
GONE_WITHIN_S = 30.0  # after the command's end, for Ray's processes and its folder
RUN_LIMIT_S = 600.0  # for the undisturbed run, and for a command that nothing disturbs any more
SETTINGS = [
    *("+experiment=smoke", "phases.train.fit.epochs=10", "phases.retrain.fit.epochs=10"),
    *("phases.prune.schedule=cubic", "phases.prune.fit.epochs=10", "optimizer.lr=0.005"),
    "phases.share.fit.epochs=3",
    *("checkpoint.every_seconds=2", "cluster.max_restarts=1000", "cluster.hang_timeout_s=8"),
]
QUICK = [
    *("cluster=inline", "cluster.threads=1", "model=lenet300", "data.train=320", "precision=fp32"),
    *("channels_last=false", "~phases.share.overrides", "checkpoint.every_steps=10"),
    "checkpoint.every_seconds=null",
]
VARIANTS = {
    "2 workers, fp32": ["precision=fp32"],
    "3 workers, bf16, bf16 wire, 0.2 MiB buckets": [
        *("cluster.workers=3", "cluster.cpus_per_worker=0.5", "cluster.threads=1"),
        *("allreduce.wire=bf16", "allreduce.bucket_mb=0.2"),
    ],
}
FAULTS = {
    "worker killed": signal.SIGKILL,
    "worker frozen": signal.SIGSTOP,
    "driver killed": signal.SIGKILL,
    "Ctrl-C": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "Ctrl-C twice": signal.SIGINT,
}


class Soaked:
    """One run in a folder of its own, started and resumed until it is done."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))  # short: Ray's sockets
        self._settings = settings
        self._family: dict[int, psutil.Process] = {}
        self._segments = segments()
        self.command: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the command: anew, or with resume= where there is a run."""
        run = self.folder / "run"
        new = [*SETTINGS, *self._settings, f"hydra.run.dir={run}"]
        arguments = [f"resume={run}"] if (run / "config.yaml").exists() else new
        environment = {key: value for key, value in os.environ.items() if key[:4] != "RAY_"}
        environment |= {
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache"),  # torch's own, meant to stay
            "PYTHONPATH": str(ROOT),
        }
        with (self.folder / "output").open("ab") as output:
            self.command = subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float) -> int | None:
        """The exit code; None where it still runs after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.command.wait(seconds)
        return None

    def wait_for_folder(self) -> None:
        """Wait until the command has its run directory, or has ended."""
        while not (self.folder / "run" / "config.yaml").exists() and self.wait(0.05) is None:
            pass

    def look(self) -> list[psutil.Process]:
        """The workers at work; all processes of the command are remembered."""
        workers = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.command.pid).children(recursive=True):
                self._family[process.pid] = process
                with contextlib.suppress(psutil.Error):
                    if "ray::Worker" in " ".join(process.cmdline()):
                        workers.append(process)
        return workers

    def left_behind(self) -> list[str]:
        """What is still there of a command that ended, after some patience."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self._family.clear()
        return left

    def _left(self) -> list[str]:
        processes = [p for p in self._family.values() if p.is_running()]
        sockets = Path("/proc/net/unix").read_text().split()
        parts = (self.folder / "run").rglob("*.part") if self.command.returncode == 0 else ()
        return [
            *(f"process {process.pid}" for process in processes),
            *(f"file {path}" for path in self.temporary.iterdir()),
            *(f"file {path}" for path in parts),
            *(f"socket {name}" for name in sockets if str(self.temporary) in name),
            *(f"shared memory {path}" for path in segments() - self._segments),
        ]

    def done(self) -> bool:
        """Whether the summary says so."""
        summary = self.folder / "run" / "summary.json"
        return summary.exists() and json.loads(summary.read_text())["status"] == "done"

    def weights(self) -> bytes:
        """The final weights."""
        return (self.folder / "run" / "model.safetensors").read_bytes()

    def told(self) -> str:
        """The end of what the commands said."""
        return (self.folder / "output").read_text()[-3000:]


@dataclasses.dataclass
class Tally:
    """What happened, by kind of fault."""

    tried: Counter[str] = dataclasses.field(default_factory=Counter)
    survived: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    equal: int = 0
    runs: int = 0

    def fail(self, what: str) -> None:
        """Remember a failure, and say it at once."""
        self.failures.append(what)
        print(f"FAILED: {what}", flush=True)


def segments() -> set[Path]:
    """The shared-memory segments of this machine that are ours."""
    return {p for p in Path("/dev/shm").iterdir() if p.exists() and p.stat().st_uid == os.getuid()}


def hit(run: Soaked, chance: random.Random) -> tuple[str, signal.Signals | None]:
    """Do something bad to a run. Returns what, and the signal that the command got, if any."""
    workers = run.look()
    kinds = [kind for kind in FAULTS if workers or not kind.startswith("worker")]
    kind = chance.choice(kinds)
    number = FAULTS[kind]
    if kind.startswith("worker"):
        with contextlib.suppress(psutil.Error):
            chance.choice(workers).send_signal(number)
        return kind, None
    run.command.send_signal(number)
    if kind == "Ctrl-C twice":
        time.sleep(chance.uniform(*SECOND_S))
        run.command.send_signal(number)
    return kind, number


def exit_codes(sent: signal.Signals | None, done: bool) -> set[int]:
    """The exit codes that may follow: 0 in any case, for the run was perhaps just done.

    Args:
        sent: the signal that the command got, if any.
        done: the summary says done. The interpreter winds down, and ends with its handlers: then a
            signal may have its own effect.
    """
    if sent is None:
        return {0}
    if sent == signal.SIGKILL:
        return {0, -sent}
    return {0, 128 + sent, -sent} if done else {0, 128 + sent}


def soak(
    run: Soaked, chance: random.Random, until: float, tally: Tally, quick: bool = False
) -> bool:
    """Disturb a run until it is done, or the time is up. Returns whether it is done.

    Args:
        quick: disturb it once, as soon as it has a run directory.
    """
    run.start()
    just_started = True
    pending: list[str] = []  # faults of which it is not known yet whether the run survives them
    while True:
        early = just_started and chance.random() < EARLY
        pause = chance.uniform(*(EARLY_S if early else PAUSE_S))
        if quick:
            run.wait_for_folder()
            pause = 0.1
        just_started = False
        sent: signal.Signals | None = None
        code = run.wait(pause)
        if code is None and time.monotonic() < until:
            fault, sent = hit(run, chance)
            tally.tried[fault] += 1
            pending.append(fault)
            until = 0.0 if quick else until
            if sent is None:
                continue
            code = run.wait(RUN_LIMIT_S)
        elif code is None:  # no time left: let it end undisturbed
            code = run.wait(RUN_LIMIT_S)
        wrong = []
        if code not in exit_codes(sent, run.done()):
            wrong.append(f"exit code {code} after {pending}, in {run.folder}:\n{run.told()}")
        wrong += [f"left behind after {pending}: {what}" for what in run.left_behind()]
        for what in wrong:
            tally.fail(what)
        if not wrong:
            tally.survived.update(pending)
        pending.clear()
        if code == 0:
            return True
        if code is None:
            run.command.kill()
            return False
        run.start()
        just_started = True


def undisturbed(folder: Path, settings: list[str], tally: Tally) -> bytes:
    """The weights that a run left alone ends with."""
    run = Soaked(folder, settings)
    started = time.monotonic()
    run.start()
    while (code := run.wait(1.0)) is None:
        run.look()
        if time.monotonic() - started > RUN_LIMIT_S:
            run.command.kill()
            raise SystemExit(f"the undisturbed run takes too long:\n{run.told()}")
    if code:
        raise SystemExit(f"the undisturbed run failed:\n{run.told()}")
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    for what in run.left_behind():
        tally.fail(f"left behind by the undisturbed run: {what}")
    shutil.rmtree(run.temporary, ignore_errors=True)
    return run.weights()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of their times")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    variants = {"inline": QUICK} if args.quick else VARIANTS
    chance, tally = random.Random(args.seed), Tally()
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    wanted: dict[str, bytes] = {}
    for number, (name, settings) in enumerate(variants.items()):
        folder = base / f"undisturbed-{number}"
        folder.mkdir()
        wanted[name] = undisturbed(folder, settings, tally)
    until = time.monotonic() + 60 * args.minutes
    while time.monotonic() < until:
        name = list(variants)[tally.runs % len(variants)]
        folder = base / f"run-{tally.runs}"
        folder.mkdir()
        run = Soaked(folder, variants[name])
        done = soak(run, chance, until, tally, args.quick)
        tally.runs += 1
        same = done and run.weights() == wanted[name]
        tally.equal += same
        if not same:
            tally.fail(f"{folder} ({name}) did not end in the same bits")
        print(f"run {tally.runs} ({name}): {dict(tally.tried)}, same bits: {same}", flush=True)
        shutil.rmtree(run.temporary, ignore_errors=True)
        if args.quick:
            break
    print(
        f"\n# Soak, {datetime.date.today()}\n\n{platform.machine()}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}; command: "
        f"python {' '.join(sys.argv)}\n\n| fault | tried | survived |\n| --- | --- | --- |"
    )
    for fault in FAULTS:
        print(f"| {fault} | {tally.tried[fault]} | {tally.survived[fault]} |")
    print(
        f"| all | {tally.tried.total()} | {tally.survived.total()} |\n\n{tally.equal} of "
        f"{tally.runs} runs ended in the bits of the undisturbed one; "
        f"{len(tally.failures)} failures",
        flush=True,
    )
    if tally.failures:
        raise SystemExit(f"kept for a look: {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
