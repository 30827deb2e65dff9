"""Ctrl-C and SIGTERM: the first asks the run to save and end, the second ends it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.errors import Interrupted


class Signals:
    """The handlers of SIGINT and SIGTERM while a run goes on."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.raised = False  # Interrupted; foreign code may have made another error of it
        self._ask: Callable[[], None] | None = None

    def install(self) -> None:
        """Take the signals over. Until `asking`, the first one raises Interrupted."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def asking(self, ask: Callable[[], None]) -> Iterator[None]:
        """While this is open, the first signal calls `ask`, which must return at once.

        One that came before, and whose Interrupted was lost in foreign code, calls it now.
        """
        self._ask = ask
        try:
            if self.received is not None:
                ask()
            yield
        finally:
            self._ask = None

    def interrupted(self) -> Interrupted:
        """The error to raise once the run has ended because it was asked to."""
        assert self.received is not None
        return Interrupted(self.received.name, self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        if self._ask is None or not first:
            self.raised = True
            raise self.interrupted()
        self._ask()
