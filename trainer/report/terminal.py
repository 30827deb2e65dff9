"""Live progress in the terminal; plain lines where the output is a file or a pipe."""

import io
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, TextIO, cast

import rich.console
import rich.table
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.text import Text

from trainer.messages import (
    EpochEnded,
    Message,
    Notice,
    PhaseEnded,
    PhaseStarted,
    Progress,
    Resumed,
    RoundEnded,
    RunEnded,
    RunStarted,
    Status,
    WorkersLost,
)
from trainer.report.notebook import NotebookLive, in_notebook
from trainer.report.pace import Pace
from trainer.report.tables import Table, rich_table
from trainer.report.text import duration, plural

PLAIN_WIDTH = 120  # columns where the output is no terminal
_ELAPSED_AFTER_S = 3.0  # a status that takes longer shows its time
_STYLES = {RunStarted: "cyan", PhaseStarted: "bold", PhaseEnded: "green", WorkersLost: "yellow"}


class _Output:
    """Standard output. On an error, such as a full disk, it becomes silent: the run continues.

    A broken pipe is left to rich, which does the same.
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
            stdout.reconfigure(errors="replace")  # such as ASCII, which has no "±"
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
    """Break a line between words to fit a terminal. Files and pipes get it whole."""
    if not terminal.is_terminal:
        return line
    return textwrap.fill(line, terminal.width, subsequent_indent="  ", break_on_hyphens=False)


def live_display(
    terminal: rich.console.Console, get_renderable: Callable[[], RenderableType] | None = None
) -> Live | NotebookLive | None:
    """A live display, which disappears when it stops; None where the output is plain text.

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


@dataclass
class _Bar:
    """The progress of the present phase."""

    title: str
    steps: int
    step: int = 0
    numbers: str = ""


class Console:
    """Shows the messages of a run. A context manager: the live display ends with it."""

    def __init__(self, terminal: rich.console.Console | None = None) -> None:
        self.terminal = terminal or Terminal()
        # The usual spinner consists of letters that only Unicode has.
        name = "dots" if self.terminal.encoding.startswith("utf") else "line"
        self._spinner = Spinner(name, style="cyan")
        self._status: tuple[str, float] | None = None  # text, and when it was set
        self._bar: _Bar | None = None
        self._pace = Pace()
        self._live = live_display(self.terminal, self._render)

    @classmethod
    def quiet(cls) -> "Console":
        """A console that prints nothing."""
        return cls(rich.console.Console(quiet=True))

    def __enter__(self) -> "Console":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def close(self) -> None:
        """The live display ends with the context manager: nothing to do."""

    def restore(self) -> None:
        """Show the cursor again, for a process that ends without closing this."""
        self.terminal.show_cursor()

    def say(self, line: str, style: str | None = None) -> None:
        """Print one line above the live display.

        Args:
            style: colour and weight, as rich names them.
        """
        self.terminal.print(line, markup=False, soft_wrap=True, style=style)

    def show(self, table: Table) -> None:
        """Print a table. A notebook shows those of a result as HTML (`notebook.run_html`)."""
        if isinstance(self._live, NotebookLive):
            return
        self.terminal.print(rich_table(table, self.terminal.width))

    def status(self, text: str | None) -> None:
        """Show what the run is doing where there are no steps to count; None: nothing any more.

        A terminal shows it beside a spinner until the next status or the next phase; otherwise it
        is printed as a line.
        """
        self._status = None if text is None else (text, time.monotonic())
        self._refresh()
        if text is not None and not self._live:
            self.say(text)

    def on(self, message: Message) -> None:
        """Show one message."""
        match message:
            case Status():
                self.status(message.text)
            case RunStarted():
                self._pace.plan(message.phase_steps)
                self.status(None)
            case PhaseStarted():
                self.status(None)
                self._pace.start_phase(message.index, message.steps)
                title = phase_title(message, self._pace.phases)
                self._bar = _Bar(title, message.steps) if message.steps else None
            case Progress() if self._bar is not None:
                self._pace.step(message.step)
                self._bar.step = message.step
                self._bar.numbers = (
                    f"epoch {message.epoch} of {message.epochs}, loss {message.loss:.4f}, "
                    f"{message.images_per_second:,.0f} samples/s"
                )
                if isinstance(self._live, NotebookLive):  # no thread refreshes it
                    self._live.refresh_sometimes()
            case PhaseEnded() | RunEnded():
                self._bar = None
                self.status(None)
        line = describe(message)
        if line is None:
            return
        self._refresh()
        # A notice may hold a path or a command, to be copied.
        shown = line if isinstance(message, Notice) else wrap(self.terminal, line)
        self.say(shown, _STYLES.get(type(message)))

    def _refresh(self) -> None:
        """Draw the live display now: its thread may wait for its turn while modules are loaded."""
        if self._live and self._live.is_started:
            self._live.refresh()

    def _render(self) -> RenderableType:
        """The live display: progress of the phase, and status. Called by its thread."""
        bar, status = self._bar, self._status
        parts: list[RenderableType] = []
        if bar is not None:
            parts += [_bar_line(bar), Text(self._second_line(bar), no_wrap=True)]
        if status is not None:
            text, since = status
            seconds = time.monotonic() - since
            elapsed = f" ({duration(seconds)})" if seconds >= _ELAPSED_AFTER_S else ""
            self._spinner.update(text=Text(f"{text}{elapsed}", no_wrap=True))
            parts.append(self._spinner)
        return Group(*parts)

    def _second_line(self, bar: _Bar) -> str:
        """Loss, speed, and the time left of the phase and of all phases."""
        phase, run = self._pace.phase_left(), self._pace.run_left()
        text = bar.numbers
        if phase is not None:
            text += f", {duration(phase)} left"
            if run is not None and run > phase:
                text += f" ({duration(run)} for all phases)"
        return text


