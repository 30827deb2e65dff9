"""Ctrl-C and SIGTERM: the first asks the run to save and end, the second ends it at once."""

import os
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
        self._last_words: Callable[[], None] | None = None

    def install(self) -> None:
        """Take the signals over. Outside of `asking` and `holding`, each raises Interrupted."""
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

    @contextmanager
    def holding(
        self, last_words: Callable[[], None], ask: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Let nothing be raised amid foreign code that may not bear it, as Ray's native code.

        The first signal calls `ask` and is raised as Interrupted when this closes, in the place of
        any other error. The second calls `last_words` and ends the process at once, without the
        exit handlers of anybody: what must be cleaned up then is another process's job.
        """
        before = self.received
        self._ask, self._last_words = ask, last_words
        try:
            yield
        finally:
            self._ask = self._last_words = None
            if self.received is not before:
                self.raised = True
                raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The error to raise once the run has ended because it was asked to."""
        assert self.received is not None
        return Interrupted(self.received.name, self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        if self.received is signal.SIGTERM:
            signal.alarm(0)  # one that came while Ray started: its native handler set an alarm
        if first and self._ask is not None:
            self._ask()
        elif self._last_words is not None:
            try:
                self._last_words()
            finally:
                os._exit(self.interrupted().exit_code)
        else:
            self.raised = True
            raise self.interrupted()
