"""The sweep: hand trials out to slots, listen, prune, retry, tell; until a budget is used up."""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from trainer.config import Config
from trainer.errors import ConfigError, Interrupted, RunError, first_line
from trainer.report.directory import RunDirectory
from trainer.report.sheets import rich_table
from trainer.signals import Signals
from trainer.sweep.measures import measure, parse_constraints, violations
from trainer.sweep.plan import Plan
from trainer.sweep.pool import Pool
from trainer.sweep.prefix import Prefixes
from trainer.sweep.results import Results
from trainer.sweep.show import Board
from trainer.sweep.slots import Ended, GivenBack, Said, Slot
from trainer.sweep.study import Ledger
from trainer.sweep.trial import Trial

INTERRUPTED = "interrupted"  # status, and why a sweep stops
MOST_WAITING = 8  # trials that wait for what another one trains, before no more are drawn
LOOK_EVERY_S = 0.25  # at signals and budgets


def run_sweep(
    cfg: Config, base: DictConfig, folder: Path, arguments: list[str], signals: Signals
) -> dict[str, Any] | None:
    """Search `cfg.sweep.params`, or go on where the sweep in `folder` stopped.

    Args:
        cfg: typed.
        base: the same as composed, interpolations not resolved.
        folder: the sweep's own; made if need be.
        arguments: the command line, for the commands that repeat a trial.
        signals: the first one saves and ends the sweep, the second one ends it at once.

    Returns:
        The plain configuration of the best trial where `sweep.refit` wants it run in full.

    Raises:
        ConfigError: before anything started; a new folder is not left behind.
        RunError: no trial was completed, or no workers could be had.
        Interrupted: likewise; the same command goes on.
    """
    plan = Plan(cfg, base)
    folder = folder.resolve()
    new = not folder.exists()
    directory = RunDirectory.claim(folder) if new else RunDirectory(folder)
    try:
        if new or not (folder / "config.yaml").exists():
            settings = OmegaConf.to_container(base, resolve=False)
            assert isinstance(settings, dict)
            directory.write_config({str(key): value for key, value in settings.items()})
        with directory.locked():
            return _Sweep(plan, directory, arguments, signals).execute()
    except ConfigError:
        if new:
            directory.discard()
        raise
    except OSError as error:
        raise RunError(f"{folder}: it cannot be written to: {error}") from error


