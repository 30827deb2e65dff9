"""Progress of one rank, published for another thread that decides whether the rank hangs."""

import contextlib
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


class Heartbeat:
    """Counts the work that a rank finishes; another thread reads it to detect a hang.

    Attributes:
        beats: optimizer steps, micro-batches and evaluation batches finished so far.
        phase: index of the current phase.
        step: optimizer steps finished in the current phase.
    """

    def __init__(self) -> None:
        self.beats = 0
        self.phase = 0
        self.step = 0
        self._activity = "at the start"
        # One entry per open `busy` block, in any thread: list.append and list.pop are atomic.
        self._busy: list[None] = []
        self._expected = 0  # open blocks around a `watched` one, which do not count

    @property
    def position(self) -> tuple[int, int]:
        """The current phase and the number of finished steps in it."""
        return self.phase, self.step

    @property
    def where(self) -> str:
        """The position in words, for messages, such as "in phase train, step 17"."""
        return f"{self._activity}, step {self.step}" if self.step else self._activity

    @property
    def is_busy(self) -> bool:
        """Whether a `busy` block is open: a missing beat is then no sign of a hang."""
        return len(self._busy) > self._expected

    def begin(self, activity: str, phase: int, step: int = 0) -> None:
        """Announce what starts now.

        Args:
            activity: in words, such as "in phase train".
            phase: index of the phase.
            step: finished steps of the phase; more than 0 when it is resumed.
        """
        self._activity, self.phase, self.step = activity, phase, step

    def beat(self) -> None:
        """Record that a unit of work is finished."""
        self.beats += 1

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Mark a block that may run for a long time without a beat. Blocks may nest.

        Use it for waiting on other ranks (if one of them hangs, this rank is not the cause) and for
        work whose duration depends on the size of the model or the data: building them, clustering
        weights, writing a checkpoint.
        """
        self._busy.append(None)
        try:
            yield
        finally:
            self._busy.pop()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Mark a block within a `busy` one in which beats are expected all the same."""
        before, self._expected = self._expected, len(self._busy)
        try:
            yield
        finally:
            self._expected = before

    def busy_until_first(self, items: Iterator[T]) -> Generator[T]:
        """Yield `items`, busy until the first one arrives: data loaders start processes for it."""
        with self.busy():
            first = next(items, None)
        if first is not None:
            yield first
            yield from items
