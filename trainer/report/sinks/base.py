"""Sinks receive the messages of a run: their protocol, and a base class for sinks of curves."""

from collections.abc import Mapping
from typing import Protocol

from trainer.messages import EpochEnded, Evaluated, Message, PhaseEnded, Progress, Resumed


class Sink(Protocol):
    """Receives everything that a run reports.

    Sinks besides the run's own files are chosen by `logger`: by the name of a file in conf/logger,
    or by any `_target_`. A target is called with its settings and with those of these arguments
    that it accepts: `folder` (pathlib.Path of the run directory), `name` (title of the run),
    `settings` (all settings as plain values) and `group` (name of the sweep that the run is a trial
    of, or None).
    """

    def on(self, message: Message) -> None:
        """Take one message (trainer.messages). Called in the driver process, in order."""

    def close(self) -> None:
        """Write what is still in memory. Called once at the end, also after a failure."""


class ScalarSink:
    """Base of sinks that record curves: turns messages into named values at steps of the run.

    Steps are counted over all phases. A subclass implements `log`, and `rewind` if it can delete
    what it has recorded.
    """

    def __init__(self) -> None:
        self._steps_before = 0  # steps of the phases that ended

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step of the run."""
        raise NotImplementedError

    def rewind(self, step: int) -> None:
        """Prepare for the step after `step`: values recorded for later steps are invalid.

        Called before the first `log`, with 0 at the beginning of a run.
        """

    def on(self, message: Message) -> None:
        """Take one message of the run."""
        match message:
            case Resumed():
                self._steps_before = message.steps_before
                self.rewind(message.steps_before + message.step)
            case Progress():
                values = {"train/loss": message.loss, "train/lr": message.lr}
                self.log(self._steps_before + message.step, values)
            case EpochEnded():
                self.log(
                    self._steps_before + message.step,
                    {
                        "epoch/train_loss": message.train_loss,
                        "epoch/validation_loss": message.loss,
                        **{f"epoch/validation_{k}": v for k, v in message.metrics.items()},
                        "epoch/sparsity": message.sparsity,
                        "epoch/samples_per_second": message.images_per_second,
                    },
                )
            case PhaseEnded():
                self._steps_before += message.record.steps
            case Evaluated():
                name = f"test/{message.name}"
                values = {**message.metrics, "loss": message.loss}
                values = {f"{name}_{key}": value for key, value in values.items()}
                self.log(self._steps_before, values)

    def close(self) -> None:
        """Write everything that is still in memory."""
