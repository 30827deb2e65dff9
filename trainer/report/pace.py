"""The estimated time until a run ends, from the steps done and the steps planned."""

import time
from collections.abc import Sequence


class Pace:
    """Estimates the time left in the current phase and in all phases.

    It assumes that steps of later phases take as long as those of the current phase.
    """

    def __init__(self) -> None:
        self._planned: Sequence[int] = ()  # steps of each phase; empty: not known
        self._phase = 0
        self._steps = 0  # of the current phase
        self._first: tuple[int, float] | None = None  # step and time of the first report
        self._last = (0, 0.0)  # step and time of the last report

    @property
    def phases(self) -> int:
        """Number of phases of the run; 0: not known."""
        return len(self._planned)

    def plan(self, steps: Sequence[int]) -> None:
        """Set the maximum number of steps of each phase of the run."""
        self._planned = steps

    def start_phase(self, index: int, steps: int) -> None:
        """A phase starts, is resumed, or is repeated after a restart."""
        self._phase, self._steps, self._first = index, steps, None

    def step(self, step: int) -> None:
        """A step of the current phase is done; the first one is 1."""
        self._last = (step, time.monotonic())
        self._first = self._first or self._last

    def phase_left(self) -> float | None:
        """Seconds until the current phase ends; None: not known yet."""
        seconds = self._seconds_per_step()
        return None if seconds is None else seconds * (self._steps - self._last[0])

    def run_left(self) -> float | None:
        """Seconds until the last phase ends; None: not known (yet)."""
        left, seconds = self.phase_left(), self._seconds_per_step()
        if left is None or seconds is None or not self._planned:
            return None
        return left + seconds * sum(self._planned[self._phase + 1 :])

    def _seconds_per_step(self) -> float | None:
        if self._first is None or self._last[0] == self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
