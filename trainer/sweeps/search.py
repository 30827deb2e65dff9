"""The search: hand trials out to slots, listen, prune, retry, tell; until a budget is used up."""

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
from trainer.sweeps.measures import needs_artifact, not_finite, parse_constraints, violations
from trainer.sweeps.plan import Plan
from trainer.sweeps.pool import Pool
from trainer.sweeps.shared_phases import SharedPhases
from trainer.sweeps.show import LiveTable
from trainer.sweeps.slots import Ended, GivenBack, Said, Slot
from trainer.sweeps.study import SweepStudy, reported_values
from trainer.sweeps.trial import Trial, folder_of

MOST_WAITING = 8  # trials that wait for what another one trains, before no more are drawn
LOOK_EVERY_S = 0.25  # at signals, budgets and the live table


class Search:
    """One session of a sweep, from the trials that an earlier one left to the end of a budget."""

    def __init__(
        self,
        plan: Plan,
        study: SweepStudy,
        pool: Pool,
        board: LiveTable,
        budget: Budget,
        directory: RunDirectory,
    ) -> None:
        self._plan, self._cfg = plan, plan.cfg.sweep
        self._study, self._pool, self._board = study, pool, board
        self._budget, self._directory = budget, directory
        self._bounds = parse_constraints(self._cfg)
        self._prefixes = SharedPhases(self._cfg.shared_phases, directory.path)
        name = f"{plan.cfg.name}/{self._cfg.name}"
        self._loggers = TrialLoggers(directory.path, name, board.say)
        self._trials: dict[int, Trial] = {}  # that were taken up and have not ended
        self._reported: dict[int, set[int]] = {}  # epochs, by trial
        self._waiting: list[int] = []  # of the trials, those that no slot runs
        self._began = False  # a trial has told something in this session
        self._refused: list[dict[str, Any]] = []  # what trials drew that could not even begin
        self._stopping = False  # nothing new is started
        self._exhausted = False  # a grid has come to its end
        self._shown = 0.0  # when the live table was

    def run(self, interrupted: Callable[[], bool]) -> None:
        """Go on until there is nothing left to do.

        Args:
            interrupted: whether to start nothing new, and let what runs save and end.

        Raises:
            ConfigError: no trial has ever begun, and none could.
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
        """Leave the trials that have not ended to the next session."""
        for trial in self._trials.values():
            self._pause(trial)
        self._loggers.close()

    def _on(self, event: Said | Ended | GivenBack) -> None:
        number = event.slot.trial
        assert number is not None
        match event:
            case Said():
                self._listen(event.slot, self._trials[number], event.message)
            case Ended():
                event.slot.trial = None
                self._end(self._trials[number], event.error)
            case GivenBack():
                event.slot.trial = None
                self._wait(self._trials[number])

    def _listen(self, slot: Slot, trial: Trial, message: Any) -> None:
        self._began = True
        self._loggers.on(trial.number, message)
        if trial.error:
            return
        try:
            report = trial.on(message)
        except Exception as error:  # such as a disk that is full: no other trial need meet it
            trial.error = error
            slot.stop_trial()
            return
        if report is None or trial.pruned:
            return
        epoch, value = report
        if epoch in self._reported[trial.number]:  # an attempt that began at a checkpoint
            return
        self._reported[trial.number].add(epoch)
        self._budget.count_epoch()
        if self._study.report(trial.number, epoch, value) and epoch < trial.epochs:
            trial.pruned = True
            slot.stop_trial()

    def _end(self, trial: Trial, error: Exception | None) -> None:
        """Tell what became of a trial, or let it wait for another attempt."""
        error = trial.error or error
        if trial.pruned:
            self._study.prune(trial.number)
        elif error is not None:
            self._fail(trial, error)
            return
        elif trial.stopped:  # goes on another time
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
        """Let the trial wait for another attempt, or tell that it failed.

        Raises `error` where, for all that is known, no trial can begin.
        """
        wrong = isinstance(error, ConfigError)
        if wrong and not self._anything_began() and not _is_wrong(trial.experiment):
            if trial.drawn not in self._refused:
                self._refused.append(trial.drawn)
            if len(self._refused) > 1 or not (self._pool.busy or self._more()):
                raise error
        self._directory.log(_detail(error))
        reason = first_line(error)
        if _host_has_left(error):
            self._board.say(f"trial {trial.number}: {reason}; it continues on another host")
            self._wait(trial)
            return
        failures = self._study.record_failure(trial.number, reason)
        if failures <= self._cfg.max_retries and not wrong:
            self._board.say(f"trial {trial.number}: {reason}; it starts again")
            self._wait(trial)
        else:
            self._study.fail(trial.number, reason)
            self._forget(trial)

    def _anything_began(self) -> bool:
        """Whether a trial of this sweep, also of an earlier session, has got as far as to train."""
        return self._began or any(
            trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or reported_values(trial)
            for trial in self._study.trials()
        )

    def _forget(self, trial: Trial) -> None:
        """The trial has ended."""
        trial.forget()
        self._end_logging(trial)
        del self._trials[trial.number], self._reported[trial.number]
        self._board.ended(self._study.trial(trial.number))

    def _end_logging(self, trial: Trial) -> None:
        """Tell the loggers how a trial has ended."""
        ended = self._study.trial(trial.number)
        last = trial.records[-1] if trial.records else {}
        summary = {
            "status": {TrialState.COMPLETE: "done", TrialState.FAIL: "failed"}.get(
                ended.state, "interrupted"
            ),
            "error": ended.user_attrs.get("reason"),
            "accuracy": last.get("accuracy"),  # validation: trials do not see the test set
            "loss": last.get("loss"),
        }
        self._loggers.on(trial.number, RunEnded(summary))
        self._loggers.end(trial.number)

    def _wait(self, trial: Trial) -> None:
        """The trial's next attempt waits for a slot."""
        self._pause(trial)
        self._loggers.end(trial.number)
        self._waiting.append(trial.number)

    def _pause(self, trial: Trial) -> None:
        try:
            trial.pause()
        except RunError as error:
            self._board.say(f"trial {trial.number}: {error}; the one before it is used")

    def _hand_out(self) -> None:
        while self._pool.free and not self._stopping:
            number = self._next()
            if number is None:
                return
            trial = self._trials[number]
            try:
                start = trial.start(self._board.say)
            except Exception as error:  # its weights to begin with, its checkpoints
                self._fail(trial, error)
                continue
            assert trial.resumed is not None
            self._loggers.begin(number, trial.experiment, trial.resumed)
            self._pool.take().run(number, trial.experiment, start, needs_artifact(self._cfg))

    def _next(self) -> int | None:
        """A trial to run now: one that waits, or a new one; None where there is none."""
        for number in self._waiting:
            if not self._must_wait(number):
                self._waiting.remove(number)
                return number
        while self._may_begin() and len(self._waiting) < MOST_WAITING:
            asked = self._study.new_trial()
            if asked is None:
                self._exhausted = True
                return None
            self._budget.count_trial(asked)
            # What another study, or one that lost its last moments, left under this number.
            shutil.rmtree(folder_of(self._directory.path, asked), ignore_errors=True)
            if not self._begin(asked):
                continue
            if not self._must_wait(asked):
                return asked
            self._waiting.append(asked)
        return None

    def _must_wait(self, number: int) -> bool:
        """Whether another trial is just training what this one will go on from."""
        prefix = self._trials[number].prefix
        if prefix is None or self._prefixes.ready(prefix):
            return False
        return any(
            trial.prefix == prefix and other != number and other not in self._waiting
            for other, trial in self._trials.items()
        )

    def _begin(self, number: int, reported: Iterable[int] = ()) -> bool:
        """Make the trial; one whose values do not go together fails at once.

        Args:
            reported: epochs that earlier attempts have reported.
        """
        drawn = self._study.start(number)
        try:
            experiment = self._plan.trial(drawn)
        except ConfigError as error:
            self._study.fail(number, str(error))
            self._board.ended(self._study.trial(number))
            return False
        path = self._directory.path
        self._trials[number] = Trial(number, drawn, experiment, self._cfg, path, self._prefixes)
        self._reported[number] = set(reported)
        return True

    def _may_begin(self) -> bool:
        return not self._exhausted and self._budget.room_for_a_trial()

    def _more(self) -> bool:
        return bool(self._waiting) or self._may_begin()

    def _look_at_budgets(self, interrupted: bool) -> None:
        """Start nothing new, and let what runs save and end, once there is a reason to."""
        self._budget.keep(now=False)
        if interrupted or (not self._stopping and self._budget.used_up()):
            self._stopping = True
            self._pool.stop_trials()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._shown >= LOOK_EVERY_S:
            self._shown = now
            self._loggers.show_problems()
            self._board.show(self._trials, self._study, self._budget.left())


def _is_wrong(experiment: Any) -> bool:
    """Whether the settings of a trial do not fit together: values between the ends of ranges."""
    try:
        experiment.check_model()
    except ConfigError:
        return True
    return False


def _host_has_left(error: Exception) -> bool:
    """Whether a worker was lost because its host left the cluster, which is no fault of a trial."""
    return isinstance(error, WorkerFailed) and "its node has died" in error.detail


def _detail(error: Exception) -> str:
    """For the log: a worker's traceback, or where in this process it came from."""
    return getattr(error, "detail", "") or "".join(traceback.format_exception(error)).rstrip("\n")