def _bar_line(bar: _Bar) -> RenderableType:
    line = rich.table.Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    gauge = ProgressBar(total=bar.steps, completed=bar.step)
    line.add_row(Text(bar.title, "bold"), gauge, f"{bar.step:,}/{bar.steps:,} steps")
    return line


def phase_title(message: PhaseStarted, phases: int) -> str:
    """The name of a phase and its place among the phases of the run.

    Args:
        phases: number of phases; 0: not known.
    """
    if phases > 1:
        return f"phase {message.index + 1} of {phases}: {message.name}"
    return message.name


def describe(message: Message) -> str | None:
    """One line about a message that is worth keeping in a log; None for mere progress."""
    match message:
        case Notice():
            return message.text
        case WorkersLost():
            return (
                f"{message.reason}; restarting from the last checkpoint (restart {message.restart})"
            )
        case Resumed() if not message.is_beginning:
            if message.phase == len(message.names):
                return "resuming after the last phase"
            name = message.names[message.phase]
            after = f"after step {message.step:,} of" if message.step else "with"
            return f"resuming {after} {name}"
        case RunStarted():
            return (
                f"{_count(message.workers, 'worker')} on {message.device}; "
                f"{message.parameters:,} parameters; samples: {message.train:,} training, "
                f"{message.validation:,} validation, {message.test:,} test"
            )
        case PhaseStarted():
            kind = "" if message.kind == message.name else f" ({message.kind})"
            training = "no training"
            if message.steps:
                epochs, steps = _count(message.epochs, "epoch"), _count(message.steps, "step")
                training = f"{epochs}, {steps}, {message.learnable:,} trainable values"
            return f"{message.name}{kind}: {training}"
        case EpochEnded():
            parts = [
                f"{message.phase} epoch {message.epoch}: loss {message.train_loss:.4f} "
                f"(validation {message.loss:.4f})",
                f"accuracy {message.accuracy:.2%}",
                *([f"sparsity {message.sparsity:.1%}"] if message.sparsity else []),
                f"{message.images_per_second:,.0f} samples/s",
                *([f"{_count(message.skipped, 'step')} skipped"] if message.skipped else []),
            ]
            return ", ".join(parts)
        case RoundEnded():
            record = message.record
            otherwise = "extended" if record.extended else "reverted to the last accepted weights"
            return (
                f"{message.phase} round {record.round}: sparsity {record.sparsity:.2%}, "
                f"accuracy {record.accuracy:.2%}: "
                + ("accepted" if record.accepted else f"accuracy too low, {otherwise}")
                + (f"; last round: {record.stopped}" if record.stopped else "")
            )
        case PhaseEnded():
            done = message.record
            kept = f"{done.nonzero:,} of {done.parameters:,} parameters are nonzero"
            if done.nonzero == done.parameters:
                kept = f"{done.parameters:,} parameters"
            return f"{done.name} done in {done.seconds:.1f} s: accuracy {done.accuracy:.2%}, {kept}"
    return None


def _count(count: int, noun: str) -> str:
    return f"{count:,} {plural(noun, count)}"
