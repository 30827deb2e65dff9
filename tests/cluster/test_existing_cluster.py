"""Runs on an existing Ray cluster: by its address, and as a submitted job.

The cluster is one node with folder, ports and token of its own, on the loopback interface. It is
ended by the reaper that ends private Rays, so that it goes even if these tests are killed.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from trainer.cluster import reaper

pytestmark = pytest.mark.integration

SCRIPTS = Path(sys.executable).parent
SHORT = [
    *("+experiment=smoke", "cluster.start_timeout_s=90", "phases.train.fit.epochs=1"),
    *("data.train=200", "data.validation=100", "data.test=100", "cluster.workers=1"),
]


@dataclass(frozen=True)
class Cluster:
    """A running Ray node. `environ` is what its owner has set: the token, and where ray is."""

    folder: Path
    address: str
    dashboard: str
    environ: Mapping[str, str]

    def call(self, *command: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    def train(self, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trainer", *SHORT, *arguments]
        return self.call(*command, f"cluster.address={self.address}", cwd=cwd, **environ)

    def secret_in(self, *places: Path) -> list[Path]:
        """The files below `places` that hold the token."""
        secret = self.environ["RAY_AUTH_TOKEN"].encode()
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        return [path for path in files if secret in path.read_bytes()]

    def processes(self) -> list[psutil.Process]:
        """Those whose command line names the folder."""
        found = psutil.process_iter(["cmdline"])
        return [p for p in found if str(self.folder) in " ".join(p.info["cmdline"] or ())]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's tmp_path: Ray's sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    port, dashboard, client, agent = free_ports(4)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environ = inherited | {
        "HOME": str(folder),  # no token of the user's own may be found, or be written there
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # bind the loopback interface only
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # as the recipes set it
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    cluster = Cluster(folder, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environ)
    command = [sys.executable, "-P", reaper.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as undertaker:
        started = cluster.call(
            *("ray", "start", "--head", "--num-cpus=2", "--num-gpus=0"),
            *(f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *("--include-dashboard=true", "--object-store-memory=100000000"),
            cwd=folder,
        )
        try:
            assert started.returncode == 0, started.stdout
            assert environ["RAY_AUTH_TOKEN"] not in started.stdout
            yield cluster
        finally:
            undertaker.communicate()
    deadline = time.monotonic() + 10
    while cluster.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cluster.processes() == []
    assert not folder.exists()


def test_callers_without_the_token_are_refused(cluster, tmp_path):
    # Ray asks again and again, twenty times by default.
    done = cluster.train(cwd=tmp_path, RAY_AUTH_TOKEN="wrong", RAY_NUM_REDIS_GET_RETRIES="1")
    assert done.returncode == 1, done.stdout
    assert done.stdout.splitlines()[-1].startswith("failed: ")
    assert cluster.address in done.stdout


def test_runs_as_a_submitted_job_and_leaves_the_cluster_as_it_was(cluster, tmp_path):
    """The job joins its own cluster by RAY_ADDRESS, and workers get the folder's code."""
    before = {process.pid for process in cluster.processes()}
    code, results = tmp_path / "code", tmp_path / "results"
    code.mkdir()
    (code / "mynet.py").write_text("from trainer.models import LeNet5 as Net\n")
    submit = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(code)]
    command = ["python", "-m", "trainer", *SHORT, "model={_target_: mynet.Net}"]
    done = cluster.call(
        *submit, "--", *command, "cluster.workers=2", f"hydra.run.dir={results}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout
    assert "2 workers on cpu" in done.stdout
    summary = json.loads((results / "summary.json").read_text())
    assert (summary["status"], summary["workers"]) == ("done", 2)
    assert before <= {process.pid for process in cluster.processes()}
    assert cluster.environ["RAY_AUTH_TOKEN"] not in done.stdout
    assert cluster.secret_in(tmp_path, cluster.folder) == []


def test_a_stopped_job_saves(cluster, tmp_path):
    """`ray job stop` sends SIGTERM, and waits."""
    job = ["--address", cluster.dashboard]
    run = tmp_path / "run"
    command = [
        *("python", "-m", "trainer", *SHORT, "phases.train.fit.epochs=2000"),
        *("checkpoint.every_steps=5", f"hydra.run.dir={run}"),
    ]
    submit = ["ray", "job", "submit", *job, "--no-wait", "--submission-id=mine", "--", *command]
    submitted = cluster.call(*submit, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stdout
    wait_for(lambda: list(run.glob("checkpoints/01-train-step-*")))
    stopped = cluster.call("ray", "job", "stop", *job, "mine", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("interrupted", "interrupted by SIGTERM")
    assert list(run.glob("checkpoints/01-train-step-*"))  # what resume= goes on from


def test_joins_by_address_and_a_lost_head_is_reported_and_delays_no_stop(cluster, tmp_path):
    """The last test on this cluster: its head is gone afterwards."""
    command = [sys.executable, "-m", "trainer", *SHORT, "phases.train.fit.epochs=2000"]
    options = [f"cluster.address={cluster.address}", "hydra.run.dir=run"]
    run = subprocess.Popen(
        [*command, *options, "checkpoint.every_steps=5"],
        cwd=tmp_path,
        env=dict(cluster.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: list(tmp_path.glob("run/checkpoints/01-train-step-*")))
        (server,) = [p for p in cluster.processes() if p.name() == "gcs_server"]
        server.kill()
        wait_for((tmp_path / "run" / "summary.json").exists)
        run.terminate()
        shown, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 143, shown
    assert "1 worker on cpu" in shown
    assert cluster.environ["RAY_AUTH_TOKEN"] not in shown
    assert cluster.secret_in(tmp_path, cluster.folder) == []
    assert f"the head node of the Ray cluster at {cluster.address} does not answer" in shown
    assert "resume with: python -m trainer resume=" in shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
