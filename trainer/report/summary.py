"""summary.json: settings and results of a run, collected from its messages."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Mapping
from typing import Any

from trainer.config import Config
from trainer.messages import (
    Evaluated,
    Exported,
    MembersChanged,
    Message,
    PhaseEnded,
    PhaseRecord,
    Resumed,
    RunStarted,
    WorkersLost,
    WorkersStarted,
)
from trainer.metrics import metric_names
from trainer.report.cost import with_costs
from trainer.store.directory import as_json, from_json
from trainer.version import __version__


class SummarySink:
    """Collects the summary from the messages; `as_dict` can be called at any time."""

    def __init__(
        self,
        config: Config,
        command: str | None = None,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            command: The command line that started the run; None: it was started from Python.
            before: The summary that an earlier command of the same run left, if any.
        """
        self._started = time.monotonic()
        self._prices = config.cost
        self._before = before or {}
        self._earlier: Mapping[str, Any] | None = None  # time and restarts of earlier commands
        self._facts: dict[str, Any] = {
            "name": config.name,
            "seed": config.seed,
            "precision": config.precision,
            "command": self._before.get("command", command),
            "date": self._before.get("date", time.strftime("%Y-%m-%d %H:%M:%S")),
        }
        self._nodes: list[str] = []
        self._restarts = 0  # of this command
        self._members: list[dict[str, Any]] = []  # groups of workers of an elastic run
        self.phases: list[PhaseRecord] = []
        self.evaluated: dict[str, Evaluated] = {}  # by name of the model
        self._exported: dict[str, dict[str, Any]] = {}  # by name of the model
        self.result: dict[str, Any] = {}  # entries that depend on the test set

    def progress(self) -> dict[str, Any]:
        """Time and restarts over all commands of the run, as stored in checkpoints."""
        earlier = self._before if self._earlier is None else self._earlier
        seconds = earlier.get("seconds", 0.0) + time.monotonic() - self._started
        restarts = earlier.get("restarts", 0) + self._restarts
        return {"restarts": restarts, "seconds": round(seconds, 3)}

    def on(self, message: Message) -> None:
        """Take one message of the run."""
        match message:
            case WorkersStarted():
                self._nodes = message.nodes
            case WorkersLost():
                self._restarts += message.counted
            case MembersChanged():
                self._members.append(as_json(message))
            case Resumed():
                self._restore(message)
            case RunStarted():
                self._facts |= {
                    "device": message.device,
                    "workers": message.workers,
                    "sequence_targets": message.sequence_targets,
                    "task": {"name": message.task, "metrics": dict(message.directions)},
                    "samples": {
                        "train": message.train,
                        "validation": message.validation,
                        "test": message.test,
                    },
                }
            case PhaseEnded():
                self.phases.append(message.record)
            case Evaluated():
                self.evaluated[message.name] = message
            case Exported():
                facts = as_json(message)
                del facts["content"]
                self._exported[message.name] = facts

    def close(self) -> None:
        """Nothing to do: the driver writes what `as_dict` returns."""

    def _restore(self, message: Resumed) -> None:
        members = self._before.get("members", []) if self._earlier is None else self._members
        end = (message.phase, message.step)
        self._members = [one for one in members if (one["phase"], one["step"]) <= end]
        self.phases = [from_json(PhaseRecord, record) for record in message.records]
        if self._earlier is None:
            # The progress stored in the checkpoint is that of earlier commands. Their last summary
            # may have counted more, after that checkpoint. Later it is this command's own.
            both = (message.progress, self._before)
            self._earlier = {
                key: max(one.get(key, 0) for one in both) for key in ("seconds", "restarts")
            }

    def as_dict(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The content of summary.json.

        Args:
            status: One of done, failed, interrupted or limits.
            error: One line, if the run did not succeed.
        """
        metrics = metric_names(self._facts)
        found = {
            **self._facts,
            "status": status,
            "error": error,
            "workers": self._facts.get("workers"),
            "nodes": self._nodes,
            **self.progress(),
            "versions": {
                "trainer": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "ray")},
            },
            "images_per_second": self._speed(),
            **dict.fromkeys([*metrics, "loss", *(f"baseline_{name}" for name in metrics)]),
            "baseline_loss": None,
            "phases": [as_json(p) for p in self.phases],
            **self.result,
            **({"members": self._members} if self._members else {}),
            **({"onnx": [*self._exported.values()]} if self._exported else {}),
        }
        return with_costs(found, self._prices)

    def _speed(self) -> float | None:
        """Samples per second of training over all phases, whose batches have the same size."""
        timed = [(p.images_per_second, p.steps) for p in self.phases if p.images_per_second]
        return statistics.harmonic_mean(*zip(*timed, strict=True)) if timed else None
