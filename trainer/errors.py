"""The errors that end a command with one line instead of a traceback."""

from pathlib import Path
from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or else the name of its class.

    A line that ends with a colon is followed by the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def described(error: BaseException) -> str:
    """Class, first line and notes of an error, as one line."""
    notes = "; ".join(note for note in getattr(error, "__notes__", []) if "\n" not in note)
    return f"{type(error).__name__}: {first_line(error)}{notes and f' ({notes})'}"


def one_line(text: str) -> str:
    """A text of several lines as one."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


class ConfigError(ValueError):
    """The configuration is wrong, and nothing was started: exit code 2.

    The message names the key, its value, and a correct value.
    """


class RunError(RuntimeError):
    """The run failed, and one line explains why: exit code 1.

    Attributes:
        detail: Details for the log, such as a worker's traceback; may be empty.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class Diverged(RunError):
    """The loss became NaN or infinite. Repeating the training would end in the same way."""


class LimitsMissed(Exception):
    """The run is complete, but its result misses a limit of the configuration: exit code 3.

    Attributes:
        folder: The run directory.
        result: The `trainer.Result`, if the run was started from Python.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder
        self.result: Any = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run, which can be resumed.

    It is not an `Exception`, so that handlers do not treat it as a failure.

    Attributes:
        exit_code: 128 + the signal's number.
    """

    def __init__(self, signal_name: str, number: int) -> None:
        super().__init__(f"interrupted by {signal_name}")
        self.exit_code = 128 + number