class _Sweep:
    def __init__(
        self, plan: Plan, directory: RunDirectory, arguments: list[str], signals: Signals
    ) -> None:
        self.plan, self.cfg, self.sweep = plan, plan.cfg, plan.cfg.sweep
        self.directory, self.signals = directory, signals
        self.arguments = arguments
        self.bounds = parse_constraints(self.sweep)
        self.board = Board(self.sweep, directory)
        self.pool = Pool(self.cfg, self.board.say)
        self.trials: dict[int, Trial] = {}  # that have begun and not ended
        self.reported: dict[int, set[int]] = {}  # epochs, by trial
        self.waiting: list[int] = []  # of them, those that no slot runs
        self.interrupted = False  # by the first signal
        self.stopping: str | None = None  # why nothing new is started
        self.exhausted = False  # a grid has come to its end
        self.prefixes = Prefixes(self.sweep.prefix, directory.path)

    def execute(self) -> dict[str, Any] | None:
        """Search, and leave the results. Returns as `run_sweep`."""
        with self.signals.holding(self.board.restore, self._interrupt):
            try:
                self._open()
                with self.board, closing(self.ledger):
                    return self._search()
            finally:
                self.pool.close()

    def _interrupt(self) -> None:
        """The first signal. Within its handler, no more than this can be done safely."""
        self.interrupted = True

    def _open(self) -> None:
        with ThreadPoolExecutor(1) as background:
            checked = background.submit(self.plan.check)
            try:
                self.pool.open()
            except RunError:
                checked.result()  # a wrong configuration would explain more
                raise
            epochs = checked.result()
        self.ledger = Ledger(
            self.sweep, self.plan.space, self.cfg.name, self.cfg.seed, self.directory.path, epochs
        )
        self.ledger.note(self.plan.identity(), self.arguments)
        self.results = Results(self.plan, self.ledger, self.directory)
        self.epochs = self.ledger.epochs()
        self.count = len(self.ledger.trials())
        self.began = time.monotonic() - self.ledger.seconds

    def _search(self) -> dict[str, Any] | None:
        for number in self.ledger.unfinished():
            if self._begin(number, self.ledger.reported(number)):
                self.waiting.append(number)
        status, error = "failed", "ended at once"
        try:
            self._loop()
            status, error = "done", ""
            if self.interrupted:
                raise self.signals.interrupted()
            if not self.ledger.trials(TrialState.COMPLETE):
                status, error = "failed", "no trial was completed"
                raise RunError(f"{error} (more in {self.directory.path}/log.txt)")
        except Interrupted as interrupted:
            status, error = INTERRUPTED, str(interrupted)
            raise
        except Exception as raised:
            status, error = "failed", first_line(raised)
            raise
        finally:
            for trial in self.trials.values():
                trial.pause()
            self.ledger.note_seconds(self._seconds())
            self.results.write(status, error or None, self._seconds())
            self.board.close()
            self.board.terminal.print(self.results.table())
            for sheet in self.results.answer.sheets:
                self.board.terminal.print(rich_table(sheet))
            for sentence in self.results.answer.sentences:
                self.board.say(sentence)
            self.board.say(f"results in {self.directory.path}")
        best = self.ledger.best()
        if not self.sweep.refit or not best:
            return None
        return self.plan.winner(best[0].params)

    def _loop(self) -> None:
        while True:
            self._look_at_signals_and_budgets()
            if not self.stopping:
                self.pool.follow_cluster()
            self._hand_out()
            if not self.pool.busy and (self.stopping or not self._more()):
                return
            event = self.pool.event(LOOK_EVERY_S)
            if event is None:
                self.board.show(self.trials, self.ledger.trials, self._left())
            else:
                self._on(event)

    def _on(self, event: Said | Ended | GivenBack) -> None:
        number = event.slot.trial
        assert number is not None
        match event:
            case Said():
                self._listen(event.slot, self.trials[number], event.message)
            case Ended():
                event.slot.trial = None
                self._end(self.trials[number], event.error)
            case GivenBack():
                event.slot.trial = None
                self._wait(self.trials[number])

    def _listen(self, slot: Slot, trial: Trial, message: Any) -> None:
        report = trial.on(message)
        if report is None or trial.pruned:
            return
        epoch, value = report
        if epoch in self.reported[trial.number]:  # an attempt that began at a checkpoint
            return
        self.reported[trial.number].add(epoch)
        self.epochs += 1
        if self.ledger.report(trial.number, epoch, value) and epoch < trial.epochs:
            trial.pruned = True
            slot.stop_trial()

    def _end(self, trial: Trial, error: Exception | None) -> None:
        """Tell what became of a trial, or let it wait for another attempt."""
        number = trial.number
        if trial.pruned:
            self.ledger.prune(number)
        elif error is not None:
            self.directory.log(getattr(error, "detail", "") or repr(error))
            reason = first_line(error)
            failures = self.ledger.failed_once_more(number, reason)
            if failures <= self.sweep.max_retries and not isinstance(error, ConfigError):
                self.board.say(f"trial {number}: {reason}; it starts again")
                self._wait(trial)
                return
            self.ledger.fail(number, reason)
        elif trial.stopped:  # goes on another time
            self._wait(trial)
            return
        else:
            measured = measure(trial.records)
            self.ledger.complete(number, measured, violations(self.bounds, measured))
        trial.forget()
        del self.trials[number], self.reported[number]
        self.board.ended(self.ledger.trial(number))

    def _wait(self, trial: Trial) -> None:
        """The trial's next attempt waits for a slot."""
        trial.pause()
        self.waiting.append(trial.number)

    def _hand_out(self) -> None:
        while self.pool.free and not self.stopping:
            number = self._next()
            if number is None:
                return
            trial = self.trials[number]
            self.pool.take().run(number, trial.cfg, trial.start(self.board.say))
            self.board.show(self.trials, self.ledger.trials, self._left())

    def _next(self) -> int | None:
        """A trial to run now: one that waits, or a new one; None where there is none."""
        for number in self.waiting:
            if not self._must_wait(number):
                self.waiting.remove(number)
                return number
        while self._may_begin() and len(self.waiting) < MOST_WAITING:
            asked = self.ledger.ask()
            if asked is None:
                self.exhausted = True
                return None
            self.count = asked + 1
            if not self._begin(asked):
                continue
            if not self._must_wait(asked):
                return asked
            self.waiting.append(asked)
        return None

    def _must_wait(self, number: int) -> bool:
        """Whether another trial is just training what this one will go on from."""
        prefix = self.trials[number].prefix
        if prefix is None or self.prefixes.ready(prefix):
            return False
        return any(
            trial.prefix == prefix and other != number and other not in self.waiting
            for other, trial in self.trials.items()
        )

    def _begin(self, number: int, reported: Iterable[int] = ()) -> bool:
        """Make the trial; one whose values do not go together fails at once.

        Args:
            reported: epochs that earlier attempts have reported.
        """
        drawn = self.ledger.take_up(number)
        try:
            cfg = self.plan.trial(drawn)
        except ConfigError as error:
            self.ledger.fail(number, str(error))
            return False
        self.trials[number] = Trial(
            number, drawn, cfg, self.sweep, self.directory.path, self.prefixes
        )
        self.reported[number] = set(reported)
        return True

    def _may_begin(self) -> bool:
        limit = self.sweep.trials
        return not self.exhausted and (limit is None or self.count < limit)

    def _more(self) -> bool:
        return bool(self.waiting) or self._may_begin()

    def _look_at_signals_and_budgets(self) -> None:
        if self.interrupted and self.stopping != INTERRUPTED:
            self._stop(INTERRUPTED)
            # At once, since a second signal would leave no time for it.
            error = str(self.signals.interrupted())
            self.results.write(INTERRUPTED, error, self._seconds(), report=False)
        if self.stopping:
            return
        if self.sweep.seconds is not None and self._seconds() > self.sweep.seconds:
            self._stop("sweep.seconds is used up")
        elif self.sweep.epochs is not None and self.epochs >= self.sweep.epochs:
            self._stop("sweep.epochs is used up")

    def _stop(self, why: str) -> None:
        """Start nothing new, and let what runs save and end."""
        self.stopping = why
        self.pool.stop_trials()

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _left(self) -> float | None:
        """Seconds until the time is used up; None: no limit."""
        return None if self.sweep.seconds is None else self.sweep.seconds - self._seconds()
