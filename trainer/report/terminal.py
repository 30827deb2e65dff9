"""Live progress in the terminal; plain lines where the output is a file or a pipe."""

import os
import sys
from types import TracebackType
from typing import TextIO

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from trainer.messages import (
    EpochEnded,
    Message,
    Notice,
    PhaseEnded,
    PhaseStarted,
    Progress,
    Resumed,
    RoundEnded,
    RunStarted,
    WorkersLost,
)

PLAIN_WIDTH = 120  # columns where the output is no terminal


class Terminal(rich.console.Console):
    """Standard output. Falls silent when whoever read along has gone, as `head` does."""

    def __init__(self) -> None:
        super().__init__(highlight=False)
        if not self.is_terminal:
            self.width = PLAIN_WIDTH

    def on_broken_pipe(self) -> None:
        self.quiet = True
        silence(sys.stdout)


def silence(stream: TextIO) -> None:
    """Let all that is still written to a broken pipe vanish, what Python flushes last included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Console:
    """Shows the messages of a run. A context manager: the live bar ends with it."""

    def __init__(self, terminal: rich.console.Console | None = None) -> None:
        self.terminal = terminal or Terminal()
        self._bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.terminal,
            transient=True,
            disable=not self.terminal.is_terminal,
        )
        self._bar: TaskID | None = None

    @classmethod
    def quiet(cls) -> "Console":
        """A console that prints nothing."""
        return cls(rich.console.Console(quiet=True))

    def __enter__(self) -> "Console":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def restore(self) -> None:
        """Give the terminal its cursor back, for a process that ends without closing this."""
        self.terminal.show_cursor()

    def say(self, line: str) -> None:
        """Print one line above the live bar."""
        self.terminal.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """The live bar ends with the context manager: nothing to do."""

    def on(self, message: Message) -> None:
        """Show one message."""
        line = describe(message)
        match message:
            case PhaseStarted():
                self._remove_bar()  # of a phase that is done again after a restart
                if message.steps:
                    self._bar = self._bars.add_task(message.name, total=message.steps, numbers="")
            case Progress() if self._bar is not None:
                numbers = (
                    f"epoch {message.epoch}/{message.epochs}  loss {message.loss:.4f}  "
                    f"{message.images_per_second:,.0f} samples/s"
                )
                self._bars.update(self._bar, completed=message.step, numbers=numbers)
            case PhaseEnded():
                self._remove_bar()
        if line:
            self.say(line)

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None


def describe(message: Message) -> str | None:
    """One line for what is worth keeping in a log; None for mere progress."""
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
            workers = f"{message.workers} worker" + "s" * (message.workers > 1)
            return (
                f"{workers} on {message.device}, {message.parameters:,} parameters, "
                f"{message.train:,} training, {message.validation:,} validation, "
                f"{message.test:,} test samples"
            )
        case PhaseStarted():
            todo = "no training"
            if message.steps:
                todo = f"{message.epochs} epochs, {message.steps:,} steps"
            return f"{message.name} ({message.kind}): {todo}, {message.learnable:,} to learn"
        case EpochEnded():
            return (
                f"{message.phase} epoch {message.epoch}: train loss {message.train_loss:.4f}, "
                f"validation loss {message.loss:.4f}, accuracy {message.accuracy:.2%}, "
                f"sparsity {message.sparsity:.1%}, {message.images_per_second:,.0f} samples/s"
                + (f", {message.skipped} steps skipped" if message.skipped else "")
            )
        case RoundEnded():
            judged = message.record
            back = "trained on" if judged.extended else "back to the last good state"
            verdict = "kept" if judged.accepted else f"too low, {back}"
            return (
                f"{message.phase} round {judged.round}: sparsity {judged.sparsity:.2%}, "
                f"accuracy {judged.accuracy:.2%}: {verdict}"
                + (f"; stopped: {judged.stopped}" if judged.stopped else "")
            )
        case PhaseEnded():
            record = message.record
            return (
                f"{record.name} done in {record.seconds:.1f} s: accuracy {record.accuracy:.2%}, "
                f"{record.nonzero:,} of {record.parameters:,} parameters are not zero"
            )
    return None
