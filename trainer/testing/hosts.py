"""Several hosts on one machine, made of Linux namespaces, to measure and test what a cluster does.

    with Hosts(3, rate="1gbit") as hosts:
        hosts.start_ray(*hosts)
        hosts.run(1, sys.executable, "-m", "trainer", "+experiment=smoke", "cluster.address=auto")
        hosts.power_off(3)

Each host has its own network interface, host name, processes, /dev/shm and folder for temporary
files. All are connected to one switch by links of the given rate. Needs Linux, root, and the
programs ip, tc (iproute2), nsenter and unshare (util-linux). Everything ends with this process,
even if it is killed.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_RAY = Path(sys.executable).with_name("ray")

# The first process of a host or switch. It lives until its standard input is closed; then the
# kernel ends all others of the host and removes its interfaces. It also reaps processes without a
# parent, as SIGCHLD is ignored.
_FIRST = "trap '' CHLD && echo ready && exec cat"


def why_not() -> str | None:
    """Say why this machine cannot make hosts; None if it can."""
    if missing := [name for name in ("ip", "tc", "nsenter", "unshare") if not shutil.which(name)]:
        return f"hosts made of namespaces need {', '.join(missing)}"
    try:
        with Hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"hosts made of namespaces are not permitted here: {error.stderr.strip()}"


class Hosts:
    """Hosts 1 to `count`; their addresses are 10.99.0.1 to 10.99.0.`count`.

    `rate` is the speed of every link in both directions, as tc takes it (`1gbit`); None: unlimited.
    """

    def __init__(self, count: int, rate: str | None = None) -> None:
        self._count = count
        self._rate = rate
        self._processes: dict[int, subprocess.Popen[str]] = {}  # unshare, by host; 0: the switch
        self._pids: dict[int, int] = {}  # of the first process of each host
        self._token = secrets.token_hex(32)

    def __enter__(self) -> "Hosts":
        # Not TMPDIR: the sockets of Ray need a short path.
        self._folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
        (self._folder / "own").mkdir()  # each host sees its own folder in this place
        try:
            self._start(0, "--net", prepare="true")
            self._in(0, "ip", "link", "add", "switch", "type", "bridge", "forward_delay", "0")
            self._in(0, "ip", "link", "set", "switch", "up")
            for host in range(1, self._count + 1):
                self.add(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[int]:
        """The hosts that are there."""
        return iter(host for host in self._pids if host)

    def close(self) -> None:
        """End all hosts and their processes, and remove their files."""
        for host in [*self, *({0} & self._pids.keys())]:
            self._end(host)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, host: int) -> None:
        """Start a host, or start it again, without any process."""
        if host in self._pids:
            self._end(host)
        folder = self.folder(host)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        names = [f"{self.address(number)} h{number}" for number in range(1, 20)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once
        prepare = [
            f"hostname h{host}",
            "mount -t tmpfs -o size=2g none /dev/shm",
            f"mount --bind {folder}/hosts /etc/hosts",
            f"mount --bind {folder}/resolv.conf /etc/resolv.conf",
            f"mount --bind {folder} {self._folder}/own",
        ]
        spaces = ("--net", "--uts", "--mount", "--pid", "--mount-proc", "--propagation=private")
        self._start(host, *spaces, prepare=" && ".join(prepare))
        peer = ("peer", "name", "eth0", "netns", str(self._pids[host]))
        self._in(0, "ip", "link", "add", f"h{host}", "type", "veth", *peer)
        self._in(0, "ip", "link", "set", f"h{host}", "master", "switch", "up")
        self._in(host, "ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._in(host, "ip", "link", "set", device, "up")
        self._in(host, "ip", "route", "add", "default", "via", "10.99.0.254")  # nobody has it
        if self._rate is not None:
            self.set_rate(self._rate, host)

    def set_rate(self, rate: str, host: int) -> None:
        """Change the speed of a host's link, in both directions."""
        shape = ("root", "tbf", "rate", rate, "burst", "128kb", "latency", "30ms")
        self._in(0, "tc", "qdisc", "replace", "dev", f"h{host}", *shape)
        self._in(host, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def start_ray(self, *hosts: int, cpus: int = 1) -> None:
        """Start Ray on these hosts, with as many CPUs each; host 1 is the head."""

        def start(host: int) -> None:
            head = f"{self.address(1)}:6379"
            role = ["--head", "--port=6379", "--include-dashboard=false"]
            command = [
                *(_RAY, "start"),
                *(role if host == 1 else [f"--address={head}"]),
                *(f"--node-ip-address={self.address(host)}", f"--num-cpus={cpus}", "--num-gpus=0"),
                *("--object-store-memory=100000000", "--disable-usage-stats"),
            ]
            for last in (False, False, False, True):  # more than one if the machine is busy
                if not self.run(host, *command, capture_output=True, check=last).returncode:
                    return
                self.run(host, _RAY, "stop", "--force", capture_output=True, check=False)

        if 1 in hosts:
            start(1)
        with ThreadPoolExecutor() as pool:
            list(pool.map(start, [host for host in hosts if host != 1]))

    def run(self, host: int, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """subprocess.run on a host; CalledProcessError if the command fails."""
        options = {"env": self.environ(), "text": True, "check": True, **options}
        return subprocess.run(self.command(host, *command), **options)

    def popen(self, host: int, *command: object, **options: Any) -> subprocess.Popen[str]:
        """subprocess.Popen on a host."""
        options = {"env": self.environ(), "text": True, **options}
        return subprocess.Popen(self.command(host, *command), **options)

    def run_on_all(self, command: Callable[[int], Sequence[object]]) -> None:
        """Run `command(host)` on all hosts at once; CalledProcessError if one of them fails."""
        processes = [self.popen(host, *command(host)) for host in self]
        for process in processes:
            process.wait()
        for process in processes:
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args)

    def command(self, host: int, *command: object) -> list[str]:
        """The command line that runs `command` on a host."""
        enter = ["nsenter", "--target", str(self._pids[host]), "--net", "--uts", "--mount", "--pid"]
        return [*enter, f"--wd={self._folder}/own", *map(str, command)]

    def environ(self) -> Mapping[str, str]:
        """The environment of a host's processes: this one's, with other settings of Ray."""
        own = f"{self._folder}/own"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return inherited | {
            "HOME": own,
            "TMPDIR": own,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "90",  # a machine that is busy
        }

    @staticmethod
    def address(host: int) -> str:
        """The address of a host."""
        return f"10.99.0.{host}"

    def folder(self, host: int) -> Path:
        """A host's folder for temporary files, as this process sees it."""
        return self._folder / str(host)

    def cut(self, host: int) -> None:
        """Take a host's link off the switch: its packets get lost, without an error for anybody."""
        self._in(0, "ip", "link", "set", f"h{host}", "nomaster")

    def mend(self, host: int) -> None:
        """Connect a host's link again."""
        self._in(0, "ip", "link", "set", f"h{host}", "master", "switch")

    def disconnect(self, one: int, other: int) -> None:
        """Let packets between two hosts get lost, while all others reach both."""
        for host, peer in ((one, other), (other, one)):  # to a hardware address that nobody has
            entry = (self.address(peer), "lladdr", "02:00:00:00:00:01", "nud", "permanent")
            self._in(host, "ip", "neighbour", "replace", *entry, "dev", "eth0")

    def reconnect(self, one: int, other: int) -> None:
        """Let two hosts reach each other again."""
        for host, peer in ((one, other), (other, one)):
            self._in(host, "ip", "neighbour", "delete", self.address(peer), "dev", "eth0")

    def kill(self, host: int) -> None:
        """Kill all processes of a host. Its kernel closes their connections."""
        for pid in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def power_off(self, host: int) -> None:
        """End a host without closing any connection."""
        self.cut(host)
        self._end(host)

    def drain(self, host: int, deadline_s: int = 600) -> None:
        """Give Ray notice that a host will be preempted within `deadline_s` seconds."""
        words: list[str] = []
        for pid in self.processes(host):
            with contextlib.suppress(OSError):  # it may have ended
                words += Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        id_ = next(word.partition("=")[2] for word in words if word.startswith("--node_id="))
        self.run(
            *(1, _RAY, "drain-node", f"--address={self.address(1)}:6379", f"--node-id={id_}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=notice"),
            f"--deadline-remaining-seconds={deadline_s}",
            capture_output=True,
        )

    def processes(self, host: int) -> list[int]:
        """The processes of a host without its first one."""
        first = self._pids[host]
        space = os.readlink(f"/proc/{first}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may have ended
                if os.readlink(entry / "ns" / "pid") == space and int(entry.name) != first:
                    found.append(int(entry.name))
        return found

    def _start(self, host: int, *spaces: str, prepare: str) -> None:
        process = subprocess.Popen(
            ["unshare", *spaces, "--fork", "sh", "-c", f"{prepare} && {_FIRST}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            _, said = process.communicate()
            raise subprocess.CalledProcessError(process.returncode, "unshare", stderr=said)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        self._processes[host], self._pids[host] = process, int(children)

    def _end(self, host: int) -> None:
        del self._pids[host]
        self._processes.pop(host).communicate()  # closes its standard input
        if host:  # now, if the kernel has not done so
            self._in(0, "ip", "link", "delete", f"h{host}", check=False)

    def _in(self, host: int, *command: str, check: bool = True) -> None:
        """Run a command in the network of a host, or of the switch, with this machine's files."""
        enter = ["nsenter", "--target", str(self._pids[host]), "--net"]
        subprocess.run([*enter, *command], check=check, capture_output=True, text=True)
