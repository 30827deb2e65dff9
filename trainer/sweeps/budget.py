"""What a sweep may use and has used, earlier sessions included: trials, seconds, epochs."""

import time

from trainer.config import SweepConfig
from trainer.sweeps.study import SweepStudy

KEEP_EVERY_S = 5.0  # a killed session is forgotten no more than this


class Budget:
    """Counts, and keeps the time that was used in the study."""

    def __init__(self, cfg: SweepConfig, study: SweepStudy) -> None:
        self._cfg, self._study = cfg, study
        self._trials = len(study.trials())
        self._epochs = study.epochs
        self._began = time.monotonic() - study.seconds
        self._kept = time.monotonic()

    def seconds(self) -> float:
        """That the sweep has taken in all."""
        return time.monotonic() - self._began

    def left(self) -> float | None:
        """Seconds until the time is used up; None: no limit."""
        return None if self._cfg.seconds is None else self._cfg.seconds - self.seconds()

    def count_trial(self, number: int) -> None:
        """Trial `number` was drawn."""
        self._trials = number + 1

    def count_epoch(self) -> None:
        """A trial has ended an epoch that none of its attempts had ended before."""
        self._epochs += 1

    def room_for_a_trial(self) -> bool:
        """Whether another one may be drawn."""
        return self._cfg.trials is None or self._trials < self._cfg.trials

    def used_up(self) -> str | None:
        """What ends the sweep at once, as a sentence; None: nothing."""
        if self._cfg.seconds is not None and self.seconds() > self._cfg.seconds:
            return "sweep.seconds is used up"
        if self._cfg.epochs is not None and self._epochs >= self._cfg.epochs:
            return "sweep.epochs is used up"
        return None

    def keep(self, *, now: bool = True) -> None:
        """Note the time in the study: now, or where the last note is some seconds old."""
        if now or time.monotonic() - self._kept >= KEEP_EVERY_S:
            self._study.record_seconds(self.seconds())
            self._kept = time.monotonic()
