"""The run's own files that grow with its messages: log.txt, metrics.jsonl and members.jsonl."""

from collections.abc import Mapping
from typing import Any

from trainer.messages import EpochEnded, MembersChanged, Message, Resumed, Status, WorkersLost
from trainer.report.lines import describe
from trainer.store.directory import MEMBERS, METRICS, RunDirectory, as_json


class LogSink:
    """Writes log.txt: what the terminal shows, and tracebacks."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on(self, message: Message) -> None:
        """Log the line that describes the message, if there is one."""
        if isinstance(message, WorkersLost):
            self._directory.log(message.detail)
        if line := message.text if isinstance(message, Status) else describe(message):
            self._directory.log(line)

    def close(self) -> None:
        """Every line is written at once: nothing to do."""


class MetricsSink:
    """Writes metrics.jsonl: a line per epoch."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on(self, message: Message) -> None:
        """Append an epoch; when the run resumes, delete the epochs after the checkpoint."""
        match message:
            case EpochEnded():
                self._directory.append(METRICS, as_json(message))
            case Resumed(phase=phase, step=step, names=names):
                index = {name: number for number, name in enumerate(names)}
                end = (phase, step + message.is_evaluated)

                def is_before(entry: Mapping[str, Any]) -> bool:
                    return (index[entry["phase"]], entry["step"]) < end

                self._directory.truncate(METRICS, is_before)

    def close(self) -> None:
        """Every line is written at once: nothing to do."""


class MembersSink:
    """Writes members.jsonl: a line per group of workers, in an elastic run."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on(self, message: Message) -> None:
        """Append a group; when the run resumes, delete groups that began after the checkpoint."""
        match message:
            case MembersChanged():
                self._directory.append(MEMBERS, as_json(message))
            case Resumed(phase=phase, step=step):
                end = (phase, step)
                self._directory.truncate(MEMBERS, lambda e: (e["phase"], e["step"]) <= end)

    def close(self) -> None:
        """Every line is written at once: nothing to do."""
