"""Summary, tables and files of a run, from messages without training."""

import errno
import io
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from tests.experiments import experiment
from trainer.errors import ConfigError, RunError
from trainer.messages import (
    EpochEnded,
    Evaluated,
    PhaseEnded,
    PhaseStarted,
    Progress,
    RunStarted,
)
from trainer.report.summary import SummarySink
from trainer.report.table import rich_table
from trainer.report.tables import phases
from trainer.store.directory import METRICS, RunDirectory
from trainer.testing.sinks import phase_record

RECORD = phase_record("train")
CONFIG = experiment(name="mine", seed=3, precision="bf16").config
MESSAGES = [
    RunStarted(workers=2, device="cpu", parameters=1000, train=640, validation=64, test=64),
    PhaseStarted(
        index=0, name="train", kind="train", epochs=2, steps=20, learnable=1000, sparsity=0.0
    ),
    Progress("train", epoch=1, epochs=2, step=5, steps=20, loss=0.5, lr=0.1, images_per_second=9.0),
    EpochEnded("train", 1, 10, 0.3, 0.2, {"accuracy": 0.95}, 0.1, 0.0, 500.0, skipped=3),
    EpochEnded("train", 2, 20, 0.25, 0.1, {"accuracy": 0.975}, 0.0, 0.92, 512.0, skipped=0),
    PhaseEnded(index=0, record=RECORD, weights=b""),
    Evaluated("dense", metrics={"accuracy": 0.96}, loss=0.12),
]


def test_the_table_shows_every_phase_and_the_test_error():
    summary = SummarySink(CONFIG)
    for message in MESSAGES:
        summary.on(message)
    out = Terminal(file=io.StringIO(), width=120)
    summary.result = {"accuracy": 0.96, "loss": 0.12}
    out.print(rich_table(phases(summary.as_dict("done")), 120))
    text = out.file.getvalue()
    for part in ("mine: done", "train", "97.50%", "8.0%", "4 kB", "error 4.00%"):
        assert part in text


def test_a_taken_name_gets_a_suffix_and_discard_removes_what_was_made(tmp_path):
    wanted = tmp_path / "outputs" / "mine" / "now"
    first = RunDirectory.claim(wanted)
    second = RunDirectory.claim(wanted)
    third = RunDirectory.claim(wanted)
    assert [d.path.name for d in (first, second, third)] == ["now", "now-2", "now-3"]
    third.write_config({"a": 1})
    third.discard()
    second.discard()
    assert [p.name for p in wanted.parent.iterdir()] == ["now"]
    first.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_wrong_configuration(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"file/run cannot be created: Not a directory; choose another with hydra"
    ):
        RunDirectory.claim(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"cannot be created: File name too long; choose"):
        RunDirectory.claim(tmp_path / ("x" * 300) / "run")


def test_files_appear_whole(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_model(b"model")
    directory.append(METRICS, {"a": 1, "loss": float("nan")})
    directory.append(METRICS, {"a": 2})
    assert (tmp_path / "model.safetensors").read_bytes() == b"model"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"a": 1, "loss": null}\n{"a": 2}\n'
    assert not list(tmp_path.glob("**/*.part"))


def test_metrics_are_cut_back_and_a_torn_line_goes(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in range(4):
        directory.append(METRICS, {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "los')
    directory.truncate(METRICS, lambda entry: entry["step"] < 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_two_drivers_do_not_share_a_run(tmp_path):
    directory, said = RunDirectory(tmp_path), []
    directory.write_config({})
    with (
        directory.locked(said.append),
        pytest.raises(RunError, match="another process"),
        RunDirectory(tmp_path).locked(said.append),
    ):
        pass
    assert said == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    directory, said = RunDirectory(tmp_path), []
    directory.write_config({})

    def flock(file, operation):
        assert file.writable()  # NFS locks no others
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with directory.locked(said.append):
        pass
    assert "No locks available" in said[0]


def test_a_url_is_not_a_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=s3://bucket/run: .* not to a URL"):
        RunDirectory.claim(Path("s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []
    RunDirectory.claim(Path("run:7"))  # an ordinary name


def test_a_disk_that_gets_full_keeps_the_old_file_and_nothing_half_written(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_config({"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        directory.write_config({"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert directory.read_config() == {"a": 1}


@pytest.mark.parametrize("folder", [".", "", "/"])
def test_a_run_needs_a_folder_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="folder for this run alone"):
        RunDirectory.claim(Path(folder))
