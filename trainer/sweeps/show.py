"""The sweep in the terminal: a live table, and a line for each trial that ended."""

from collections.abc import Mapping, Sequence
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trainer.config import SweepConfig
from trainer.report.terminal import Terminal
from trainer.store.directory import RunDirectory
from trainer.sweeps.study import Ledger, watched_values
from trainer.sweeps.trial import Trial


class LiveTable:
    """Shows a sweep. A context manager: the live table ends with it. Lines go to log.txt too."""

    def __init__(self, cfg: SweepConfig, directory: RunDirectory) -> None:
        self.terminal = Terminal()
        self._cfg, self._directory = cfg, directory
        self._live = Live(console=self.terminal, transient=True, auto_refresh=False)
        self._best: list[FrozenTrial] | None = None  # None: asked for when it is shown

    def __enter__(self) -> "LiveTable":
        if self.terminal.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live table away."""
        self._live.stop()

    def restore(self) -> None:
        """Give the terminal its cursor back, for a process that ends without closing this."""
        self.terminal.show_cursor()

    def say(self, line: str) -> None:
        """Print one line above the live table, and log it."""
        self._directory.log(line)  # first: a line that was seen is in the log
        self.terminal.print(line, markup=False, soft_wrap=True)

    def ended(self, trial: FrozenTrial) -> None:
        """Say what became of a trial."""
        self._best = None
        self.say(describe(trial, list(self._cfg.objectives)))

    def show(self, running: Mapping[int, Trial], ledger: Ledger, left: float | None) -> None:
        """Renew the live table, where there is one.

        Args:
            left: seconds; None: no limit.
        """
        if not self._live.is_started:
            return
        if self._best is None:
            self._best = ledger.best()
        title = tally(ledger.trials(), left)
        if self._best:
            best = format_values(self._best[0], list(self._cfg.objectives))
            title += f"\nbest: trial {self._best[0].number}, {best}"
        self._live.update(Group(Text(title), self._table(running)), refresh=True)

    def _table(self, running: Mapping[int, Trial]) -> Table:
        table = Table()
        for column in ("trial", "epoch", self._cfg.metric, "settings"):
            table.add_column(column)
        for number, trial in sorted(running.items()):
            value = "" if trial.value is None else f"{trial.value:.4f}"
            drawn = ", ".join(f"{key}={value}" for key, value in trial.drawn.items())
            table.add_row(str(number), f"{trial.epoch}/{trial.epochs}", value, escape(drawn))
        return table


def tally(trials: Sequence[FrozenTrial], left: float | None) -> str:
    """How many trials are in which state, and the time that is left."""
    states = [trial.state for trial in trials]
    text = (
        f"{states.count(TrialState.COMPLETE)} complete, {states.count(TrialState.PRUNED)} pruned, "
        f"{states.count(TrialState.FAIL)} failed, {states.count(TrialState.RUNNING)} running"
    )
    return text if left is None else f"{text}, {max(left, 0):.0f} s left"


def format_values(trial: FrozenTrial, objectives: Sequence[str]) -> str:
    """The values of a trial that was completed."""
    values = zip(objectives, trial.values, strict=True)
    return ", ".join(f"{name} {value:.6g}" for name, value in values)


def describe(trial: FrozenTrial, objectives: Sequence[str]) -> str:
    """One line on a trial that ended."""
    drawn = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in trial.params.items()
    )
    match trial.state:
        case TrialState.COMPLETE:
            what = format_values(trial, objectives)
        case TrialState.PRUNED:
            what = f"pruned after epoch {max(watched_values(trial))}"
        case _:
            what = f"failed: {trial.user_attrs.get('reason', '')}"
    return f"trial {trial.number}: {what} ({drawn})"
