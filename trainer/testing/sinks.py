"""The contract of a sink (trainer.report.sinks.Sink): it takes every message of any kind of run."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.messages import (
    STEP_COUNTED,
    Checkpoint,
    EpochEnded,
    Evaluated,
    Exported,
    MembersChanged,
    Message,
    Notice,
    PhaseEnded,
    PhaseRecord,
    PhaseStarted,
    Progress,
    Resumed,
    RoundEnded,
    RoundRecord,
    RunEnded,
    RunStarted,
    RunStopped,
    Status,
    WorkersLost,
    WorkersStarted,
)
from trainer.report.sinks import Sink

_NAMES = ["train", "prune"]
_STEPS = 20  # of each phase
_NAN = float("nan")


@dataclass(frozen=True)
class _FutureMessage:
    """A kind of message that does not exist yet."""


def check_sink(make: Callable[[Path], Sink]) -> None:
    """Check that a sink takes the messages of whole, restarted, resumed and failed runs.

    A sink must ignore messages that it does not know, accept losses that are NaN, and be able to
    continue in a run directory in which an earlier sink of its class has recorded.

    Args:
        make: Builds the sink for a run directory.

    Raises:
        AssertionError: The sink raised an exception; the text names the run and the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, messages in _runs():
            path = Path(folder) / name.split(",")[0].replace(" ", "-")
            path.mkdir(exist_ok=True)
            sink = _try(f"{name}: building it", make, path)
            for message in messages:
                _try(f"{name}: on({message!r})", sink.on, message)
            _try(f"{name}: close()", sink.close)


def _runs() -> Iterator[tuple[str, list[Any]]]:
    """Kinds of runs: their title, whose part before a comma names the folder, and messages."""
    yield "whole run", [*_start(), *_phase(0), *_phase(1), *_end()]
    lost = WorkersLost("worker 1 died", "traceback", 1)
    resumed = Resumed(0, 10, _NAMES, [], {"seconds": 1.0, "restarts": 0})
    cut = _phase(0)[:4]
    yield "lost worker", [*_start(), *cut, lost, resumed, *_phase(0)[3:], *_phase(1), *_end()]
    shrunk = WorkersLost("worker 1 died", "traceback", 1, elastic=True)
    later = Resumed(0, 10, _NAMES, [], {"seconds": 1.0, "restarts": 0}, is_evaluated=False)
    group = MembersChanged(
        0, 10, STEP_COUNTED, 1, ["here"], 0, "worker 1 died", 0.3, "2026-01-01T00:00:00+0000"
    )
    changed = [shrunk, later, RunStarted(1, "cpu", 1000, 640, 64, 64, (_STEPS, _STEPS)), group]
    yield "elastic run", [*_start(), *cut, *changed, *_phase(0)[2:], *_phase(1), *_end()]
    yield "interrupted run", [*_start(), *cut, RunStopped(), RunEnded(_summary("interrupted"))]
    yield "interrupted run, resumed", [*_start(resumed), *_phase(0)[3:], *_phase(1), *_end()]
    yield "run that fails at once", [Notice("run directory"), RunEnded(_summary("failed"))]
    diverged = Progress("train", 1, 2, 5, _STEPS, _NAN, 0.1, 9.0)
    yield "diverged run", [*_start(), diverged, RunEnded(_summary("failed"))]
    yield "run of a later version", [*_start(), _FutureMessage(), RunEnded(_summary("done"))]


def _start(resumed: Resumed | None = None) -> list[Message]:
    return [
        Notice("run directory: ..."),
        Status("starting 2 workers"),
        WorkersStarted(["here", "there"]),
        resumed or Resumed(0, 0, _NAMES, [], {}),
        RunStarted(2, "cpu", 1000, 640, 64, 64, (_STEPS, _STEPS)),
    ]


def phase_record(name: str) -> PhaseRecord:
    """The record of a finished phase."""
    return PhaseRecord(
        name=name,
        kind=name,
        seconds=2.5,
        steps=_STEPS,
        train_loss=0.25,
        metrics={"accuracy": 0.975},
        loss=0.1,
        parameters=1000,
        learnable=1000,
        nonzero=80,
        sparsity=0.92,
        sent_bytes_per_step=4000,
        images_per_second=512.0,
    )


def _phase(index: int) -> list[Message]:
    name = _NAMES[index]
    return [
        PhaseStarted(index, name, name, 2, _STEPS, 1000, 0.0),
        Progress(name, 1, 2, 5, _STEPS, 0.5, 0.1, 9.0),
        EpochEnded(name, 1, 10, 0.3, 0.2, {"accuracy": 0.95}, 0.1, 0.0, 500.0, 0),
        Checkpoint(index, 10, b"state"),
        RoundEnded(name, RoundRecord(1, 0.5, {"accuracy": 0.97}, 0.1, True, "")),
        EpochEnded(name, 2, _STEPS, 0.25, 0.1, {"accuracy": 0.975}, 0.0, 0.92, 512.0, 3),
        PhaseEnded(index, phase_record(name), b"weights"),
    ]


def _end() -> list[Message]:
    return [
        Evaluated("dense", {"accuracy": 0.96}, 0.12),
        Evaluated("P+S+H (Han's format)", {"accuracy": 0.95}, _NAN),
        Exported("fp32", 4000, {"accuracy": 0.96}, {"accuracy": 0.96}, 1e-6, {"1": 0.2}, b"onnx"),
        RunEnded(_summary("done")),
    ]


def _summary(status: str) -> dict[str, Any]:
    done = status == "done"
    return {
        "name": "example",
        "seed": 0,
        "status": status,
        "error": None if done else "what happened",
        "precision": "fp32",
        "workers": 2,
        "restarts": 0,
        "seconds": 12.5,
        "accuracy": 0.96 if done else None,
        "loss": 0.12 if done else None,
        "phases": [],
    }


def _try(step: str, call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except Exception as error:
        raise AssertionError(f"{step}: it raised {type(error).__name__}: {error}") from error
