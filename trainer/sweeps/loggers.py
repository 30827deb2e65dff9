"""Passes the messages of trials to the sinks that `logger` chooses: learning curves of each trial.

Each trial has its own sinks, with the folder curves/NUMBER of the sweep as their run directory and
the sweep as their group. They work in a thread, since some wait for a network.
"""

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config.instantiate import OBJECT
from trainer.errors import ConfigError, first_line
from trainer.messages import Message
from trainer.report.sinks import Sink

CLOSE_S = 30.0  # how long a sweep waits at its end for sinks to write the rest


def check_loggers(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a sink that was passed as an object. Raises ConfigError."""
    for name, sink in settings.items():
        if OBJECT in sink:
            raise ConfigError(
                f"logger.{name}: each trial of a sweep needs its own sink; pass the class "
                "(functools.partial for arguments) instead of an object"
            )


class TrialLoggers:
    """The sinks of all running trials. All methods are for the main thread."""

    def __init__(self, folder: Path, group: str, say: Callable[[str], None]) -> None:
        """
        Args:
            folder: of the sweep.
            group: name under which the sinks show the trials together.
            say: shows a line to the user.
        """
        self._folder, self._group, self._say = folder, group, say
        self._sinks: dict[int, list[Sink]] = {}  # used by the thread only
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reported: set[str] = set()
        self._jobs: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        # A daemon, so that a second Ctrl-C need not wait for it.
        self._thread = threading.Thread(target=self._work, daemon=True, name="trial loggers")
        self._thread.start()

    def begin(self, number: int, experiment: Any, message: Message) -> None:
        """Open the sinks of a trial for an attempt.

        Args:
            experiment: of the trial; if it has no loggers, nothing happens.
            message: the message Resumed of this attempt.
        """
        if experiment.loggers:
            self._jobs.put((self._open, (number, experiment, message)))

    def on(self, number: int, message: Message) -> None:
        """Pass on a message of a trial."""
        self._jobs.put((self._pass_on, (number, message)))

    def end(self, number: int) -> None:
        """Close the sinks of a trial; a later attempt opens them again."""
        self._jobs.put((self._close, (number,)))

    def show_problems(self) -> None:
        """Show sinks that have failed; each problem once."""
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._problems.get_nowait()
                if line not in self._reported:
                    self._reported.add(line)
                    self._say(line)

    def close(self) -> None:
        """Wait until the sinks have written the rest, and close them."""
        self._jobs.put((self._close_all, ()))
        self._jobs.put(None)
        self._thread.join(CLOSE_S)
        self.show_problems()

    def _work(self) -> None:
        while job := self._jobs.get():
            function, arguments = job
            function(*arguments)

    def _open(self, number: int, experiment: Any, message: Message) -> None:
        folder = self._folder / "curves" / f"{number:04d}"
        name = f"{self._group}/{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sinks[number] = experiment.build_loggers(folder, name, self._group)
        except (ConfigError, OSError) as error:
            self._problems.put(f"trials are not logged: {first_line(error)}")
            return
        self._pass_on(number, message)

    def _pass_on(self, number: int, message: Message) -> None:
        for sink in list(self._sinks.get(number, ())):
            try:
                sink.on(message)
            except Exception as error:  # a service or a sink of the user may raise anything
                self._sinks[number].remove(sink)
                self._failed(sink, error)

    def _close(self, number: int) -> None:
        for sink in self._sinks.pop(number, ()):
            try:
                sink.close()
            except Exception as error:
                self._failed(sink, error)

    def _close_all(self) -> None:
        for number in list(self._sinks):
            self._close(number)

    def _failed(self, sink: Sink, error: Exception) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        self._problems.put(
            f"{type(sink).__name__} failed: {type(error).__name__}: {first_line(error)} "
            f"({where.filename}:{where.lineno})"
        )
