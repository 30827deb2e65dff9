"""summary.json and the table at the end: the run in a few numbers, gathered from its messages."""

import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from trainer.messages import Measured, Message, PhaseEnded, PhaseRecord, RunStarted
from trainer.report.directory import as_json


class Summary:
    """What is known of a run so far; complete enough to be written at any moment."""

    def __init__(self, name: str, seed: int, precision: str) -> None:
        self._started = time.monotonic()
        self._facts: dict[str, Any] = {"name": name, "seed": seed, "precision": precision}
        self.restarts = 0
        self.nodes: list[str] = []  # host name of each rank
        self.phases: list[PhaseRecord] = []
        self.tested: dict[str, Measured] = {}  # by name of the model
        self.result: dict[str, Any] = {}  # what the test set said

    def restore(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over the records of phases that ended earlier."""
        self.phases = [PhaseRecord(**record) for record in records]

    def on(self, message: Message) -> None:
        """Take in one message of the run."""
        match message:
            case RunStarted():
                self._facts |= {"device": message.device, "workers": message.workers}
            case PhaseEnded():
                self.phases.append(message.record)
            case Measured():
                self.tested[message.name] = message

    def as_dict(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The content of summary.json.

        Args:
            status: done, failed, interrupted or limits.
            error: one line, where the run did not end well.
        """
        speeds = [p.images_per_second for p in self.phases if p.images_per_second]
        return {
            **self._facts,
            "status": status,
            "error": error,
            "workers": self._facts.get("workers"),
            "nodes": self.nodes,
            "restarts": self.restarts,
            "seconds": round(time.monotonic() - self._started, 3),
            "images_per_second": statistics.harmonic_mean(speeds) if speeds else None,
            "accuracy": None,
            "loss": None,
            "baseline_accuracy": None,
            "phases": [as_json(p) for p in self.phases],
            **self.result,
        }


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """What the terminal shows of a finished run."""
    artifact = summary.get("artifact")
    compression = [stage_table(artifact), layer_table(artifact)] if artifact else []
    return [phase_table(summary), *compression]


def phase_table(summary: Mapping[str, Any]) -> Table:
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


def stage_table(artifact: Mapping[str, Any]) -> Table:
    """Bytes and test errors of each stage, beside the published ones where there are any."""
    result = Table(title=f"{artifact['path']}: test set", title_justify="left")
    result.add_column("stage")
    for title in ("bytes", "ratio", "error", "published ratio", "error"):
        result.add_column(title, justify="right", no_wrap=True)
    for stage in artifact["stages"]:
        published = stage["published"] or {}
        result.add_row(
            stage["name"],
            f"{stage['bytes']:,}",
            f"{stage['ratio']:.1f}x",
            f"{1 - stage['accuracy']:.2%}",
            f"{published['ratio']:g}x" if published.get("ratio") else "",
            f"{published['error']:.2%}" if published.get("error") else "",
        )
    return result


def layer_table(artifact: Mapping[str, Any]) -> Table:
    """What each tensor takes in the file."""
    result = Table()
    result.add_column("tensor")
    for title in ("values", "not zero", "kept", "bits", "bytes", "of the file"):
        result.add_column(title, justify="right", no_wrap=True)
    for layer in artifact["layers"]:
        result.add_row(
            layer["name"],
            f"{layer['weights']:,}",
            f"{layer['nonzero']:,}",
            f"{layer['nonzero'] / max(1, layer['weights']):.1%}",
            f"{layer['bits']:g}",
            f"{layer['bytes']:,}",
            f"{layer['bytes'] / artifact['bytes']:.1%}",
        )
    return result


def megabytes(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
