"""The budget of a sweep over all its sessions: trials, seconds and epochs."""

import time

from trainer.config import SweepConfig
from trainer.sweeps.study import SweepStudy

KEEP_EVERY_S = 5.0  # a killed session loses at most this much of its time


class Budget:
    """Counts what was used, and stores the time in the study."""

    def __init__(self, cfg: SweepConfig, study: SweepStudy) -> None:
        self._cfg, self._study = cfg, study
        self._trials = len(study.trials())
        self._epochs = study.epochs
        self._began = time.monotonic() - study.seconds
        self._kept = time.monotonic()

    def seconds(self) -> float:
        """The duration of all sessions."""
        return time.monotonic() - self._began

    def left(self) -> float | None:
        """Seconds until the time is used up; None: no limit."""
        return None if self._cfg.seconds is None else self._cfg.seconds - self.seconds()

    def count_trial(self, number: int) -> None:
        """Count a new trial."""
        self._trials = number + 1

    def count_epoch(self) -> None:
        """Count an epoch that a trial has reported for the first time."""
        self._epochs += 1

    def room_for_a_trial(self) -> bool:
        """Whether another trial may be drawn."""
        return self._cfg.trials is None or self._trials < self._cfg.trials

    def used_up(self) -> str | None:
        """The budget that is used up, as a sentence; None: none is."""
        if self._cfg.seconds is not None and self.seconds() > self._cfg.seconds:
            return "sweep.seconds is used up"
        if self._cfg.epochs is not None and self._epochs >= self._cfg.epochs:
            return "sweep.epochs is used up"
        return None

    def keep(self, *, now: bool = True) -> None:
        """Store the time in the study.

        Args:
            now: also if it was stored less than a few seconds ago.
        """
        if now or time.monotonic() - self._kept >= KEEP_EVERY_S:
            self._study.record_seconds(self.seconds())
            self._kept = time.monotonic()
