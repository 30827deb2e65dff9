"""From a fault to the next training step, beside Ray Train and torchrun, on hosts that fail.

    pip install -r benchmarks/requirements.txt
    python benchmarks/recovery.py [--repeats 3] [--only FAULT ...] [--systems SYSTEM ...] [--quick]

LeNet-5 on 6,000 digits, 96 digits per step, fp32, a checkpoint every 20 steps, on three hosts made
of namespaces (trainer/testing/hosts.py; Linux, root) with one CPU worker and one thread each; links
of 1 Gbit/s. One to three workers may train, so that each system can continue with those that are
left. Host 1 is the head of Ray, runs the command, and is the rendezvous of torchrun.

    ours        python -m trainer +experiment=smoke cluster.min_workers=1, with a long first phase
    Ray Train   recovery_side.py: TorchTrainer (gloo, DDP), ScalingConfig(num_workers=(1, 3))
    torchrun    recovery_side.py: gloo, DDP, --nnodes=1:3 --max-restarts=10, rendezvous c10d, which
                waits 5 s for further hosts (default: 30 s); workers do not use the store of the
                rendezvous, as that makes restarts fail (pytorch/pytorch issue 135712)

Two hosts train at first, and the third joins. As often as each worker has done 70 further steps,
one of these happens, and the third host joins again if it was lost:

    worker killed    SIGKILL to the worker of host 3
    host killed      SIGKILL to all processes of host 3
    notice           host 3 is drained with a deadline of 30 s, and then killed; torchrun, which
                     knows no notice, gets SIGTERM on host 3 instead
    power off        host 3 is gone, and its connections are not closed
    first host       SIGKILL to all processes of host 1

All use an SGD that writes down when each of its steps is done, on a clock that all processes share.
`next step` is the time from the fault (or from the start of Ray or torchrun on a host that joins)
until the first step without the lost worker, or with the new one; `pause` the longest time without
a step until then; `repeated` the number of steps that were done again.
"""

import argparse
import datetime
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import ray
import torch
from recovery_side import EVERY, SGD
from startup import STAMPS, has_ray_train, read_stamps

from trainer.testing.hosts import Hosts, why_not

HERE = Path(__file__).resolve().parent
SIDE = HERE / "recovery_side.py"
STEPS = 70  # of each worker before a fault, which is then between two checkpoints
START_S = 240.0
RECOVERED_S = 180.0
NOTICE_S = 30
LOST = 3  # the host that most faults are for
HOSTS = (1, 2, LOST)


def our_command(folder: Path) -> list[object]:
    return [
        *(sys.executable, "-m", "trainer", "+experiment=smoke", f"hydra.run.dir={folder}/run"),
        *("precision=fp32", "channels_last=false", "cluster.device=cpu", "cluster.threads=1"),
        *("cluster.address=auto", "cluster.workers=3", "cluster.min_workers=1"),
        *("optimizer._target_=startup.StampedSGD", *(f"optimizer.{k}={v}" for k, v in SGD.items())),
        *("phases.train.fit.epochs=10000", "data.batch_size=96", "data.validation=96"),
        *(f"checkpoint.every_steps={EVERY}", "checkpoint.every_seconds=null"),
    ]


def ray_train_command(folder: Path) -> list[object]:
    return [sys.executable, SIDE, "ray-train", folder]


