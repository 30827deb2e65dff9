"""Live progress in the terminal; plain lines if the output is a file or a pipe."""

import time
from dataclasses import dataclass

import rich.console
import rich.table
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.text import Text

from trainer.messages import (
    Message,
    Notice,
    PhaseEnded,
    PhaseStarted,
    Progress,
    RunEnded,
    RunStarted,
    Status,
    WorkersLost,
)
from trainer.report.lines import describe, phase_title
from trainer.report.notebook import NotebookLive
from trainer.report.output import Terminal, live_display, wrap
from trainer.report.pace import Pace
from trainer.report.table import Table, rich_table
from trainer.report.text import duration

_ELAPSED_AFTER_S = 3.0  # a status that is shown longer shows its duration
_STYLES = {RunStarted: "cyan", PhaseStarted: "bold", PhaseEnded: "green", WorkersLost: "yellow"}


@dataclass
class _Bar:
    """The progress bar of the current phase."""

    title: str
    steps: int
    step: int = 0
    numbers: str = ""


class Console:
    """Shows the messages of a run. A context manager: the live display disappears at its end."""

    def __init__(self, terminal: rich.console.Console | None = None) -> None:
        self.terminal = terminal or Terminal()
        # The usual spinner consists of characters that ASCII does not have.
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

    def __exit__(self, *_: object) -> None:
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
        """Show what the run is doing when there are no steps to count; None: remove the text.

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
        """Draw the live display now: its own thread may be delayed while modules are imported."""
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
