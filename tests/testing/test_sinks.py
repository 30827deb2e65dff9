"""The contract suite of sinks accepts the shipped ones and finds errors in others."""

import re
from functools import partial
from pathlib import Path

import pytest

from trainer.messages import Message, Progress
from trainer.report.sinks import CsvSink, ScalarSink
from trainer.report.sinks.mlflow import MlflowSink
from trainer.report.sinks.tensorboard import TensorBoardSink
from trainer.testing import check_sink

PAGE = (Path(__file__).parents[2] / "docs" / "own-sink.md").read_text()


@pytest.mark.parametrize("kind", [CsvSink, TensorBoardSink])
def test_shipped_sinks_keep_the_contract(kind) -> None:
    check_sink(kind)


@pytest.mark.integration
def test_the_sink_of_mlflow_keeps_the_contract(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_sink(partial(MlflowSink, name="mine", settings={"seed": 0}))


class Late(ScalarSink):
    """Takes no message that it does not know."""

    def on(self, message: Message) -> None:
        if not message.__class__.__module__.startswith("trainer.messages"):
            raise TypeError("what is this?")


class NoNan(ScalarSink):
    def log(self, step, values) -> None:
        for value in values.values():
            int(value)


class Once(CsvSink):
    def __init__(self, folder: Path) -> None:
        folder.joinpath("file").open("x").close()
        super().__init__(folder)


class NotClosed(CsvSink):
    def close(self) -> None:
        raise OSError("no space left")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda folder: Late(), r"run of a later version: on\(_FutureMessage"),
        (lambda folder: NoNan(), "on.*nan.*ValueError"),
        (Once, "interrupted run, resumed: building it: it raised FileExistsError"),
        (NotClosed, r"whole run: close\(\): it raised OSError: no space left"),
    ],
)
def test_broken_sinks_are_found(make, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check_sink(make)


def test_the_example_of_the_page(tmp_path, monkeypatch) -> None:
    module, check = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "notify.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    exec(check, {})
    from notify import AccuracyFile

    AccuracyFile(tmp_path).on(Progress("train", 1, 1, 5, 10, 0.5, 0.1, 9.0))
    assert not (tmp_path / "accuracy.txt").exists()
