"""Runs on Ray workers that are killed, frozen or stopped end with the same bits."""

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.test_resume import ARGUMENTS, same_end, signal_handlers_kept
from trainer.__main__ import main

RAY_ARGUMENTS = [
    *(argument for argument in ARGUMENTS if not argument.startswith("cluster")),
    "checkpoint.every_steps=8",
    "cluster.hang_timeout_s=12",
]


def abandoned_segments(before):
    """New segments of shared memory that no process uses; other tests may have made some."""
    new = set(Path("/dev/shm").iterdir()) - before
    for process in psutil.process_iter() if new else ():
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            new -= {Path(one.path) for one in process.memory_maps()}
    return new


@pytest.mark.integration
class TestWorkers:
    @staticmethod
    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def wait_until(self, run, condition):
        deadline = time.monotonic() + 180
        while not condition():
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for(self, run, pattern):
        """Until there is a new file."""
        before = set(glob.glob(pattern))
        self.wait_until(run, lambda: set(glob.glob(pattern)) - before)

    @pytest.fixture(scope="class")
    @classmethod
    def undisturbed(cls, tmp_path_factory, shared_ray):
        """A run in this process, whose Ray is running."""
        folder = tmp_path_factory.mktemp("runs") / "undisturbed"
        with signal_handlers_kept():
            assert main([*RAY_ARGUMENTS, f"hydra.run.dir={folder}"]) == 0
        return folder

    def workers(self, driver):
        """Process ids of the Ray workers below a driver."""
        listed = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()]
        below = {driver}
        for _ in range(6):
            below |= {int(pid) for pid, parent, _ in rows if int(parent) in below}
        return [int(pid) for pid, _, args in rows if int(pid) in below and "ray::Worker" in args]

    def test_two_workers_send_what_they_learn(self, undisturbed):
        extras = 4  # loss, request, ignored targets and missing gradients travel along
        assert "2 workers on cpu" in (undisturbed / "log.txt").read_text()
        summary = json.loads((undisturbed / "summary.json").read_text())
        assert summary["workers"] == 2
        assert len(summary["nodes"]) == 2
        train, prune, retrain, share = summary["phases"]
        for phase in (train, retrain, share):
            assert phase["sent_bytes_per_step"] == 4 * (phase["learnable"] + extras)
        assert retrain["learnable"] < 0.12 * train["learnable"]
        assert share["learnable"] < 0.001 * train["learnable"]
        assert prune["sparsity"] == pytest.approx(0.9, abs=1e-4)
        assert retrain["sparsity"] >= prune["sparsity"]

    def test_a_second_ctrl_c_while_ray_starts_leaves_nothing_behind(self, tmp_path, monkeypatch):
        """Ctrl-C reaches the whole process group; its second one ends the command before Ray is up.

        tests/sweeps/test_sweep.py sends a single SIGTERM while Ray starts.
        """
        monkeypatch.chdir(tmp_path)
        with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:  # short: Ray's sockets
            monkeypatch.setenv("TMPDIR", folder)
            run = self.start(*RAY_ARGUMENTS, "hydra.run.dir=run")
            self.wait_until(run, lambda: glob.glob(f"{folder}/trainer-*/session_*/sockets"))
            ray = psutil.Process(run.pid).children(recursive=True)
            assert ray
            for _ in range(2):
                os.killpg(run.pid, signal.SIGINT)
                time.sleep(0.2)
            said = run.communicate(timeout=180)[0]
            assert run.returncode == 130, said
            assert json.loads(Path("run/summary.json").read_text())["status"] == "interrupted"
            deadline = time.monotonic() + 30
            while any(p.is_running() for p in ray) or list(Path(folder).glob("trainer-*")):
                assert time.monotonic() < deadline
                time.sleep(0.1)

    @pytest.mark.timeout(400)  # three commands, one after the other
    def test_lost_drivers_and_workers_cost_nothing_but_time_and_leave_nothing(
        self, undisturbed, tmp_path, monkeypatch
    ):
        """The driver is killed; resumed, it gets Ctrl-C, which reaches the whole process group;
        resumed again, one worker is killed, and after the restart another one frozen.

        tests/cluster/test_existing_cluster.py stops a run by SIGTERM.
        """
        monkeypatch.chdir(tmp_path)
        before = set(Path("/dev/shm").iterdir())
        steps, log = "run/checkpoints/*step*.safetensors", Path("run/log.txt")
        with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:  # short: Ray's sockets
            monkeypatch.setenv("TMPDIR", folder)
            run = self.start(*RAY_ARGUMENTS, "hydra.run.dir=run")
            for end, number, code in (
                (os.kill, signal.SIGKILL, -signal.SIGKILL),
                (os.killpg, signal.SIGINT, 130),
            ):
                self.wait_for(run, steps)
                family = psutil.Process(run.pid).children(recursive=True)
                assert len(family) > 2
                end(run.pid, number)
                said = run.communicate(timeout=180)[0]
                assert run.returncode == code, said
                if number == signal.SIGINT:
                    assert "press Ctrl-C again to quit at once" in said
                    assert f"resume with: python -m trainer resume={Path('run').resolve()}" in said
                    summary = json.loads(Path("run/summary.json").read_text())
                    assert (summary["status"], summary["restarts"]) == ("interrupted", 0), said
                deadline = time.monotonic() + 30
                while (
                    any(p.is_running() for p in family)
                    or list(Path(folder).glob("trainer-*"))
                    or abandoned_segments(before)
                ):
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                run = self.start("resume=run")
            died, stands = "the process died; restarting from the last checkpoint", "no progress"
            for hurt, told in ((signal.SIGKILL, died), (signal.SIGSTOP, stands)):
                self.wait_for(run, steps)  # of the restarted workers, the second time
                os.kill(self.workers(run.pid)[0], hurt)
                self.wait_until(run, lambda told=told: told in log.read_text())
            said = run.communicate(timeout=240)[0]
        assert run.returncode == 0, said
        assert died in said
        assert stands in said
        assert json.loads(Path("run/summary.json").read_text())["restarts"] == 2
        assert same_end(undisturbed, "run")
