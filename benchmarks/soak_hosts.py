"""An elastic run on hosts that fail at random must lose no step, and a replay must give its bits.

    python benchmarks/soak_hosts.py [--minutes 30] [--seed 0] [--rate 1gbit] [--only FAULT ...]

LeNet-5 on 1,280 digits is trained, pruned along a ramp, retrained and shared by up to three workers
(cluster.min_workers=1) on four hosts made of namespaces (trainer/testing/hosts.py; Linux, root).
Host 1 is the head of Ray and runs the command. A slow `--rate` of the links makes steps long and
leaves the processor to others. Every 5 to 20 seconds one of these happens; what was broken is
repaired up to 15 seconds after the run has continued:

    worker killed, worker frozen    SIGKILL or SIGSTOP to a worker
    host killed, Ray killed         SIGKILL to all processes of a host, or to its raylet
    power off                       a host is gone, and its connections are not closed
    cut 5 s, cut 60 s               a host's network is cut for so long
    pair disconnected               two hosts that the head reaches do not reach each other
    slow link                       a host has 20 Mbit/s
    notice                          a host is drained, and then ended
    driver killed, head lost        the command or Ray's head is killed; `resume=` continues the run
    disk full                       nothing can be written to the run directory; likewise

The table shows how long it took from each fault until an epoch (20 steps) was done; for the last
row, from the repair. A run that is done is repeated on this machine with `cluster.replay`, and must
end with the same weights.
"""

import argparse
import contextlib
import datetime
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import ray
import torch

from trainer.engine.links import SILENT_S
from trainer.testing.hosts import Hosts

HOSTS = 4
PAUSE_S = (5.0, 20.0)  # between two faults
REPAIR_S = (0.0, 15.0)  # until what was broken is repaired
RECOVERED_S = 240.0  # a fault after which no epoch is done for so long is not survived
REPLAY_S = 900.0
SETTINGS = [
    *("+experiment=smoke", "phases.train.fit.epochs=120", "phases.retrain.fit.epochs=120"),
    *("phases.prune.schedule=cubic", "phases.prune.fit.epochs=120", "optimizer.lr=0.005"),
    *("phases.share.fit.epochs=20", "data.train=1280", "data.validation=100", "data.test=100"),
    *("checkpoint.every_seconds=5", "cluster.max_restarts=1000", "cluster.threads=1"),
    "cluster.workers=3",
]
DISK_MB = 300  # of the file system with the run directory
Repair = Callable[[], None]


