"""A sweep in the terminal: a live table of its trials, and a line for each trial that ended."""

import time
from collections.abc import Mapping, Sequence

import rich.box
import rich.table
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from trainer.config import SweepConfig
from trainer.report.output import Terminal, live_display, wrap
from trainer.report.text import duration
from trainer.store.directory import RunDirectory
from trainer.sweeps.labels import format_measure, format_settings, format_values
from trainer.sweeps.space import GRID_LIMIT, Space
from trainer.sweeps.study import SweepStudy, reported_values
from trainer.sweeps.trial import Trial

PLAIN_EVERY_S = 60.0  # between progress lines, if the output is not a terminal
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class LiveTable:
    """Shows a running sweep: a live table in a terminal, and lines, which also go to log.txt.

    A context manager: the live table disappears at its end."""

    def __init__(
        self,
        cfg: SweepConfig,
        directory: RunDirectory,
        total: int | None = None,
        quiet: bool = False,
    ) -> None:
        """Prepare the display.

        Args:
            cfg: the section `sweep`.
            directory: the sweep's folder, with the log.
            total: trials that the sweep makes (`total_trials`); None: no fixed number.
            quiet: print nothing; the log is the same.
        """
        self.terminal = Terminal()
        self.terminal.quiet = quiet
        self._cfg, self._directory, self._total = cfg, directory, total
        self._live = live_display(self.terminal)
        self._speed = _Speed()
        self._last_line = time.monotonic()

    def __enter__(self) -> "LiveTable":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the live table."""
        if self._live:
            self._live.stop()

    def restore(self) -> None:
        """Show the cursor again, for a process that ends without closing this."""
        self.terminal.show_cursor()

    def say(self, line: str, *, wrapped: bool = False) -> None:
        """Print one line above the live table, and log it.

        Args:
            wrapped: break it between words in a terminal; not for paths and commands.
        """
        self._directory.log(line)  # first, so that every line that the user has seen is in the log
        shown = wrap(self.terminal, line) if wrapped else line
        self.terminal.print(shown, markup=False, soft_wrap=True)

    def ended(self, trial: FrozenTrial) -> None:
        """Print how a trial ended."""
        self.say(describe(trial, list(self._cfg.objectives)), wrapped=True)

    def show(self, running: Mapping[int, Trial], study: SweepStudy, left: float | None) -> None:
        """Update the live table; without a terminal, print a line once a minute.

        Args:
            running: the trials that have not ended, by number.
            left: seconds of the time budget; None: no limit.
        """
        if not self._live:
            if time.monotonic() - self._last_line >= PLAIN_EVERY_S:
                self._last_line = time.monotonic()
                self.say(self._progress(study, left))
            return
        title = self._progress(study, left)
        if study.leader:
            values = format_values(self._cfg.objectives, study.leader.values)
            title += f"\nbest: trial {study.leader.number}, {values}"
        self._live.update(Group(Text(title), self._table(running)), refresh=True)

    def _progress(self, study: SweepStudy, left: float | None) -> str:
        """Text: how many trials have ended, and the time left (budget or estimate, if shorter)."""
        ended = sum(study.counts.get(state, 0) for state in _ENDED)
        estimate = self._speed.time_left(ended, self._total)
        text = tally(study.counts, self._total)
        if estimate is not None and (left is None or estimate < left):
            return f"{text}; about {duration(estimate)} left"
        return text if left is None else f"{text}; {duration(left)} left"

    def _table(self, running: Mapping[int, Trial]) -> rich.table.Table:
        """One line for each running trial; settings that do not fit are cut."""
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            header_style="bold cyan",
            expand=True,
        )
        for column in ("trial", "epoch", self._cfg.metric):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
        for number, trial in sorted(running.items()):
            value = "" if trial.value is None else format_measure(self._cfg.metric, trial.value)
            settings = escape(format_settings(trial.drawn))
            table.add_row(str(number), f"{trial.epoch}/{trial.epochs}", value, settings)
        return table


class _Speed:
    """Estimates the time left from the trials that ended since the sweep was started."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before: int | None = None  # trials that had ended by then

    def time_left(self, ended: int, total: int | None) -> float | None:
        """Seconds until all trials have ended; None: not known (yet)."""
        if self._before is None:
            self._before = ended
        if total is None or ended <= self._before:
            return None
        seconds_per_trial = (time.monotonic() - self._began) / (ended - self._before)
        return max(0, total - ended) * seconds_per_trial


def total_trials(cfg: SweepConfig, space: Space) -> int | None:
    """The number of trials of a sweep, unless another budget ends it earlier.

    Returns:
        None if neither `sweep.trials` nor a grid limits the number.
    """
    grid = len(space.grid(GRID_LIMIT)) if cfg.sampler == "grid" else None
    return min((count for count in (cfg.trials, grid) if count is not None), default=None)


def tally(states: Mapping[TrialState, int], total: int | None = None) -> str:
    """Text: the number of trials in each state.

    Args:
        states: number of trials in each state.
        total: trials that the sweep makes; None: no fixed number.
    """
    counts = [
        (states.get(TrialState.COMPLETE, 0), "complete"),
        (states.get(TrialState.PRUNED, 0), "pruned"),
        (states.get(TrialState.FAIL, 0), "failed"),
        (states.get(TrialState.RUNNING, 0), "running"),
    ]
    text = ", ".join(f"{count} {state}" for count, state in counts if count) or "none yet"
    ended = sum(count for count, state in counts if state != "running")
    return text if total is None else f"{ended} of {total} trials ended: {text}"


def describe(trial: FrozenTrial, objectives: Sequence[str]) -> str:
    """One line about a trial that ended."""
    match trial.state:
        case TrialState.COMPLETE:
            result = format_values(objectives, trial.values)
        case TrialState.PRUNED:
            result = f"pruned after epoch {max(reported_values(trial))}"
        case _:
            result = f"failed: {trial.user_attrs.get('reason', '')}"
    return f"trial {trial.number}: {result} ({format_settings(trial.params)})"
