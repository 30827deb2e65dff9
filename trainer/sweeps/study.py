"""The study: Optuna by ask and tell, in a storage from which a killed sweep goes on.

Only the driver's main thread talks to it. The sampler of trial n is seeded by (seed, n), so that a
sweep that was interrupted draws what an undisturbed one would have drawn.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from trainer.config import SweepConfig
from trainer.data.hashing import mix
from trainer.errors import ConfigError, RunError, first_line
from trainer.sweeps.measures import better
from trainer.sweeps.proxy import Proxy
from trainer.sweeps.space import GRID_LIMIT, Space
from trainer.sweeps.storage import close_storage, open_storage, owner_of, private, without_password

OWNER, RESULT, VALUES = "owner", "result", "values"  # attributes of a trial
SECONDS, SETTINGS = "seconds", "settings"  # attributes of the study
FIXED = "fixed_params"  # Optuna's own attribute of a trial: what it is to draw


class Ledger:
    """All trials of a sweep and what became of them. `note` comes before everything else."""

    def __init__(
        self, cfg: SweepConfig, space: Space, name: str, seed: int, folder: Path, epochs: int
    ) -> None:
        """Open the storage, or make it.

        Args:
            name: of the experiment; the study is called NAME/SWEEP.
            folder: the sweep's own.
            epochs: the most that a trial takes; Hyperband shares these out.

        Raises:
            ConfigError: the storage that was asked for cannot be opened.
            RunError: the sweep's own file cannot.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._cfg, self._space, self._seed = cfg, space, seed
        self._private = cfg.storage is None
        directions = [_direction(name) for name in cfg.objectives.values()]
        try:
            self._owner = None if self._private else owner_of(folder)
            self._storage = open_storage(cfg.storage, folder)
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=f"{name}/{cfg.name}",
                directions=directions,
                pruner=make_pruner(cfg, epochs),
                load_if_exists=True,
            )
        except Exception as error:  # of whichever data base driver
            # Optuna does not say which module it lacks.
            reason = first_line((isinstance(error, ImportError) and error.__cause__) or error)
            if self._private:
                raise RunError(f"{private(folder)}: {reason}") from error
            said = f"sweep.storage={without_password(cfg.storage)}: {reason}"
            raise ConfigError(said) from error
        self._study_id = self._storage.get_study_id_from_name(self.study.study_name)
        self._live: dict[int, optuna.Trial] = {}
        self._proxy: Proxy | None = None
        self._grid = space.grid(GRID_LIMIT) if cfg.sampler == "grid" else None
        self.new = False  # this session has begun it

    def note(self, settings: Mapping[str, Any]) -> None:
        """Remember what makes this sweep what it is. Raises ConfigError for another one's study."""
        text = json.dumps(settings, sort_keys=True)
        known = self.study.user_attrs.get(SETTINGS)
        if known is None:
            self.new = True
            self.study.set_metric_names(list(self._cfg.objectives))
            self.study.set_user_attr(SETTINGS, text)  # last: with it, all is there
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
        if list(self._cfg.objectives) != [self._cfg.metric]:
            which = _direction(better(self._cfg))
            self._proxy = Proxy(self.study.study_name, which, self.study.pruner)
            for trial in self.trials():
                self._proxy.replay(trial.number, watched_values(trial), trial.state)

    def withdraw(self) -> None:
        """Take back a study that this session made, unless others have trials in it by now."""
        if self.new and all(self._mine(trial) for trial in self.trials()):
            self._storage.delete_study(self._study_id)

    def close(self) -> None:
        """Close the storage; study.db is then complete without its write-ahead log."""
        close_storage(self._storage)

    def trial(self, number: int) -> FrozenTrial:
        """One trial; not to be changed."""
        return self._storage.get_trial(self._id(number))

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in these states, or all; not to be changed."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def unfinished(self) -> list[int]:
        """Trials that a driver of this sweep left behind."""
        return [t.number for t in self.trials(TrialState.RUNNING) if self._mine(t)]

    def ask(self) -> int | None:
        """A new trial, which `take_up` draws; None where a grid has come to its end.

        It is made in one transaction with its owner and its place in the grid: a driver that is
        killed leaves it whole, or not at all.
        """
        fixed = None
        if self._grid is not None:
            # JSON keeps the type, which == between 1 and True does not.
            seen = {_canonical(t.system_attrs.get(FIXED, t.params)) for t in self.trials()}
            fixed = next((draw for draw in self._grid if _canonical(draw) not in seen), None)
            if fixed is None:
                return None
        made = self._storage.create_new_trial(
            self._study_id,
            create_trial(
                state=TrialState.RUNNING,
                user_attrs=None if self._private else {OWNER: self._owner},
                system_attrs=None if fixed is None else {FIXED: fixed},
            ),
        )
        return self._storage.get_trial_number_from_id(made)

    def take_up(self, number: int) -> dict[str, Any]:
        """What trial `number` is to try; one that was cut off while it was drawn is completed."""
        self._seed_sampler(number)
        self._live[number] = optuna.Trial(self.study, self._id(number))
        return self._space.suggest(self._live[number])

    def reported(self, number: int) -> dict[int, float]:
        """What was reported of a trial, by epoch."""
        return watched_values(self.trial(number))

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Note the watched value of an epoch (the first is 1). Returns whether to stop there."""
        trial = self._live[number]
        if self._proxy:
            values = {**trial.user_attrs.get(VALUES, {}), str(epoch): value}
            trial.set_user_attr(VALUES, values)
            stop = self._proxy.report(number, epoch, value)
        else:
            trial.report(value, epoch)
            stop = trial.should_prune()
        return stop and epoch >= self._cfg.min_epochs

    def complete(
        self, number: int, measured: Mapping[str, float], missed: Mapping[str, float]
    ) -> None:
        """Tell the values of the objectives, and by how much constraints were missed."""
        trial = self._live.pop(number)
        for name, value in missed.items():
            if name not in trial.constraints:
                trial.set_constraint(name, value)
        trial.set_user_attr(RESULT, dict(measured))
        self._tell(number, TrialState.COMPLETE, [measured[n] for n in self._cfg.objectives])

    def prune(self, number: int) -> None:
        """Tell that a trial was stopped early."""
        self._live.pop(number)
        self._tell(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Tell that a trial failed for good."""
        self._live.pop(number).set_user_attr("reason", reason)
        self._tell(number, TrialState.FAIL)

    def failed_once_more(self, number: int, reason: str) -> int:
        """Note a failure. Returns how many the trial has had."""
        trial = self._live[number]
        reasons = [*trial.user_attrs.get("failures", []), reason]
        trial.set_user_attr("failures", reasons)
        return len(reasons)

    @property
    def seconds(self) -> float:
        """Time that earlier sessions took."""
        return float(self.study.user_attrs.get(SECONDS, 0.0))

    def note_seconds(self, seconds: float) -> None:
        """Keep the time that the sweep has taken in all."""
        self.study.set_user_attr(SECONDS, seconds)

    def epochs(self) -> int:
        """Epochs of all trials together."""
        return sum(len(watched_values(trial)) for trial in self.trials())

    def best(self) -> list[FrozenTrial]:
        """The best trials, constraints kept: one objective: all, best first; several: the front."""
        done = [t for t in self.trials(TrialState.COMPLETE) if _feasible(t)]
        if len(self._cfg.objectives) > 1:
            done = self.study.best_trials
        sign = -1 if next(iter(self._cfg.objectives.values())) == "maximize" else 1
        return sorted(done, key=lambda t: (sign * t.values[0], t.number))

    def _mine(self, trial: FrozenTrial) -> bool:
        return self._private or trial.user_attrs.get(OWNER) == self._owner

    def _seed_sampler(self, number: int) -> None:
        seed = mix(self._seed, number, 0) % 2**32
        self.study.sampler = make_sampler(self._cfg, self._space, seed)

    def _tell(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        self.study.tell(number, values, state)
        if self._proxy:
            self._proxy.end(number, state)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def watched_values(trial: FrozenTrial) -> dict[int, float]:
    """What was reported of a trial, by epoch."""
    kept = trial.user_attrs.get(VALUES, {})  # where a proxy is asked
    return {int(epoch): value for epoch, value in kept.items()} or dict(trial.intermediate_values)


def make_sampler(cfg: SweepConfig, space: Space, seed: int) -> BaseSampler:
    """The sampler that `sweep.sampler` names; a grid is enqueued and needs none."""
    match cfg.sampler:
        case "tpe":
            grouped = space.conditional
            return TPESampler(
                seed=seed,
                n_startup_trials=cfg.startup_trials,
                group=grouped,
                multivariate=True if grouped else None,
            )
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=max(2, cfg.startup_trials))
    return RandomSampler(seed=seed)


def make_pruner(cfg: SweepConfig, epochs: int) -> BasePruner:
    """The pruner that `sweep.pruner` names.

    Args:
        epochs: the most that a trial takes.
    """
    match cfg.pruner:
        case "median":
            return MedianPruner(n_startup_trials=cfg.min_trials, n_warmup_steps=cfg.min_epochs)
        case "asha":  # Li et al., MLSys 2020
            return SuccessiveHalvingPruner(cfg.min_epochs, cfg.reduction)
        case "hyperband":  # Li et al., JMLR 2018
            return HyperbandPruner(
                min_resource=cfg.min_epochs,
                max_resource=max(epochs, cfg.min_epochs),
                reduction_factor=cfg.reduction,
            )
    return NopPruner()


def _direction(name: str) -> StudyDirection:
    return StudyDirection[name.upper()]


def _feasible(trial: FrozenTrial) -> bool:
    return all(value <= 0 for value in trial.constraints.values())


def _canonical(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