class Cluster:
    """The hosts, and the run on them."""

    def __init__(self, hosts: Hosts, rate: str, folder: Path) -> None:
        self.hosts = hosts
        self.rate = rate
        self.folder = folder
        self._output = folder / "output"
        self.command: subprocess.Popen[str]

    def start(self) -> None:
        """Start the command, or resume its run."""
        run = self.folder / "run"
        new = [*SETTINGS, f"hydra.run.dir={run}"]
        arguments = [f"resume={run}"] if (run / "config.yaml").exists() else new
        arguments += ["cluster.min_workers=1", "cluster.address=auto"]
        python = (sys.executable, "-m", "trainer")
        with self._output.open("a") as output:
            self.command = self.hosts.popen(1, *python, *arguments, stdout=output, stderr=output)

    def epochs(self) -> int:
        """Number of epochs that are done."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def wait_for_epoch(self, limit_s: float) -> float | None:
        """Seconds until an epoch is done or the command ends; None if that takes too long."""
        begun, before = time.monotonic(), self.epochs()
        while self.epochs() <= before:
            if self.command.poll() is not None:
                break
            if time.monotonic() - begun > limit_s:
                return None
            time.sleep(0.05)
        return time.monotonic() - begun

    def processes(self, host: int, name: str) -> list[psutil.Process]:
        """Processes of a host whose command line contains a name."""
        found = []
        for pid in self.hosts.processes(host):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def with_workers(self) -> list[int]:
        """The hosts without the first one that have a worker."""
        return [host for host in self.hosts if host > 1 and self.processes(host, "ray::Worker")]

    def bring_back(self, host: int) -> None:
        """Start a host again, and Ray on it."""
        self.hosts.add(host)
        self.hosts.start_ray(host)

    def said(self) -> str:
        """The end of what the command printed."""
        return self._output.read_text()[-3000:]


def signal_worker(number: signal.Signals) -> Callable[[Cluster, int], Repair | None]:
    def fault(cluster: Cluster, host: int) -> None:
        cluster.processes(host, "ray::Worker")[0].send_signal(number)

    return fault


def kill_host(cluster: Cluster, host: int) -> Repair:
    cluster.hosts.kill(host)
    return lambda: cluster.bring_back(host)


def kill_ray(cluster: Cluster, host: int) -> Repair:
    for process in cluster.processes(host, "raylet/raylet"):
        process.kill()
    return lambda: cluster.bring_back(host)


def power_off(cluster: Cluster, host: int) -> Repair:
    cluster.hosts.power_off(host)
    return lambda: cluster.bring_back(host)


def cut(seconds: float) -> Callable[[Cluster, int], Repair | None]:
    def fault(cluster: Cluster, host: int) -> Repair | None:
        begun = time.monotonic()
        cluster.hosts.cut(host)

        def repair() -> None:
            time.sleep(max(0.0, begun + seconds - time.monotonic()))
            cluster.hosts.mend(host)

        def repair_and_bring_back() -> None:  # Ray ends itself on a node that was given up
            repair()
            cluster.bring_back(host)

        if seconds > SILENT_S:
            return repair_and_bring_back
        repair()
        return None

    return fault


def disconnect_pair(cluster: Cluster, host: int) -> Repair:
    others = [other for other in cluster.with_workers() if other != host]
    if not others:
        return lambda: None
    cluster.hosts.disconnect(host, others[0])
    return lambda: cluster.hosts.reconnect(host, others[0])


def slow_link(cluster: Cluster, host: int) -> Repair:
    cluster.hosts.set_rate("20mbit", host)
    return lambda: cluster.hosts.set_rate(cluster.rate, host)


def drain(cluster: Cluster, host: int) -> Repair:
    cluster.hosts.drain(host)
    return lambda: cluster.bring_back(host)


def fill_disk(cluster: Cluster, host: int) -> Repair:
    filler = cluster.folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    return filler.unlink


def kill_driver(cluster: Cluster, host: int) -> None:
    for process in cluster.processes(1, "-m trainer"):
        process.kill()


def lose_head(cluster: Cluster, host: int) -> Repair:
    for process in cluster.processes(1, "gcs_server"):
        process.kill()

    def repair() -> None:
        for other in range(1, HOSTS + 1):  # the files of the run stay
            cluster.hosts.kill(other)
        cluster.hosts.start_ray(*range(1, HOSTS + 1))

    return repair


FAULTS: dict[str, Callable[[Cluster, int], Repair | None]] = {
    "worker killed": signal_worker(signal.SIGKILL),
    "worker frozen": signal_worker(signal.SIGSTOP),
    "host killed": kill_host,
    "Ray killed": kill_ray,
    "power off": power_off,
    "cut 5 s": cut(5.0),
    "cut 60 s": cut(60.0),
    "pair disconnected": disconnect_pair,
    "slow link": slow_link,
    "notice": drain,
    "driver killed": kill_driver,
    "head lost": lose_head,
    "disk full": fill_disk,
}
ENDS = {  # exit codes of the command
    "driver killed": {-9, 137},
    "head lost": {1, 143},
    "disk full": {1},
}


class Table:
    """What happened, by kind of fault."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []

    def fail(self, what: str) -> None:
        self.problems.append(what)
        print(f"FAILED: {what}", flush=True)

    def show(self) -> None:
        print("\n| fault | tried | survived | s to the next epoch, median | longest |")
        print("| --- " * 5 + "|")
        for fault in FAULTS:
            if seconds := self.seconds[fault]:
                times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
                print(f"| {fault} | {self.tried[fault]} | {len(seconds)} | {times} |")
            elif self.tried[fault]:
                print(f"| {fault} | {self.tried[fault]} | 0 | | |")


