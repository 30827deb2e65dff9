"""How long a run will still take, from the steps it has done and the steps it has planned."""

import time
from collections.abc import Sequence


class Pace:
    """Estimates the time left of the present phase and of all phases.

    Steps of phases to come count as long as those of the present phase.
    """

    def __init__(self) -> None:
        self._planned: Sequence[int] = ()  # steps of each phase; empty: not known
        self._phase = 0
        self._steps = 0  # of the present phase
        self._first: tuple[int, float] | None = None  # step and time of the first report
        self._last = (0, 0.0)  # step and time of the last report

    @property
    def phases(self) -> int:
        """Number of phases of the run; 0: not known."""
        return len(self._planned)

    def plan(self, steps: Sequence[int]) -> None:
        """Set the number of steps that each phase of the run takes at most."""
        self._planned = steps

    def start_phase(self, index: int, steps: int) -> None:
        """A phase starts, is resumed, or is repeated after a restart."""
        self._phase, self._steps, self._first = index, steps, None

    def step(self, step: int) -> None:
        """A step of the present phase is done; the first one is 1."""
        self._last = (step, time.monotonic())
        self._first = self._first or self._last

    def phase_left(self) -> float | None:
        """Seconds until the present phase ends; None: not known yet."""
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
