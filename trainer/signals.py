"""Ctrl-C and SIGTERM: the first asks the run to save and end, the second ends it at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trainer.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Handles SIGINT and SIGTERM during a run.

    Attributes:
        received: The first signal that arrived; None: none has.
        raised: Whether Interrupted was raised. Foreign code may have replaced it by another error.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.raised = False
        self._request: Callable[[], None] | None = None
        self._before_exit: Callable[[], None] | None = None

    def install(self) -> None:
        """Handle the signals from now on. Outside `requesting` and `deferring` each one raises
        Interrupted."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals in this block, if it runs in the main thread; restore them after."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def requesting(self, request: Callable[[], None]) -> Iterator[None]:
        """In this block the first signal calls `request`, which must return immediately.

        If a signal arrived before, and foreign code lost its Interrupted, `request` is called now.
        """
        self._request = request
        try:
            if self.received is not None:
                request()
            yield
        finally:
            self._request = None

    @contextmanager
    def deferring(
        self, before_exit: Callable[[], None], request: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Defer exceptions to the end of this block, since they would damage the state of Ray.

        The first signal calls `request`, and Interrupted is raised when the block ends, in place of
        any other error. The second signal calls `before_exit` and ends the process immediately,
        without exit handlers; another process must clean up (trainer.cluster.reaper).
        """
        before = self.received
        self._request, self._before_exit = request, before_exit
        try:
            yield
        finally:
            self._request = self._before_exit = None
            if self.received is not before:
                self.raised = True
                raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """The error to raise when the run has ended because of a signal."""
        assert self.received is not None
        return Interrupted(self.received.name, self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        if self.received is signal.SIGTERM:
            # Ray's native handler sets an alarm if the signal arrives while Ray starts.
            signal.alarm(0)
        if first and self._request is not None:
            self._request()
        elif self._before_exit is not None:
            try:
                self._before_exit()
            finally:
                os._exit(self.interrupted().exit_code)
        else:
            self.raised = True
            raise self.interrupted()