def disturb(cluster: Cluster, fault: str, chance: random.Random, table: Table) -> bool:
    """Cause a fault and wait until the run continues; False if it does not."""
    hosts = cluster.with_workers()
    if not hosts:
        return True
    host = chance.choice(hosts)
    table.tried[fault] += 1
    print(f"{time.strftime('%H:%M:%S')} {fault} on h{host}", flush=True)
    begun = time.monotonic()
    repair = FAULTS[fault](cluster, host)
    if fault in ENDS:
        code = cluster.command.wait(RECOVERED_S)
        if code not in {0, *ENDS[fault]}:
            table.fail(f"exit code {code} after {fault}:\n{cluster.said()}")
            return False
        if repair:
            repair()
        if code:
            cluster.start()
        repair = None
        begun = time.monotonic()
    waited = cluster.wait_for_epoch(RECOVERED_S)
    if waited is None:
        table.fail(f"no epoch {RECOVERED_S:.0f} s after {fault} on h{host}:\n{cluster.said()}")
        return False
    table.seconds[fault].append(time.monotonic() - begun)
    if repair:
        time.sleep(chance.uniform(*REPAIR_S))
        repair()
    return True


def soak(cluster: Cluster, faults: list[str], until: float, seed: int, table: Table) -> bool:
    """Disturb a run until it is done; False if it did not end well."""
    chance = random.Random(seed)
    cluster.start()
    cluster.wait_for_epoch(RECOVERED_S)
    while cluster.command.poll() is None:
        if time.monotonic() > until:
            if cluster.wait_for_epoch(RECOVERED_S) is None:
                table.fail(f"no epoch for {RECOVERED_S:.0f} s at the end:\n{cluster.said()}")
                return False
        elif not disturb(cluster, chance.choice(faults), chance, table):
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            cluster.command.wait(chance.uniform(*PAUSE_S))
    if cluster.command.returncode:
        table.fail(f"exit code {cluster.command.returncode}:\n{cluster.said()}")
    return cluster.command.returncode == 0


def replayed(run: Path, folder: Path) -> bool:
    """Whether the replay of a run ends with its weights."""
    arguments = [*SETTINGS, f"cluster.replay={run}/members.jsonl", f"hydra.run.dir={folder}"]
    subprocess.run(
        [sys.executable, "-m", "trainer", *arguments, "cluster.cpus_per_worker=0.5"],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=REPLAY_S,
    )
    name = "model.safetensors"
    return (run / name).read_bytes() == (folder / name).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their times")
    parser.add_argument("--rate", default="1gbit", help="of every link, as tc takes it")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    args = parser.parse_args()
    print(
        f"# Soak on {HOSTS} hosts, {datetime.date.today()}\n\n{platform.machine()}, "
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}, "
        f"ray {ray.__version__}; command: python {' '.join(sys.argv)}\n",
        flush=True,
    )
    base, table = Path(tempfile.mkdtemp(prefix="soak-")), Table()
    until = time.monotonic() + 60 * args.minutes
    runs = equal = 0
    while time.monotonic() < until:
        folder = base / f"run-{runs}"
        folder.mkdir()
        size = f"size={DISK_MB}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "soak", folder], check=True)
        with Hosts(HOSTS, args.rate) as hosts:
            hosts.start_ray(*hosts)
            done = soak(
                Cluster(hosts, args.rate, folder), args.only, until, args.seed + runs, table
            )
        runs += 1
        same = done and replayed(folder / "run", folder / "again")
        equal += same
        if done and not same:
            table.fail(f"the replay of {folder} ended with other weights")
        print(f"run {runs}: done: {done}, replay equal: {same}", flush=True)
        if same:
            subprocess.run(["umount", folder], check=True)
    table.show()
    print(f"\n{equal} of {runs} runs ended with the weights of their replay", flush=True)
    if table.problems:
        raise SystemExit(f"{len(table.problems)} failures; kept: {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
