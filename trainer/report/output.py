"""Standard output for rich: its capabilities, and what happens when writing to it fails."""

import io
import os
import sys
import textwrap
from collections.abc import Callable
from typing import IO, Any, TextIO, cast

import rich.console
from rich.console import RenderableType
from rich.live import Live

from trainer.report.notebook import NotebookLive, in_notebook

PLAIN_WIDTH = 120  # columns if the output is not a terminal


class _Output:
    """Standard output. On an error, such as a full disk, it becomes silent: the run continues.

    A broken pipe is handled by rich in the same way.
    """

    def write(self, text: str) -> int:
        """Write a text. Returns its length."""
        try:
            return sys.stdout.write(text)
        except BrokenPipeError:
            raise
        except OSError:
            silence(sys.stdout)
            return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:
            silence(sys.stdout)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


class Terminal(rich.console.Console):
    """Standard output. It becomes silent when the reader of a pipe is gone, as `head` is."""

    def __init__(self) -> None:
        stdout = sys.stdout
        if isinstance(stdout, io.TextIOWrapper) and not stdout.encoding.lower().startswith("utf"):
            stdout.reconfigure(errors="replace")  # ASCII, for example, has no "±"
        # Without a standard output rich has a file that discards everything.
        output = None if stdout is None else cast("IO[str]", _Output())
        super().__init__(file=output, highlight=False, force_jupyter=False)
        if not self.is_terminal:
            self.width = PLAIN_WIDTH

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(sys.stdout)


def silence(stream: TextIO) -> None:
    """Discard all further output to a broken pipe, including what Python flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def wrap(terminal: rich.console.Console, line: str) -> str:
    """Break a line between words to fit a terminal. In files and pipes it is not broken."""
    if not terminal.is_terminal:
        return line
    return textwrap.fill(line, terminal.width, subsequent_indent="  ", break_on_hyphens=False)


def live_display(
    terminal: rich.console.Console, get_renderable: Callable[[], RenderableType] | None = None
) -> Live | NotebookLive | None:
    """A live display, which disappears when it stops; None if the output is plain text.

    Args:
        get_renderable: returns what to show, several times a second; None: `update` changes it.
    """
    if terminal.quiet:
        return None
    if in_notebook():
        return NotebookLive(get_renderable)
    if not terminal.is_terminal:
        return None
    return Live(
        console=terminal,
        get_renderable=get_renderable,
        auto_refresh=get_renderable is not None,
        refresh_per_second=8,
        transient=True,
    )
