"""Training loss and speed of a phase, for each of its epochs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainer.engine.evaluate import Metrics
from trainer.engine.loop import StepResult
from trainer.errors import RunError
from trainer.messages import EpochEnded, Progress

PROGRESS_EVERY_S = 0.2
WAIT_SHARE = 0.1  # share of the training time spent waiting for data from which there is a notice,
WAIT_SECONDS = 10  # if the training lasted at least so many seconds


class PhaseClock:
    """Accumulates loss and speed of a phase. Evaluation does not count as training time.

    The loss is the same on all ranks.

    Args:
        started: When the phase began, by time.monotonic(); its first epoch begins now.
        waited: Returns the seconds that this worker has waited for training data so far.
    """

    def __init__(self, started: float, waited: Callable[[], float] = lambda: 0.0) -> None:
        self._waited = waited
        self._waited_before = -waited()  # of this phase, before it was resumed
        self.train_loss: float | None = None  # of the last whole epoch
        self.checkpointed = time.monotonic()  # time of the last checkpoint
        self._started = started
        self._before = 0.0  # seconds of the phase before it was resumed
        self._speed = 0.0
        self._skipped = 0
        self._all_samples = 0
        self._all_seconds = 0.0
        self._reported = time.monotonic()
        self._last: StepResult | None = None  # the last step, while its loss is not in the sum
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._loss = 0.0  # sum over the units of loss
        self._targets = 0.0  # units of loss
        self._samples = 0
        self._applied = 0
        self._steps = 0
        self._epoch_started = time.monotonic()

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        self._add_loss()
        return {
            "loss": self._loss,
            "samples": self._samples,
            "targets": self._targets,
            "applied": self._applied,
            "steps": self._steps,
            "train_loss": self.train_loss,
            "seconds": self.seconds(),
            "epoch_seconds": time.monotonic() - self._epoch_started,
            "all_samples": self._all_samples,
            "all_seconds": self._all_seconds,
            "waited": self._waited_before + self._waited(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._loss = state["loss"]
        self._samples, self._targets, self._applied, self._steps = (
            state[key] for key in ("samples", "targets", "applied", "steps")
        )
        self.train_loss = state["train_loss"]
        self._before = state["seconds"]
        self._epoch_started = time.monotonic() - state["epoch_seconds"]
        self._all_samples, self._all_seconds = state["all_samples"], state["all_seconds"]
        self._waited_before += state.get("waited", 0.0)  # earlier versions did not measure it

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within this context, in the middle of an epoch, is not its training."""
        begun, waited = time.monotonic(), self._waited()
        yield
        self._epoch_started += time.monotonic() - begun
        self._waited_before -= self._waited() - waited

    def seconds(self) -> float:
        """Seconds that the phase has taken."""
        return self._before + time.monotonic() - self._started

    def count(self, step: StepResult) -> None:
        """Add one step."""
        self._add_loss()
        self._last = step  # its loss is read with the next step, since a GPU may still compute it
        self._samples += step.samples
        self._targets += step.targets
        self._steps += 1
        self._applied += step.applied

    def _add_loss(self) -> None:
        """Add the loss of the last step."""
        if self._last is not None:
            self._loss += self._last.loss * self._last.targets
            self._last = None

    def progress_due(self) -> bool:
        """Whether the progress was last reported at least `PROGRESS_EVERY_S` seconds ago."""
        now = time.monotonic()
        if now - self._reported < PROGRESS_EVERY_S:
            return False
        self._reported = now
        return True

    def progress(self, phase: str, epochs: int, step: StepResult) -> Progress:
        """The progress, as a message."""
        return Progress(
            phase=phase,
            epoch=step.epoch + 1,
            epochs=epochs,
            step=step.step,
            steps=step.total,
            loss=step.loss,
            lr=step.lr,
            images_per_second=self._samples / max(time.monotonic() - self._epoch_started, 1e-9),
        )

    def end_epoch(self, ended: float) -> None:
        """End the epoch: compute its mean loss.

        Args:
            ended: When its last step ended, by time.monotonic().

        Raises:
            RunError: No target of the epoch counts.
        """
        self._add_loss()
        seconds = max(ended - self._epoch_started, 1e-9)
        if not self._targets:
            raise RunError("data: every target of the train data is -100, which means ignored")
        self.train_loss = self._loss / self._targets
        self._all_samples += self._samples
        self._all_seconds += seconds
        self._speed = self._samples / seconds
        self._skipped = self._steps - self._applied
        self._start_epoch()

    def epoch(
        self,
        phase: str,
        step: StepResult,
        validation: Metrics,
        sparsity: float,
        usage: Mapping[str, Any],
    ) -> EpochEnded:
        """The last epoch, as a message. The time of the next epoch starts now."""
        self._epoch_started = time.monotonic()
        assert self.train_loss is not None
        return EpochEnded(
            phase=phase,
            epoch=step.epoch + 1,
            step=step.step,
            train_loss=self.train_loss,
            loss=validation.loss,
            metrics=validation.values,
            lr=step.lr,
            sparsity=sparsity,
            images_per_second=self._speed,
            skipped=self._skipped,
            usage=usage,
        )

    def overall(self) -> float | None:
        """Samples per second of the whole phase; None if nothing was trained."""
        return self._all_samples / self._all_seconds if self._all_seconds else None

    def data_wait(self) -> float | None:
        """Fraction of the training time spent waiting for data; None if nothing was trained."""
        if not self._all_seconds:
            return None
        return min(1.0, (self._waited_before + self._waited()) / self._all_seconds)

    def data_notice(self) -> str:
        """A notice for the user about waiting for data; empty if it took little time."""
        share = self.data_wait()
        if share is None or share <= WAIT_SHARE or self._all_seconds < WAIT_SECONDS:
            return ""
        return (
            f"the worker waited for data in {share:.0%} of the training time: raise "
            "data.loader_workers, if the data has it, or cluster.cpus_per_worker"
        )
