"""One trial as the driver sees it: its checkpoints, its messages, and its result."""

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config import SweepConfig
from trainer.errors import RunError
from trainer.messages import (
    Checkpoint,
    EpochEnded,
    Message,
    PhaseEnded,
    Resumed,
    RunStarted,
    RunStopped,
    TrialMeasured,
)
from trainer.store.checkpoints import Checkpoints
from trainer.store.directory import as_json
from trainer.sweeps.measures import measure, watched
from trainer.sweeps.shared_phases import SharedPhases


class Trial:
    """Receives the messages of a trial, and keeps its checkpoints in trials/NUMBER."""

    def __init__(
        self,
        number: int,
        drawn: dict[str, Any],
        experiment: Any,  # an Experiment, whose import would slow down the start
        sweep: SweepConfig,
        folder: Path,
        shared_phases: SharedPhases,
    ):
        self.number = number
        self.drawn = drawn
        self.experiment = experiment
        self.epoch = 0  # of all phases together
        self.value: float | None = None  # the metric after that epoch
        self.pruned = False
        self.stopped = False
        self.error: Exception | None = None  # of handling a message; the attempt has failed
        self.records: list[dict[str, Any]] = []
        self.shared = shared_phases.key(experiment)  # of phases shared with others
        self._shared_phases = shared_phases
        self._sweep = sweep
        self._names = list(experiment.phases)
        self._folder = folder_of(folder, number)
        self._checkpoints: Checkpoints | None = None
        self.resumed: Resumed | None = None  # the message with which the last attempt began
        self._parameters = 0
        self._measured: dict[str, float] = {}  # by workers
        self.usage: dict[str, Any] = {}  # of each phase that it trained itself (PhaseRecord.usage)

    def start(self, say: Callable[[str], None]) -> Any:
        """Prepare an attempt.

        Args:
            say: shows a line to the user.

        Returns:
            Where it begins (trainer.worker.run.Start): at the last checkpoint, if there is one.

        Raises:
            ConfigError: init_from holds no weights.
            RunError, OSError: a checkpoint that is needed is missing.
        """
        from trainer.experiment import initial_weights
        from trainer.worker.run import start_at

        self._folder.mkdir(parents=True, exist_ok=True)
        if self.shared:
            self._shared_phases.load(self.shared, self._folder / "checkpoints")
        self._checkpoints = Checkpoints(self._folder, self.experiment.config.checkpoint.keep)
        if self.experiment.has_initial_weights and not self._checkpoints.load_initial(say):
            self._checkpoints.save_initial(initial_weights(self.experiment, None))
        point = self._checkpoints.latest(self._names, say)
        self.records = [dict(record) for record in point.records]
        self.resumed = Resumed(point.phase, point.step, self._names, point.records, point.progress)
        self._measured = {}
        self.stopped, self.error = False, None
        return start_at(
            self.experiment, point, partial(self._checkpoints.weights_after, self._names)
        )

    def measured(self) -> dict[str, float]:
        """All measures, once it has ended."""
        self.records[-1].update(self._measured)
        return measure(self.records)

    @property
    def epochs(self) -> int:
        """Number of epochs of all phases."""
        return sum(phase.fit.epochs for phase in self.experiment.phases.values())

    def on(self, message: Message) -> tuple[int, float] | None:
        """Receive a message. Returns epoch and watched value after an epoch, else None."""
        assert self._checkpoints is not None
        match message:
            case RunStarted():
                self._parameters = message.parameters
            case RunStopped():
                self.stopped = True
            case Checkpoint() if not self.pruned:
                name = self._names[message.phase]
                self._checkpoints.save_within(message.phase, name, message.step, message.content)
            case TrialMeasured():
                self._measured[message.name] = message.value
            case PhaseEnded():
                record = as_json(message.record)
                self.usage[record["name"]] = record["usage"]
                last = message.index == len(self._names) - 1
                self.records.append(record)
                shared = self.shared and record["name"] == self._shared_phases.last
                if not last or shared:  # nothing continues after the last phase
                    self._checkpoints.save_phase_end(message.index, record, message.weights)
                if self.shared and shared:
                    self._checkpoints.wait()
                    self._shared_phases.save(self.shared, self._checkpoints.folder)
            case EpochEnded():
                self.usage[message.phase] = message.usage
                before = self._names[: self._names.index(message.phase)]
                done = sum(self.experiment.phases[name].fit.epochs for name in before)
                self.epoch = done + message.epoch
                metric = self._sweep.metric
                self.value = message.loss if metric == "loss" else message.metrics[metric]
                left = self._parameters * (1 - message.sparsity)
                return self.epoch, watched(self._sweep, self.value, left)
        return None

    def pause(self) -> None:
        """End the attempt. Its checkpoints are kept.

        Raises:
            RunError: the last checkpoint could not be written; the one before it is kept.
        """
        if self._checkpoints:
            try:
                self._checkpoints.wait()
            finally:
                self._checkpoints.close()
                self._checkpoints = None

    def forget(self) -> None:
        """End the trial, and delete its checkpoints."""
        with contextlib.suppress(RunError):  # a checkpoint that is deleted now
            self.pause()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds other trials
            self._folder.parent.rmdir()


def folder_of(sweep: Path, number: int) -> Path:
    """The folder of a trial's checkpoints.

    Args:
        sweep: folder of the sweep.
    """
    return sweep / "trials" / f"{number:04d}"
