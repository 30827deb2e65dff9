"""summary.json: the run in a few numbers, gathered from its messages."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.messages import Converted, Measured, Message, PhaseEnded, PhaseRecord, RunStarted
from trainer.store.directory import as_json
from trainer.version import __version__


class Summary:
    """What is known of a run so far; complete enough to be written at any moment."""

    def __init__(
        self, name: str, seed: int, precision: str, before: Mapping[str, Any] | None = None
    ) -> None:
        """Args: before: the summary that an earlier command of the run left, if any."""
        self._started = time.monotonic()
        self._before = before or {}
        self._earlier: Mapping[str, Any] | None = None  # `so_far` of the commands before this one
        self._facts: dict[str, Any] = {"name": name, "seed": seed, "precision": precision}
        self.restarts = 0  # of this command
        self.nodes: list[str] = []  # host name of each rank
        self.phases: list[PhaseRecord] = []
        self.tested: dict[str, Measured] = {}  # by name of the model
        self.converted: dict[str, dict[str, Any]] = {}  # likewise, the facts of its ONNX file
        self.result: dict[str, Any] = {}  # what the test set said

    def restore(self, records: Iterable[Mapping[str, Any]], so_far: Mapping[str, Any]) -> None:
        """Take over the records of phases that ended earlier.

        Args:
            so_far: as the checkpoint holds it. The first time it is of the commands before this
                one, whose time and restarts count too, as do those after that checkpoint; later
                it is this one's own.
        """
        self.phases = [PhaseRecord(**record) for record in records]
        if self._earlier is None:
            both = (so_far, self._before)
            self._earlier = {
                key: max(one.get(key, 0) for one in both) for key in ("seconds", "restarts")
            }

    def so_far(self) -> dict[str, Any]:
        """Time and restarts of all commands of the run: what a checkpoint keeps of them."""
        earlier = self._before if self._earlier is None else self._earlier
        seconds = earlier.get("seconds", 0.0) + time.monotonic() - self._started
        restarts = earlier.get("restarts", 0) + self.restarts
        return {"restarts": restarts, "seconds": round(seconds, 3)}

    def on(self, message: Message) -> None:
        """Take in one message of the run."""
        match message:
            case RunStarted():
                self._facts |= {"device": message.device, "workers": message.workers}
            case PhaseEnded():
                self.phases.append(message.record)
            case Measured():
                self.tested[message.name] = message
            case Converted():
                facts = as_json(message)
                del facts["content"]
                self.converted[message.name] = facts

    def as_dict(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The content of summary.json.

        Args:
            status: done, failed, interrupted or limits.
            error: one line, where the run did not end well.
        """
        return {
            **self._facts,
            "status": status,
            "error": error,
            "workers": self._facts.get("workers"),
            "nodes": self.nodes,
            **self.so_far(),
            "versions": {
                "trainer": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "ray")},
            },
            "images_per_second": self._speed(),
            "accuracy": None,
            "loss": None,
            "baseline_accuracy": None,
            "baseline_loss": None,
            "phases": [as_json(p) for p in self.phases],
            **self.result,
            **({"onnx": [*self.converted.values()]} if self.converted else {}),
        }

    def _speed(self) -> float | None:
        """Samples per second of training, over all phases; their steps take as many samples."""
        timed = [(p.images_per_second, p.steps) for p in self.phases if p.images_per_second]
        return statistics.harmonic_mean(*zip(*timed, strict=True)) if timed else None
