"""Sinks: the output of each for the messages of a run."""

import csv
import dataclasses
import json
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.report.test_report import CONFIG, MESSAGES, RECORD
from trainer.messages import EpochEnded, Resumed, WorkersLost
from trainer.report.sinks import CsvSink, MetricsSink
from trainer.report.sinks.tensorboard import TensorBoardSink
from trainer.report.summary import SummarySink
from trainer.store.directory import METRICS, RunDirectory

NAMES = ["train", "prune"]
BEGINNING = Resumed(0, 0, NAMES, [], {})
LOST = WorkersLost("worker 1 died", "traceback", 1)


def resumed(**progress: float) -> Resumed:
    return dataclasses.replace(BEGINNING, progress=progress)


def test_seconds_and_restarts_are_of_all_commands() -> None:
    summary = SummarySink(CONFIG)
    summary.on(resumed(seconds=100.0, restarts=2))
    summary.on(LOST)
    done = summary.as_dict("done")
    assert done["restarts"] == 3
    assert 100 <= done["seconds"] < 110
    summary.on(resumed(**summary.progress()))  # its own checkpoint, after the restart
    assert summary.as_dict("done")["restarts"] == 3
    assert summary.as_dict("done")["seconds"] < 110


def test_restarts_and_seconds_after_the_last_checkpoint_count_too() -> None:
    before = {"seconds": 150.0, "restarts": 5, "status": "failed", "date": "then", "command": "c"}
    summary = SummarySink(CONFIG, "another command", before)
    assert summary.as_dict("interrupted")["restarts"] == 5  # before it has resumed
    summary.on(resumed(seconds=100.0, restarts=2))
    done = summary.as_dict("done")
    assert done["restarts"] == 5
    assert 150 <= done["seconds"] < 160
    assert (done["date"], done["command"]) == ("then", "c")


def test_the_speed_is_that_of_all_steps() -> None:
    summary = SummarySink(CONFIG)
    summary.phases = [
        dataclasses.replace(RECORD, steps=steps, images_per_second=speed)
        for steps, speed in ((20, 1000.0), (1, 100.0), (0, None))
    ]
    assert summary.as_dict("done")["images_per_second"] == pytest.approx(21 / (20 / 1000 + 1 / 100))


def test_the_summary_is_complete_at_any_moment() -> None:
    summary = SummarySink(CONFIG, "python -m trainer +experiment=mine")
    early = summary.as_dict("failed", "worker 1 died")
    assert early["status"] == "failed"
    assert early["error"] == "worker 1 died"
    assert early["accuracy"] is None
    assert early["phases"] == []
    for message in MESSAGES:
        summary.on(message)
    assert summary.evaluated["dense"].accuracy == 0.96
    summary.result = {"accuracy": 0.96, "loss": 0.12}
    done = summary.as_dict("done")
    assert set(early) | {"device", "samples", "sequence_targets", "task"} == set(done)
    facts = {"name": "mine", "seed": 3, "precision": "bf16", "workers": 2, "restarts": 0}
    assert {key: done[key] for key in facts} == facts
    assert (done["accuracy"], done["loss"]) == (0.96, 0.12)
    assert done["command"] == "python -m trainer +experiment=mine"
    assert done["phases"][0]["sent_bytes_per_step"] == 4000
    json.dumps(done)


def feed(sink: Any) -> None:
    """Two phases, after a worker was lost before there was a checkpoint."""
    sink.on(BEGINNING)
    sink.on(MESSAGES[2])
    sink.on(BEGINNING)
    for message in [*MESSAGES[:-1], *MESSAGES[1:]]:
        sink.on(message)
    sink.close()


def test_tensorboard_counts_steps_over_all_phases(tmp_path) -> None:
    feed(TensorBoardSink(tmp_path))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("epoch/validation_loss")
    assert [(e.step, round(e.value, 6)) for e in losses] == [
        (10, 0.2), (20, 0.1), (30, 0.2), (40, 0.1)
    ]  # fmt: skip
    assert [e.step for e in events.Scalars("train/loss")] == [5, 25]
    assert [e.step for e in events.Scalars("test/dense_accuracy")] == [40]


def test_csv_holds_the_same_curves_and_forgets_what_a_restart_repeats(tmp_path) -> None:
    feed(CsvSink(tmp_path))
    path = tmp_path / "curves.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [(row["step"], row["value"]) for row in rows if row["name"] == "train/loss"]
    assert losses == [("5", "0.5"), ("25", "0.5")]
    with path.open("a") as file:
        file.write("26,trai")  # a driver was killed
    again = CsvSink(tmp_path)
    again.on(dataclasses.replace(BEGINNING, phase=1, step=5, records=[{"steps": 20}]))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(int(row["step"]) for row in rows) == 25


def test_metrics_beyond_the_point_of_resumption_are_deleted(tmp_path) -> None:
    directory = RunDirectory(tmp_path)
    sink = MetricsSink(directory)
    for phase, step in (("train", 10), ("train", 20), ("prune", 10), ("prune", 20)):
        sink.on(
            EpochEnded(phase, 1, step, 0.3, 0.2, {"accuracy": 0.95}, 0.1, 0.0, 500.0, skipped=0)
        )
    sink.on(dataclasses.replace(BEGINNING, phase=1, step=10))

    def left() -> list[tuple[str, int]]:
        return [(entry["phase"], entry["step"]) for entry in directory.entries(METRICS)]

    assert left() == [("train", 10), ("train", 20), ("prune", 10)]
    sink.on(dataclasses.replace(BEGINNING, phase=1, step=10, is_evaluated=False))
    assert left() == [("train", 10), ("train", 20)]
