"""The study of a sweep: all trials and their results, in a storage of Optuna.

A sweep that was killed continues from it. Each trial is created in one transaction. During the
sweep nothing is read from the storage: the trials are in memory as well, so that the time for each
trial does not grow with their number. Only the driver's main thread uses it.
"""

import copy
import datetime
import json
import math
import re
import sqlite3
import uuid
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from trainer.config import SweepConfig
from trainer.errors import ConfigError, RunError, first_line
from trainer.sweeps.algorithms import PrunerStudy, SamplerStudy, direction
from trainer.sweeps.space import GRID_LIMIT, Space

OWNER, RESULT, VALUES = "owner", "result", "values"  # attributes of a trial
FAILURES, REASON, USAGE = "failures", "reason", "usage"
SECONDS, SETTINGS = "seconds", "settings"  # attributes of the study
FIXED = "fixed_params"  # Optuna's own attribute of a trial: parameters that are not drawn


class SweepStudy:
    """All trials of a sweep. Call `record_settings` before anything else."""

    def __init__(
        self,
        cfg: SweepConfig,
        space: Space,
        name: str,
        seed: int,
        folder: Path,
        epochs: int,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
    ) -> None:
        """Open the storage, or create it.

        Args:
            name: of the experiment; the study is called NAME/SWEEP.
            seed: of the sampler.
            folder: of the sweep.
            epochs: largest number of epochs of a trial.
            sampler: one of the user's own.
            pruner: one of the user's own.

        Raises:
            ConfigError: the storage that `sweep.storage` names cannot be opened.
            RunError: study.db in the folder cannot be opened.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._cfg, self._space, self._seed, self._epochs = cfg, space, seed, epochs
        self._own = sampler, pruner
        self._private = cfg.storage is None
        try:
            self._owner = None if self._private else _owner_of(folder)
            self._storage = open_storage(cfg.storage, folder)
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=f"{name}/{cfg.name}",
                directions=[direction(each) for each in cfg.objectives.values()],
                load_if_exists=True,
            )
        except Exception as error:  # of any database driver
            # Optuna does not say which module it lacks.
            reason = first_line((isinstance(error, ImportError) and error.__cause__) or error)
            if self._private:
                raise RunError(f"{private_file(folder)}: {reason}") from error
            shown = f"sweep.storage={without_password(cfg.storage)}: {reason}"
            raise ConfigError(shown) from error
        self._study_id = self._storage.get_study_id_from_name(self.study.study_name)
        self._ids: dict[int, int] = {}  # of trials in the storage, by number
        self._trials: dict[int, FrozenTrial] = {}
        self._counts: Counter[TrialState] = Counter()
        self._epochs_reported = 0
        self.new = False  # created by this session
        self.leader: FrozenTrial | None = None  # the best trial so far in the first objective

    def record_settings(self, settings: Mapping[str, Any]) -> None:
        """Store the settings in a new study, or compare them with those of an existing one.

        Raises:
            ConfigError: the study belongs to a sweep with other settings.
        """
        text = json.dumps(settings, sort_keys=True)
        known = self.study.user_attrs.get(SETTINGS)
        if known is None:
            self.new = True
            self.study.set_metric_names(list(self._cfg.objectives))
            self.study.set_user_attr(SETTINGS, text)  # last: with it, the study is complete
        elif known != text:
            changed = [
                key
                for key in {**json.loads(known), **settings}
                if json.loads(known).get(key) != json.loads(text).get(key)
            ]
            raise ConfigError(
                f"sweep.name={self._cfg.name}: there is a sweep of that name with another "
                f"{', '.join(sorted(changed))}; choose another sweep.name, or the same settings"
            )
        self._read()

    def _read(self) -> None:
        sampler, pruner = self._own
        if sampler is not None and self.study.get_trials(deepcopy=False):
            sampler.reseed_rng()  # it was built with the same seed as that of the earlier session
        self._sampler = SamplerStudy(self._cfg, self._space, self._seed, sampler)
        self._pruner = PrunerStudy(self._cfg, self.study.study_name, self._epochs, pruner)
        self.seconds = float(self.study.user_attrs.get(SECONDS, 0.0))
        for trial in self.study.get_trials(deepcopy=False):
            values = reported_values(trial)
            self._ids[trial.number] = trial._trial_id
            self._trials[trial.number] = trial
            self._counts[trial.state] += 1
            self._consider(trial)
            self._epochs_reported += len(values)
            if trial.state != TrialState.RUNNING:
                self._sampler.add(trial)
            self._pruner.add(trial.number, values, trial.state, trial.system_attrs)
        if self._cfg.sampler == "grid":
            # JSON tells 1 from true.
            seen = {
                _canonical(trial.system_attrs.get(FIXED, trial.params))
                for trial in self._trials.values()
            }
            grid = self._space.grid(GRID_LIMIT)
            self._grid = [drawn for drawn in reversed(grid) if _canonical(drawn) not in seen]

    def delete(self) -> None:
        """Delete a study that this session created, unless others have added trials."""
        trials = self.study.get_trials(deepcopy=False)
        if self.new and all(self._is_mine(trial) for trial in trials):
            self._storage.delete_study(self._study_id)

    def close(self) -> None:
        """Close the storage; study.db is then complete without its write-ahead log."""
        close_storage(self._storage)

    def trial(self, number: int) -> FrozenTrial:
        """One trial; not to be changed."""
        return self._trials[number]

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in these states, or all; not to be changed."""
        return [t for t in self._trials.values() if not states or t.state in states]

    @property
    def counts(self) -> Mapping[TrialState, int]:
        """The number of trials in each state."""
        return self._counts

    @property
    def epochs(self) -> int:
        """Epochs of all trials together."""
        return self._epochs_reported

    def unfinished(self) -> list[int]:
        """Trials that an earlier session of this sweep has not finished."""
        return [t.number for t in self.trials(TrialState.RUNNING) if self._is_mine(t)]

    def new_trial(self) -> int | None:
        """Create a trial with its parameters. Returns its number, or None at the end of a grid."""
        known = None
        if self._cfg.sampler == "grid":
            if not self._grid:
                return None
            known = create_trial(state=TrialState.RUNNING, system_attrs={FIXED: self._grid.pop()})
        drawn = self._sampler.draw(len(self._trials), known)
        trial = copy.copy(drawn)
        if not self._private:
            trial.user_attrs = {OWNER: self._owner}
        made = self._storage.create_new_trial(self._study_id, trial)
        number = trial.number = self._storage.get_trial_number_from_id(made)
        self._sampler.begin(number, drawn)
        self._pruner.add(number, {}, TrialState.RUNNING, {})
        self._ids[number] = made
        self._trials[number] = trial
        self._counts[TrialState.RUNNING] += 1
        return number

    def start(self, number: int) -> dict[str, Any]:
        """Start a new trial, or one of `unfinished`. Returns its parameters."""
        trial = self._trials[number]
        if not self._sampler.knows(number):
            # An earlier version stored parameters one by one, and may have been killed meanwhile.
            drawn = self._sampler.draw(number, trial)
            for name in drawn.params.keys() - trial.params.keys():
                kind = drawn.distributions[name]
                stored = kind.to_internal_repr(drawn.params[name])
                self._storage.set_trial_param(self._ids[number], name, stored, kind)
            self._sampler.begin(number, drawn)
            trial.params, trial.distributions = drawn.params, drawn.distributions
        return dict(trial.params)

    def reported(self, number: int) -> dict[int, float]:
        """The values that were reported of a trial, by epoch."""
        return reported_values(self._trials[number])

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the watched value of an epoch, from 1. Returns whether to stop the trial."""
        trial, made = self._trials[number], self._ids[number]
        if list(self._cfg.objectives) == [self._cfg.metric]:
            trial.intermediate_values = {**trial.intermediate_values, epoch: value}
            self._storage.set_trial_intermediate_value(made, epoch, value)
        else:
            self._set(number, VALUES, {**trial.user_attrs.get(VALUES, {}), str(epoch): value})
        self._epochs_reported += 1
        stop, attributes = self._pruner.report(number, epoch, value)
        self._set_system(number, attributes)
        return stop and epoch >= self._cfg.min_epochs

    def complete(
        self, number: int, measured: Mapping[str, float], missed: Mapping[str, float]
    ) -> None:
        """Record the result of a trial.

        Args:
            measured: all measures.
            missed: by how much each constraint is missed; 0 or less where it is met.
        """
        constraints = create_trial(state=TrialState.RUNNING, constraints=dict(missed))
        self._set_system(number, constraints.system_attrs)
        self._set(number, RESULT, dict(measured))
        self._end(number, TrialState.COMPLETE, [measured[n] for n in self._cfg.objectives])

    def prune(self, number: int) -> None:
        """Record that a trial was stopped early."""
        self._end(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial failed and is not repeated."""
        self._set(number, REASON, reason)
        self._end(number, TrialState.FAIL)

    def record_failure(self, number: int, reason: str) -> int:
        """Record that an attempt failed. Returns the number of failed attempts."""
        reasons = [*self._trials[number].user_attrs.get(FAILURES, []), reason]
        self._set(number, FAILURES, reasons)
        return len(reasons)

    def record_usage(self, number: int, usage: Mapping[str, Any]) -> None:
        """Store what a trial that has not ended has used so far, by phase."""
        self._set(number, USAGE, {phase: dict(of) for phase, of in usage.items()})

    def usage(self, number: int) -> dict[str, Any]:
        """What a trial has used so far, by phase."""
        return dict(self._trials[number].user_attrs.get(USAGE, {}))

    def record_seconds(self, seconds: float) -> None:
        """Store the duration of all sessions together."""
        self.seconds = seconds
        self.study.set_user_attr(SECONDS, seconds)

    def best(self) -> list[FrozenTrial]:
        """The best trials that meet the constraints, or those of the Pareto front, best first."""
        if len(self._cfg.objectives) > 1:
            return sorted(self.study.best_trials, key=self._order)
        done = [t for t in self.trials(TrialState.COMPLETE) if _is_feasible(t)]
        return sorted(done, key=self._order)

    def _is_mine(self, trial: FrozenTrial) -> bool:
        return self._private or trial.user_attrs.get(OWNER) == self._owner

    def _set(self, number: int, key: str, value: Any) -> None:
        trial = self._trials[number]
        trial.user_attrs = {**trial.user_attrs, key: value}
        self._storage.set_trial_user_attr(self._ids[number], key, value)

    def _set_system(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Store the attributes that Optuna's sampler, pruner or constraints set."""
        trial = self._trials[number]
        for key in attributes.keys() - trial.system_attrs.keys():
            trial.system_attrs = {**trial.system_attrs, key: attributes[key]}
            self._storage.set_trial_system_attr(self._ids[number], key, attributes[key])

    def _end(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        trial = self._trials[number]
        if state == TrialState.PRUNED and trial.intermediate_values:
            last = trial.intermediate_values[max(trial.intermediate_values)]
            values = [last] if math.isfinite(last) else None  # as Optuna does
        trial.state, trial.values = state, values
        trial.datetime_complete = datetime.datetime.now()
        self._set_system(number, self._sampler.end(trial))
        self._pruner.end(number, state)
        self._storage.set_trial_state_values(self._ids[number], state, values)
        self._counts[TrialState.RUNNING] -= 1
        self._counts[state] += 1
        self._consider(trial)

    def _consider(self, trial: FrozenTrial) -> None:
        """Make a trial the leader if it is better."""
        if trial.state != TrialState.COMPLETE or not _is_feasible(trial):
            return
        if self.leader is None or self._order(trial) < self._order(self.leader):
            self.leader = trial

    def _order(self, trial: FrozenTrial) -> tuple[list[float], int]:
        """Sort key: trials by their objectives, in order; the best trial is the first."""
        ways = self._cfg.objectives.values()
        losses = [-v if way == "maximize" else v for v, way in zip(trial.values, ways, strict=True)]
        return losses, trial.number


def reported_values(trial: FrozenTrial) -> dict[int, float]:
    """The values that were reported of a trial, by epoch."""
    values = trial.user_attrs.get(VALUES, {})  # if the objective is another value
    return {int(epoch): value for epoch, value in values.items()} or dict(trial.intermediate_values)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Open a storage, or create it. Raises any error of the database driver.

    Args:
        url: as SQLAlchemy and Optuna read it; None: study.db in `folder`.
    """
    if url is not None:
        return optuna.storages.get_storage(url)
    # In a URL, characters of the path could have a meaning to Optuna or SQLAlchemy.
    connect = partial(_connect, private_file(folder))
    storage = RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})
    return optuna.storages.get_storage(storage)


def close_storage(storage: BaseStorage) -> None:
    """Close the connections to a storage.

    SQLite then moves the content of its write-ahead log (study.db-wal) into study.db, which can be
    copied alone, unless another program has the file open.
    """
    storage.remove_session()
    backend = getattr(storage, "_backend", storage)  # Optuna wraps it in a cache
    if isinstance(backend, RDBStorage):
        backend.engine.dispose()


def private_file(folder: Path) -> Path:
    """The file that holds the study by default."""
    return folder / "study.db"


def without_password(url: str | None) -> str | None:
    """The URL of a storage, for messages."""
    return url and re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _owner_of(folder: Path) -> str:
    """The identity of this folder, which marks its trials in a storage shared with others.

    It is a random text in a file of the folder, and so moves with the folder.
    """
    path = folder / "owner"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="ascii")
    return path.read_text(encoding="ascii")


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that does not wait for the disk at every write.

    A driver that is killed loses nothing. A machine that loses power may lose the last seconds, but
    the file stays intact.
    """
    connection = sqlite3.connect(path, check_same_thread=False)  # SQLAlchemy has a pool of them
    connection.execute("PRAGMA journal_mode=WAL").close()
    connection.execute("PRAGMA synchronous=NORMAL").close()
    return connection


def _is_feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def _canonical(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
