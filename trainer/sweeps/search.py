"""The search loop: gives trials to slots, prunes and retries them, until a budget is used up."""

import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from optuna.trial import TrialState

from trainer.cluster import WorkerFailed
from trainer.errors import ConfigError, RunError, first_line
from trainer.messages import RunEnded
from trainer.store.directory import RunDirectory
from trainer.sweeps.budget import Budget
from trainer.sweeps.loggers import TrialLoggers
from trainer.sweeps.measures import not_finite, parse_constraints, requested, violations
from trainer.sweeps.plan import Plan
from trainer.sweeps.pool import Pool, Slot, TrialEnded, TrialMessage, TrialRequeued
from trainer.sweeps.shared_phases import SharedPhases
from trainer.sweeps.show import LiveTable
from trainer.sweeps.study import SweepStudy, reported_values
from trainer.sweeps.trial import Trial, folder_of

MAX_WAITING = 8  # trials that may wait for phases that another one trains
LOOK_EVERY_S = 0.25  # interval of checks of signals, budgets and the live table


class Search:
    """One session of a sweep: resumes trials that earlier ones left, then starts new ones."""

    def __init__(
        self,
        plan: Plan,
        study: SweepStudy,
        pool: Pool,
        table: LiveTable,
        budget: Budget,
        directory: RunDirectory,
    ) -> None:
        self._plan, self._cfg = plan, plan.cfg.sweep
        self._study, self._pool, self._table = study, pool, table
        self._budget, self._directory = budget, directory
        self._bounds = parse_constraints(self._cfg)
        self._shared_phases = SharedPhases(self._cfg.shared_phases, directory.path)
        name = f"{plan.cfg.name}/{self._cfg.name}"
        self._loggers = TrialLoggers(directory.path, name, table.say)
        self._trials: dict[int, Trial] = {}  # started and not ended, by number
        self._reported: dict[int, set[int]] = {}  # epochs reported, by trial
        self._waiting: list[int] = []  # those of the trials that no slot runs
        self._began = False  # a trial has sent a message in this session
        self._refused: list[dict[str, Any]] = []  # parameters of trials that could not begin
        self._stopping = False  # no trial is started any more
        self._exhausted = False  # every combination of the grid was drawn
        self._shown = 0.0  # time at which the live table was updated

    def run(self, interrupted: Callable[[], bool]) -> None:
        """Run trials until a budget is used up.

        Args:
            interrupted: whether to start no more trials and end those that run.

        Raises:
            ConfigError: no trial can begin with these settings.
            RunError: no slot has workers any more.
        """
        for number in self._study.unfinished():
            if self._begin(number, self._study.reported(number)):
                self._waiting.append(number)
        while True:
            self._look_at_budgets(interrupted())
            self._show()
            if not self._stopping:
                self._pool.follow_cluster()
            self._hand_out()
            if not self._pool.busy and (self._stopping or not self._more()):
                return
            event = self._pool.event(LOOK_EVERY_S)
            if event is not None:
                self._on(event)

    def pause(self) -> None:
        """Close the trials that have not ended, for the next session."""
        for trial in self._trials.values():
            self._pause(trial)
        self._loggers.close()

    def _on(self, event: TrialMessage | TrialEnded | TrialRequeued) -> None:
        number = event.slot.trial
        assert number is not None
        match event:
            case TrialMessage():
                self._listen(event.slot, self._trials[number], event.message)
            case TrialEnded():
                event.slot.trial = None
                self._end(self._trials[number], event.error)
            case TrialRequeued():
                event.slot.trial = None
                self._wait(self._trials[number])

    def _listen(self, slot: Slot, trial: Trial, message: Any) -> None:
        self._began = True
        self._loggers.on(trial.number, message)
        if trial.error:
            return
        try:
            report = trial.on(message)
        except Exception as error:  # such as a full disk, which may not affect other trials
            trial.error = error
            slot.stop_trial()
            return
        if report is None or trial.pruned:
            return
        epoch, value = report
        if epoch in self._reported[trial.number]:  # by an attempt before the checkpoint
            return
        self._reported[trial.number].add(epoch)
        self._budget.count_epoch()
        if self._study.report(trial.number, epoch, value) and epoch < trial.epochs:
            trial.pruned = True
            slot.stop_trial()

    def _end(self, trial: Trial, error: Exception | None) -> None:
        """Record the result of a trial, or let it wait for another attempt."""
        error = trial.error or error
        self._study.record_usage(trial.number, trial.usage)
        if trial.pruned:
            self._study.prune(trial.number)
        elif error is not None:
            self._fail(trial, error)
            return
        elif trial.stopped:  # to be continued by the next session
            self._wait(trial)
            return
        else:
            measured = trial.measured()
            if bad := not_finite(self._cfg, measured):
                self._fail(trial, RunError(bad))
                return
            self._study.complete(trial.number, measured, violations(self._bounds, measured))
        self._forget(trial)

    def _fail(self, trial: Trial, error: Exception) -> None:
        """Let the trial wait for another attempt, or record that it failed.

        Raises `error` if it seems that no trial can begin.
        """
        wrong = isinstance(error, ConfigError)
        if wrong and not self._anything_began() and not _is_wrong(trial.experiment):
            if trial.drawn not in self._refused:
                self._refused.append(trial.drawn)
            if len(self._refused) > 1 or not (self._pool.busy or self._more()):
                raise error
        self._directory.log(_detail(error))
        reason = first_line(error)
        if isinstance(error, WorkerFailed) and error.has_left:  # not by the trial
            self._table.say(f"trial {trial.number}: {reason}; it continues on another host")
            self._wait(trial)
            return
        failures = self._study.record_failure(trial.number, reason)
        if failures <= self._cfg.max_retries and not wrong:
            self._table.say(f"trial {trial.number}: {reason}; it starts again")
            self._wait(trial)
        else:
            self._study.fail(trial.number, reason)
            self._forget(trial)

    def _anything_began(self) -> bool:
        """Whether a trial has begun to train, in this or an earlier session."""
        return self._began or any(
            trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or reported_values(trial)
            for trial in self._study.trials()
        )

    def _forget(self, trial: Trial) -> None:
        """Remove a trial that has ended, with its checkpoints."""
        trial.forget()
        self._end_logging(trial)
        del self._trials[trial.number], self._reported[trial.number]
        self._table.ended(self._study.trial(trial.number))

    def _end_logging(self, trial: Trial) -> None:
        """Report the result of a trial to the loggers."""
        ended = self._study.trial(trial.number)
        last = trial.records[-1] if trial.records else {}
        summary = {
            "status": {TrialState.COMPLETE: "done", TrialState.FAIL: "failed"}.get(
                ended.state, "interrupted"
            ),
            "error": ended.user_attrs.get("reason"),
            # Of validation data: trials do not see the test set.
            **{name: last.get(name) for name in self._plan.directions},
            "loss": last.get("loss"),
        }
        self._loggers.on(trial.number, RunEnded(summary))
        self._loggers.end(trial.number)

    def _wait(self, trial: Trial) -> None:
        """Let the next attempt of a trial wait for a slot."""
        self._pause(trial)
        self._loggers.end(trial.number)
        self._waiting.append(trial.number)

    def _pause(self, trial: Trial) -> None:
        try:
            trial.pause()
        except RunError as error:
            self._table.say(f"trial {trial.number}: {error}; the checkpoint before it is used")

    def _hand_out(self) -> None:
        while self._pool.free and not self._stopping:
            number = self._next()
            if number is None:
                return
            trial = self._trials[number]
            try:
                start = trial.start(self._table.say)
            except Exception as error:  # initial weights or checkpoints
                self._fail(trial, error)
                continue
            assert trial.resumed is not None
            self._loggers.begin(number, trial.experiment, trial.resumed)
            experiment = trial.experiment.for_workers()
            self._pool.take().run(number, experiment, start, requested(self._cfg))

    def _next(self) -> int | None:
        """A trial to run now: one that waits, or a new one; None: there is none."""
        for number in self._waiting:
            if not self._must_wait(number):
                self._waiting.remove(number)
                return number
        while self._may_begin() and len(self._waiting) < MAX_WAITING:
            asked = self._study.new_trial()
            if asked is None:
                self._exhausted = True
                return None
            self._budget.count_trial(asked)
            # The folder may be a remainder of another study, or of one that lost its last seconds.
            shutil.rmtree(folder_of(self._directory.path, asked), ignore_errors=True)
            if not self._begin(asked):
                continue
            if not self._must_wait(asked):
                return asked
            self._waiting.append(asked)
        return None

    def _must_wait(self, number: int) -> bool:
        """Whether another trial is training the phases that this one shares."""
        shared = self._trials[number].shared
        if shared is None or self._shared_phases.ready(shared):
            return False
        return any(
            trial.shared == shared and other != number and other not in self._waiting
            for other, trial in self._trials.items()
        )

    def _begin(self, number: int, reported: Iterable[int] = ()) -> bool:
        """Start a trial. One whose settings contradict each other fails at once.

        Args:
            reported: epochs that earlier attempts have reported.

        Returns:
            Whether it can be run.
        """
        drawn = self._study.start(number)
        try:
            experiment = self._plan.trial(drawn)
        except ConfigError as error:
            self._study.fail(number, str(error))
            self._table.ended(self._study.trial(number))
            return False
        path = self._directory.path
        self._trials[number] = Trial(
            number, drawn, experiment, self._cfg, path, self._shared_phases
        )
        self._reported[number] = set(reported)
        self._trials[number].usage |= self._study.usage(number)
        return True

    def _may_begin(self) -> bool:
        return not self._exhausted and self._budget.room_for_a_trial()

    def _more(self) -> bool:
        return bool(self._waiting) or self._may_begin()

    def _look_at_budgets(self, interrupted: bool) -> None:
        """End all trials if a budget is used up or there was a signal."""
        self._budget.keep(now=False)
        if interrupted or (not self._stopping and self._budget.used_up()):
            self._stopping = True
            self._pool.stop_trials()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._shown >= LOOK_EVERY_S:
            self._shown = now
            self._loggers.show_problems()
            self._table.show(self._trials, self._study, self._budget.left())


def _is_wrong(experiment: Any) -> bool:
    """Whether the settings of a trial contradict each other."""
    from trainer.experiment import check_model  # imports torch, which slows down the start

    try:
        check_model(experiment)
    except ConfigError:
        return True
    return False


def _detail(error: Exception) -> str:
    """Text for the log: the traceback of the worker, or of this process."""
    return getattr(error, "detail", "") or "".join(traceback.format_exception(error)).rstrip("\n")
