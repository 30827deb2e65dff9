"""Weights & Biases and MLflow: the records of a run, read back in their own formats."""

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.test_report import CONFIG
from tests.report.test_sinks import BEGINNING, feed
from trainer.messages import Evaluated, RunEnded
from trainer.report.sinks.mlflow import MlflowSink
from trainer.report.sinks.wandb import WandbSink

SETTINGS = dataclasses.asdict(CONFIG)
ENDED = RunEnded({"status": "done", "accuracy": 0.96, "loss": 0.12})
BLOCK = 32768


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of an offline run: LevelDB's log format after a header of seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # padding at the end of a block
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def wandb_run(folder: Path) -> tuple[list[dict[str, float]], dict[str, object], set[str]]:
    """Rows of the curves, the summary, and the ids of all offline runs in a run directory."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, summary, ids = [], {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path):
            record = Record.FromString(content)
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
            if record.HasField("run"):
                ids.add(record.run.run_id)
            for item in record.summary.update if record.HasField("summary") else ():
                summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return rows, summary, ids


@pytest.mark.integration  # wandb starts a process of its own
def test_wandb_offline_holds_the_curves_and_a_resumed_run_keeps_its_id(tmp_path) -> None:
    for _ in range(2):
        sink = WandbSink(tmp_path, "mine", SETTINGS, mode="offline")
        feed_open(sink)
        sink.on(ENDED)
        sink.close()
    rows, summary, ids = wandb_run(tmp_path)
    assert len(ids) == 1
    assert {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row} == {
        5: 0.5,
        25: 0.5,
    }
    assert summary["status"] == "done"
    assert summary["accuracy"] == 0.96


def feed_open(sink: WandbSink | MlflowSink) -> None:
    """As `feed`, but the sink stays open."""
    close, sink.close = sink.close, lambda: None  # type: ignore[method-assign]
    feed(sink)
    sink.close = close  # type: ignore[method-assign]


@pytest.mark.slow
def test_mlflow_holds_parameters_curves_and_files_and_continues_a_resumed_run(
    tmp_path, monkeypatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 3\n")
    for _ in range(2):
        sink = MlflowSink(folder, "mine", {**SETTINGS, "odd+key": {"a=b": 1}}, group="sweep")
        feed(sink)
        sink.on(Evaluated("P+S", metrics={"accuracy": 0.9}, loss=0.3))
        sink.on(ENDED)
        sink.close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    found = client.get_experiment_by_name("trainer")
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "3"
    assert run.data.params["odd_key.a_b"] == "1"
    assert run.data.params["phases.train.fit.epochs"]
    assert run.data.tags["group"] == "sweep"
    assert run.data.metrics["test/P_S_accuracy"] == 0.9
    assert {m.step for m in client.get_metric_history(run.info.run_id, "train/loss")} == {5, 25}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


@pytest.mark.slow
def test_a_run_that_failed_is_not_finished_in_mlflow(tmp_path, monkeypatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'own.db'}"
    for status, expected in (("failed", "FAILED"), ("interrupted", "KILLED")):
        sink = MlflowSink(tmp_path, "mine", SETTINGS, experiment="own", tracking_uri=uri)
        sink.on(BEGINNING)
        sink.on(RunEnded({**ENDED.summary, "status": status}))
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("own").experiment_id])
        assert run.info.status == expected
