"""summary.json and the table at the end: the run in a few numbers, gathered from its messages."""

import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from trainer.messages import Message, PhaseEnded, PhaseRecord, RunEnded, RunStarted
from trainer.report.directory import as_json


class Summary:
    """What is known of a run so far; complete enough to be written at any moment."""

    def __init__(self, name: str, seed: int, precision: str) -> None:
        self._started = time.monotonic()
        self._facts: dict[str, Any] = {"name": name, "seed": seed, "precision": precision}
        self.restarts = 0
        self.nodes: list[str] = []  # host name of each rank
        self._phases: list[PhaseRecord] = []
        self._test: RunEnded | None = None

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over the records of phases that ended earlier."""
        self._phases = [PhaseRecord(**record) for record in records]

    def on(self, message: Message) -> None:
        """Take in one message of the run."""
        match message:
            case RunStarted():
                self._facts |= {"device": message.device, "workers": message.workers}
            case PhaseEnded():
                self._phases.append(message.record)
            case RunEnded():
                self._test = message

    def as_dict(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The content of summary.json.

        Args:
            status: done, failed, interrupted or limits.
            error: one line, where the run did not end well.
        """
        speeds = [p.images_per_second for p in self._phases if p.images_per_second]
        return {
            **self._facts,
            "status": status,
            "error": error,
            "workers": self._facts.get("workers"),
            "nodes": self.nodes,
            "restarts": self.restarts,
            "seconds": round(time.monotonic() - self._started, 3),
            "images_per_second": statistics.harmonic_mean(speeds) if speeds else None,
            "accuracy": self._test.accuracy if self._test else None,
            "loss": self._test.loss if self._test else None,
            "phases": [as_json(p) for p in self._phases],
        }


def table(summary: dict[str, Any]) -> Table:
    """The phases of a summary, a row each, and the test result; loss and accuracy on validation."""
    result = Table(title=f"{summary['name']}: {summary['status']}", title_justify="left")
    result.add_column("phase")
    for title in ("steps", "loss", "accuracy", "not zero", "kept", "sent/step", "samples/s", "s"):
        result.add_column(title, justify="right", no_wrap=True)
    for phase in summary["phases"]:
        trained = phase["images_per_second"]
        result.add_row(
            phase["name"],
            f"{phase['steps']:,}",
            f"{phase['loss']:.4f}",
            f"{phase['accuracy']:.2%}",
            f"{phase['nonzero']:,}",
            f"{phase['nonzero'] / phase['parameters']:.1%}",
            megabytes(phase["sent_bytes_per_step"]) if phase["sent_bytes_per_step"] else "",
            f"{trained:,.0f}" if trained else "",
            f"{phase['seconds']:.1f}",
        )
    if summary["accuracy"] is not None:
        result.caption = (
            f"test set: {summary['accuracy']:.2%} correct, error {1 - summary['accuracy']:.2%}, "
            f"loss {summary['loss']:.4f}"
        )
        result.caption_justify = "left"
    return result


def megabytes(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