def torchrun_command(folder: Path) -> list[object]:
    return [
        *("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),  # pytorch/pytorch#135712
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1"),
        *("--max-restarts=10", "--rdzv-backend=c10d", f"--rdzv-endpoint={Hosts.address(1)}:29400"),
        *("--rdzv-id=run", "--rdzv-conf=last_call_timeout=5", SIDE, "torchrun", folder),
    ]


@dataclass(frozen=True)
class System:
    command: Callable[[Path], list[object]]
    checkpoints: str  # pattern of their files
    ray: bool  # whether it runs on a Ray cluster, from host 1, or is started on each host


SYSTEMS = {
    "ours": System(our_command, "run/checkpoints/*-step-*", True),
    "Ray Train": System(ray_train_command, "run/checkpoint_*", True),
    "torchrun": System(torchrun_command, "state.pt", False),
}


class Run:
    """A system that trains on hosts."""

    def __init__(self, system: System, hosts: Hosts, folder: Path) -> None:
        self.system, self.hosts, self.folder = system, hosts, folder
        self.commands: dict[int, subprocess.Popen[str]] = {}  # by host
        self.training: set[int] = set()  # the hosts that should have a worker

    def start(self, *hosts: int) -> None:
        """Train on these hosts, or let them join."""
        self.training |= {*hosts}
        if self.system.ray:
            self.hosts.start_ray(*hosts)
        for host in hosts:
            if host == 1 or not self.system.ray:
                with (self.folder / "output").open("a") as output:
                    self.commands[host] = self.hosts.popen(
                        host, *self.system.command(self.folder), stdout=output, stderr=output
                    )

    def stamps(self) -> dict[str, list[tuple[float, int]]]:
        return read_stamps(self.folder / "stamps")

    def steps(self, host: int) -> list[tuple[float, int]]:
        """Time and number of the steps of a host's workers."""
        stamps = self.stamps()
        return sorted(
            step for worker in stamps if host_of(worker) == host for step in stamps[worker]
        )

    def latest(self) -> dict[int, str]:
        """The worker of each host that has done the latest step."""
        steps = self.stamps()
        workers = sorted(steps, key=lambda worker: steps[worker][-1])
        return {host_of(worker): worker for worker in workers}

    def train(self) -> None:
        """Wait until the worker of each host has done STEPS further steps."""
        begun = time.monotonic()

        def trains() -> bool:
            stamps = self.stamps()
            ready = {
                host
                for host, worker in self.latest().items()
                if sum(at > begun for at, _ in stamps[worker]) >= STEPS
            }
            return self.training <= ready and any(self.folder.glob(self.system.checkpoints))

        if problem := self.wait(trains, START_S):
            raise SystemExit(f"no training: {problem}\n{self.said()}")

    def said(self) -> str:
        return (self.folder / "output").read_text()[-3000:]

    def wait(self, reached: Callable[[], bool], limit_s: float) -> str:
        """Wait for something. Returns why it will not happen; empty: it has."""
        deadline = time.monotonic() + limit_s
        while not reached():
            codes = [command.poll() for command in self.commands.values()]
            if None not in codes:
                return f"ended with exit code {', '.join(map(str, sorted(set(codes))))}"
            if time.monotonic() > deadline:
                return f"none in {limit_s:.0f} s"
            time.sleep(0.02)
        return ""


def host_of(worker: str) -> int:
    return int(worker.partition("-")[0].removeprefix("h"))


def kill_worker(run: Run) -> None:
    run.hosts.run(LOST, "kill", "-9", run.latest()[LOST].split("-")[1])


def give_notice(run: Run) -> None:
    if run.system.ray:
        return run.hosts.drain(LOST, NOTICE_S)
    for agent in psutil.Process(run.commands[LOST].pid).children():
        agent.terminate()


FAULTS: dict[str, Callable[[Run], None]] = {
    "worker killed": kill_worker,
    "host killed": lambda run: run.hosts.kill(LOST),
    "notice": give_notice,
    "power off": lambda run: run.hosts.power_off(LOST),
    "first host": lambda run: run.hosts.kill(1),
}


@dataclass(frozen=True)
class Recovery:
    next_s: float
    pause_s: float
    repeated: int
    again_s: float | None  # until another worker has done a step in place of a killed one


Results = dict[tuple[str, str], list[Recovery | str]]  # by fault and name of the system


def measure(name: str, faults: list[str], results: Results) -> None:
    """Train, and cause faults one after the other; start again if there is no step after one."""
    left = list(faults)

    def recovers(run: Run, fault: str) -> bool:
        run.train()
        result = recovery(run, fault)
        results.setdefault((fault, name), []).append(result)
        load = os.getloadavg()[0]
        print(f"{fault}, {name}: {result}, load {load:.1f}", file=sys.stderr, flush=True)
        if isinstance(result, str):
            print(run.said(), file=sys.stderr)
        return isinstance(result, Recovery)

    while left:
        folder = Path(tempfile.mkdtemp(prefix="recovery-"))
        (folder / "stamps").mkdir()
        os.environ[STAMPS] = str(folder / "stamps")
        with Hosts(len(HOSTS), "1gbit") as hosts:
            run = Run(SYSTEMS[name], hosts, folder)
            run.start(1, 2)
            continues = True
            while left and continues:
                joins = [] if LOST in run.training else ["join"]
                continues = all(recovers(run, fault) for fault in [*joins, left.pop(0)])
        shutil.rmtree(folder)


def recovery(run: Run, fault: str) -> Recovery | str:
    """Cause a fault in a run, or let a host join, and measure when it continues."""
    before = run.stamps()
    victim = 1 if fault == "first host" else LOST
    lost = run.latest().get(victim, "")

    def replaced() -> float:
        """When a new worker of the host that the fault is for did its first step."""
        return first(lambda worker, step: worker not in before and host_of(worker) == victim)

    def next_step() -> float:
        """When the first step without the lost worker, or with the new one, was done.

        The others may complete the step that the lost worker was at, but no further one.
        """
        if fault == "join":
            return replaced()
        last = run.stamps()[lost][-1][1]
        return first(lambda worker, step: worker not in before or step > last + 1)

    def first(matches: Callable[[str, int], bool]) -> float:
        steps = ((at, w, step) for w, done in run.stamps().items() for at, step in done)
        return min((at for at, w, step in steps if matches(w, step)), default=math.inf)

    def recovered() -> bool:
        """Also host 2, which is there all the time, has done a step of the new group."""
        return run.steps(2)[-1][0] >= next_step()

    if fault == "join":
        run.hosts.add(LOST)
    begun = told = time.monotonic()
    if fault == "join":
        run.start(LOST)
    else:
        FAULTS[fault](run)
        run.training -= {victim} if fault != "worker killed" else set()
    if fault == "notice":
        told = time.monotonic()  # `ray drain-node` starts a Python, and gives notice at its end
        if run.wait(recovered, NOTICE_S):
            run.hosts.kill(LOST)
    if problem := run.wait(recovered, RECOVERED_S):
        return problem
    again_s = None
    if fault == "worker killed":
        if problem := run.wait(lambda: replaced() < math.inf, RECOVERED_S):
            return problem
        again_s = replaced() - told
    end = next_step()
    times = sorted(at for done in run.stamps().values() for at, _ in done if at <= end)
    pause_s = max(b - a for a, b in pairwise(times) if b > begun)
    repeated = max(a - b + 1 for (_, a), (at, b) in pairwise(run.steps(2)) if at > begun)
    return Recovery(max(0.0, end - told), pause_s, max(0, repeated), again_s)


def table(results: Results) -> str:
    """Medians, with the smallest and largest time."""

    def spread(values: list[float]) -> str:
        low, high = (f"{value:.1f}" for value in (min(values), max(values)))
        return f"{statistics.median(values):.1f} ({low} - {high})"

    rows = ["| fault | | next step, s | pause, s | steps repeated | n |", "| --- " * 6 + "|"]
    for (fault, name), all_of_them in results.items():
        done = [one for one in all_of_them if isinstance(one, Recovery)]
        for text in sorted({one for one in all_of_them if isinstance(one, str)}):
            rows.append(f"| {fault} | {name} | {text} | | | {all_of_them.count(text)} |")
        if not done:
            continue
        cells = [spread([one.next_s for one in done]), spread([one.pause_s for one in done])]
        repeated = f"{statistics.median(one.repeated for one in done):.0f}"
        rows.append(f"| {fault} | {name} | {' | '.join(cells)} | {repeated} | {len(done)} |")
        if again := [one.again_s for one in done if one.again_s is not None]:
            rows.append(f"| - three workers again | {name} | {spread(again)} | | | {len(done)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM"
    )
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.only, args.systems = 1, ["worker killed"], ["ours"]
    if reason := why_not():
        raise SystemExit(reason)
    if "Ray Train" in args.systems and not has_ray_train():
        raise SystemExit("Ray Train is missing: pip install -r benchmarks/requirements.txt")
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    print(
        f"# From a fault to the next step, {datetime.date.today()}\n\n{platform.machine()}, "
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}, "
        f"ray {ray.__version__}; command: python {' '.join(sys.argv)}\n",
        flush=True,
    )
    results: Results = {}
    for _ in range(args.repeats):
        for name in args.systems:
            measure(name, args.only, results)
    print(table(results))


if __name__ == "__main__":
    main()
