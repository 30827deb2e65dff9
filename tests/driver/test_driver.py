"""The driver of a run: failures of the group of workers, and finished runs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.cluster import InsufficientResources, WorkerFailed
from trainer.cluster.inline import InlineGroup
from trainer.errors import RunError
from trainer.messages import HeadLost, HeadRecovered, PhaseStarted
from trainer.store.directory import RunDirectory

ARGUMENTS = [
    *("+experiment=lenet300", "cluster=inline", "cluster.threads=1", "hydra.run.dir=run"),
    *("data.train=64", "data.validation=32", "data.test=32", "phases.train.fit.epochs=1"),
]


pytestmark = pytest.mark.usefixtures("elsewhere")


def summary():
    return json.loads(Path("run/summary.json").read_text())


def loses_its_worker(self, body, *args):
    raise WorkerFailed(0, "here", "the process died", "")
    yield


def test_a_worker_that_is_lost_after_a_request_to_stop_interrupts_the_run(monkeypatch):
    def run(self, body, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        assert self.stop_requested.is_set()
        yield from loses_its_worker(self, body)

    monkeypatch.setattr(InlineGroup, "run", run)
    assert main(ARGUMENTS) == 143
    assert (summary()["status"], summary()["restarts"]) == ("interrupted", 0)


def test_a_wrong_experiment_is_refused_before_a_worker_starts(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(InlineGroup, "start", started.append)
    assert main([*ARGUMENTS, "phases.train.fit.distill.weight=0.5"]) == 2
    shown = capsys.readouterr()
    assert "there is no dense model to learn from before this phase" in shown.err
    assert "worker" not in shown.out
    assert not started
    assert not Path("run").exists()


def test_a_request_to_stop_during_a_restart_interrupts_the_run(monkeypatch):
    def restart(self):
        os.kill(os.getpid(), signal.SIGINT)
        raise RunError("the group was asked to stop before it had started")

    monkeypatch.setattr(InlineGroup, "run", loses_its_worker)
    monkeypatch.setattr(InlineGroup, "restart", restart)
    assert main(ARGUMENTS) == 130
    assert summary()["status"] == "interrupted"


def test_a_restart_without_resources_is_not_repeated(monkeypatch, capsys):
    tried = []

    def restart(self):
        tried.append(True)
        raise InsufficientResources(
            "no room for cluster.workers=1 within cluster.start_timeout_s=60"
        )

    monkeypatch.setattr(InlineGroup, "run", loses_its_worker)
    monkeypatch.setattr(InlineGroup, "restart", restart)
    assert main(ARGUMENTS) == 1
    assert "no room for cluster.workers=1" in capsys.readouterr().err
    assert tried == [True]


def loses_its_head(monkeypatch, *messages, seen):
    """Let the group yield `messages` when a phase has begun; note the status after each."""
    run = InlineGroup.run

    def run_with(self, function, *args):
        for message in run(self, function, *args):
            yield message
            if isinstance(message, PhaseStarted):
                for more in messages:
                    yield more
                    seen.append(summary()["status"] if Path("run/summary.json").exists() else None)

    monkeypatch.setattr(InlineGroup, "run", run_with)


def test_a_run_that_ends_although_the_head_is_lost_is_done(monkeypatch, capsys):
    """Ray may end the driver at any moment, so the summary is written when the head is lost."""
    seen = []
    lost = HeadLost("10.0.0.5:6379", time.monotonic() + 1000)
    loses_its_head(monkeypatch, lost, HeadRecovered("10.0.0.5:6379"), lost, seen=seen)
    assert main(ARGUMENTS) == 0
    assert seen == ["failed", None, "failed"]
    assert summary()["status"] == "done"
    shown = capsys.readouterr().out
    assert "the head node of the Ray cluster at 10.0.0.5:6379 does not answer" in shown
    assert "the head node at 10.0.0.5:6379 answers again" in shown
    assert "resume with: python -m trainer resume=" in shown


def test_a_head_that_stays_lost_stops_the_run_with_a_checkpoint(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        loses_its_head(patch, HeadLost("10.0.0.5:6379", time.monotonic() - 1), seen=[])
        assert main([*ARGUMENTS, "phases.train.fit.epochs=3"]) == 1
    assert summary()["status"] == "failed"
    assert "10.0.0.5:6379 does not answer" in summary()["error"]
    assert list(Path("run/checkpoints").glob("01-train-step-*"))
    assert "resume with: python -m trainer resume=" in capsys.readouterr().out
    assert main(["resume=run"]) == 0


def test_a_page_that_fails_does_not_fail_the_run(monkeypatch, capsys):
    def broken(*arguments):
        raise ArithmeticError("no such plot")

    monkeypatch.setattr("trainer.driver.report.page", broken)
    assert main(ARGUMENTS) == 0
    assert "report.html could not be written: no such plot" in capsys.readouterr().out
    assert "raise ArithmeticError" in Path("run/log.txt").read_text()
    assert summary()["status"] == "done"


def test_a_finished_run_in_a_folder_that_cannot_be_written_shows_its_summary(monkeypatch, capsys):
    assert main(ARGUMENTS) == 0

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trainer.store.directory.atomic_write", refuse)
    capsys.readouterr()
    assert main(["resume=run"]) == 0
    assert "test set" in capsys.readouterr().out


@pytest.mark.slow
def test_done_is_not_on_disk_before_the_limits_are_applied(monkeypatch):
    statuses = []
    write = RunDirectory.write_summary

    def watched(self, content):
        statuses.append(content["status"])
        write(self, content)

    monkeypatch.setattr(RunDirectory, "write_summary", watched)
    limits = ["artifact.make=true", "limits.min_ratio=1e6"]
    assert main([*ARGUMENTS, *limits]) == 3
    assert statuses == ["limits"]
    assert main(["resume=run"]) == 3  # nothing has changed
    assert statuses == ["limits"]
    assert main(["resume=run", "limits.min_ratio=0.1"]) == 0
    assert statuses == ["limits", "done"]


@pytest.mark.slow
def test_equal_runs_leave_files_with_the_same_bytes():
    """The time that a phase took is stored in checkpoints, but not in the files for users."""
    arguments = [*ARGUMENTS, "artifact.make=true"]
    assert main(arguments) == 0
    assert main([*arguments, "hydra.run.dir=again"]) == 0
    for name in ("model.safetensors", "model.dcz"):
        assert Path("run", name).read_bytes() == Path("again", name).read_bytes()


@pytest.mark.slow
def test_files_that_an_interrupted_end_left_out_are_written_later():
    assert main(ARGUMENTS) == 0
    weights, page = Path("run/model.safetensors"), Path("run/report.html")
    content = weights.read_bytes()
    page.unlink()
    assert main(["resume=run"]) == 0  # it is done, but for the page
    assert page.exists()
    weights.write_bytes(b"of an earlier phase")
    RunDirectory(Path("run")).write_summary({**summary(), "status": "failed"})
    assert main(["resume=run"]) == 0
    assert weights.read_bytes() == content


def test_a_folder_in_which_nothing_can_be_written_is_not_left_behind(monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.store.directory.atomic_write", full)
    assert main(ARGUMENTS) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not Path("run").exists()
