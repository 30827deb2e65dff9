"""The sampler and the pruner of a sweep, each with a study in memory that holds what it compares.

Reading the study on the disk for every value that is drawn or reported would take longer with every
trial. And a pruner compares the watched values (`trainer.sweeps.measures.watched`), which need not
be the objective: Optuna's pruners compare the objective, and know only one; its TPE takes the last
reported value for the result of a pruned trial, and fails on a study with several objectives whose
pruned trials have any.
"""

import bisect
import math
from collections.abc import Container, Mapping, Sequence
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
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from trainer.config import SweepConfig
from trainer.config.instantiate import Factory
from trainer.data.hashing import mix
from trainer.sweeps.measures import better
from trainer.sweeps.space import Space

TPE_RECENT, TPE_BEST = 200, 50  # trials that TPE considers: the most recent, and the best
PRUNER_RECENT = 500  # trials that a pruner considers: the most recent

TrialValues = Mapping[int, float]
"""The reported values of a trial by epoch."""


class SamplerStudy:
    """Draws the parameters of trials.

    The sampler of trial n is seeded by (seed, n), so that a sweep that was interrupted draws what
    an undisturbed one would have drawn. A sampler of the user's own is one object per session.
    """

    def __init__(
        self, cfg: SweepConfig, space: Space, seed: int, own: BaseSampler | None = None
    ) -> None:
        self._cfg, self._space, self._seed, self._own = cfg, space, seed, own
        self._storage = _WindowedStorage(TPE_RECENT if cfg.sampler == "tpe" else None)
        directions = [direction(name) for name in cfg.objectives.values()]
        self._maximized = [each == StudyDirection.MAXIMIZE for each in directions]
        self.study = optuna.create_study(storage=self._storage, directions=directions)
        self._study_id = self._storage.get_study_id_from_name(self.study.study_name)
        self._ids: dict[int, int] = {}  # of trials in memory, by number
        self._best: list[tuple[float, float, int]] = []  # violation, loss, number in memory

    def add(self, trial: FrozenTrial) -> None:
        """Add a trial that has ended, from the study on the disk."""
        self._ids[trial.number] = self._storage.create_new_trial(self._study_id, trial)
        self._rank(trial.number)

    def draw(self, number: int, known: FrozenTrial | None = None) -> FrozenTrial:
        """Draw the parameters of a trial.

        Args:
            known: an unfinished trial; only what it lacks is drawn.

        Returns:
            The trial with its parameters, and with the attributes that the sampler set.
        """
        seed = mix(self._seed, number, 0)
        self.study.sampler = self._own or make_sampler(self._cfg, self._space, seed)
        template = known or create_trial(state=TrialState.RUNNING)
        made = self._storage.create_new_trial(self._study_id, template)
        self._space.suggest(optuna.Trial(self.study, made))
        return self._storage.get_trial(made)

    def knows(self, number: int) -> bool:
        """Whether the trial was drawn or added."""
        return number in self._ids

    def begin(self, number: int, drawn: FrozenTrial) -> None:
        """Note the number that a drawn trial has in the study on the disk."""
        self._ids[number] = drawn._trial_id

    def end(self, trial: FrozenTrial) -> Mapping[str, Any]:
        """Tell the sampler the result of a trial.

        Args:
            trial: as it is in the study on the disk.

        Returns:
            The attributes that the sampler has set.
        """
        made = self._ids[trial.number]
        for key, value in trial.system_attrs.items():
            self._storage.set_trial_system_attr(made, key, value)
        for epoch, value in trial.intermediate_values.items():
            self._storage.set_trial_intermediate_value(made, epoch, value)
        values = trial.values if trial.state == TrialState.COMPLETE else None
        self.study.tell(self._storage.get_trial_number_from_id(made), values, trial.state)
        self._rank(trial.number)
        return self._storage.get_trial(made).system_attrs

    def _rank(self, number: int) -> None:
        """Keep a trial among those that TPE considers if it is one of the best."""
        trial = self._storage.get_trial(self._ids[number])
        if trial.state != TrialState.COMPLETE or self._storage.recent is None:
            return
        if len(self._maximized) > 1:
            self._keep_front(trial)
            return
        violation = max(0.0, *trial.constraints.values(), 0.0)
        loss = -trial.values[0] if self._maximized[0] else trial.values[0]
        bisect.insort(self._best, (violation, loss, trial.number))
        del self._best[TPE_BEST:]
        self._storage.kept = {number for _, _, number in self._best}

    def _keep_front(self, trial: FrozenTrial) -> None:
        """Keep the Pareto front, of a large one the most recent trials."""
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        by_number = {each.number: each for each in trials}
        front = [by_number[n] for n in self._storage.kept]
        if any(value > 0 for value in trial.constraints.values()):
            return
        if any(self._dominates(other, trial) for other in front):
            return
        front = [other for other in front if not self._dominates(trial, other)] + [trial]
        self._storage.kept = set(sorted(each.number for each in front)[-TPE_BEST:])

    def _dominates(self, a: FrozenTrial, b: FrozenTrial) -> bool:
        pairs = [
            (x, y) if maximized else (-x, -y)
            for x, y, maximized in zip(a.values, b.values, self._maximized, strict=True)
        ]
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


class PrunerStudy:
    """Compares the watched values of trials, which have the same numbers as on the disk."""

    def __init__(
        self, cfg: SweepConfig, name: str, epochs: int, own: BasePruner | None = None
    ) -> None:
        """
        Args:
            name: of the study; Hyperband assigns trials to brackets by it.
            epochs: largest number of epochs of a trial; see `make_pruner`.
            own: a pruner of the user's own.
        """
        self._storage = _WindowedStorage(None if own else PRUNER_RECENT)
        self.study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction=direction(better(cfg)),
            sampler=RandomSampler(seed=0),  # draws nothing
            pruner=own or make_pruner(cfg, epochs),
        )
        self._study_id = self._storage.get_study_id_from_name(name)
        self._ids: list[int] = []

    def add(
        self, number: int, values: TrialValues, state: TrialState, attributes: Mapping[str, Any]
    ) -> None:
        """Add a trial from the study on the disk, or a new one.

        Args:
            attributes: what the pruner has set.
        """
        while len(self._ids) < number:  # trials that another command has created
            self._create(create_trial(state=TrialState.FAIL))
        state, value = _last(values, state)
        self._create(
            create_trial(
                state=state,
                value=value,
                intermediate_values=dict(values),
                system_attrs=dict(attributes),
            )
        )

    def report(self, number: int, epoch: int, value: float) -> tuple[bool, Mapping[str, Any]]:
        """Report a value.

        Returns:
            Whether the pruner would stop the trial, and the attributes that it has set.
        """
        trial = optuna.Trial(self.study, self._ids[number])
        trial.report(value, epoch)
        stop = trial.should_prune()
        return stop, self._storage.get_trial(self._ids[number]).system_attrs

    def end(self, number: int, state: TrialState) -> None:
        """Record the end of a trial. Without a finite value it counts as failed."""
        known = self._storage.get_trial(self._ids[number])
        state, value = _last(known.intermediate_values, state)
        values = None if value is None else [value]
        self._storage.set_trial_state_values(self._ids[number], state, values)

    def _create(self, trial: FrozenTrial) -> None:
        self._ids.append(self._storage.create_new_trial(self._study_id, trial))


class _WindowedStorage(InMemoryStorage):
    """Trials in memory, of which samplers and pruners see a limited number.

    Their cost for each trial then does not grow with the number of trials.

    Attributes:
        recent: The number of recent trials that they see; None: all.
        kept: Numbers of other trials that they see.
    """

    def __init__(self, recent: int | None) -> None:
        super().__init__()
        self.recent = recent
        self.kept: set[int] = set()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials that samplers and pruners see, in the order of their numbers.

        They are not copied, since this storage replaces trials and never changes one.
        """
        trials: Sequence[FrozenTrial] = super().get_all_trials(study_id, deepcopy=False)
        if self.recent is not None and len(trials) > self.recent:
            first = len(trials) - self.recent
            older = [trials[number] for number in sorted(self.kept) if number < first]
            trials = [*older, *trials[first:]]
        return [trial for trial in trials if states is None or trial.state in states]


def own_sampler(cfg: SweepConfig, seed: int, objects: Mapping[str, Any]) -> BaseSampler | None:
    """The sampler of the user's own that `sweep.sampler` describes; None: it names one of ours.

    Args:
        seed: passed to the class if it accepts `seed`.
        objects: what was passed from Python, by name.

    Raises:
        ConfigError: the class cannot be imported or built, or is not a sampler.
    """
    if isinstance(cfg.sampler, str):
        return None
    factory = Factory("sweep.sampler", cfg.sampler, BaseSampler, objects)  # type: ignore[type-abstract]
    return factory.build(seed=seed % 2**32)


def own_pruner(cfg: SweepConfig, objects: Mapping[str, Any]) -> BasePruner | None:
    """The pruner of the user's own that `sweep.pruner` describes; None: it names one of ours.

    Args:
        objects: what was passed from Python, by name.

    Raises:
        ConfigError: the class cannot be imported or built, or is not a pruner.
    """
    if isinstance(cfg.pruner, str):
        return None
    return Factory("sweep.pruner", cfg.pruner, BasePruner, objects).build()  # type: ignore[type-abstract]


def make_sampler(cfg: SweepConfig, space: Space, seed: int) -> BaseSampler:
    """The sampler that `sweep.sampler` names; a grid is enumerated and needs none."""
    seed %= 2**32
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
        epochs: largest number of epochs of a trial; Hyperband derives its brackets from it.
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


def direction(name: str) -> StudyDirection:
    """Optuna's constant for maximize or minimize."""
    return StudyDirection[name.upper()]


def _last(values: TrialValues, state: TrialState) -> tuple[TrialState, float | None]:
    """The state of a trial for the pruner, and its value."""
    last = values[max(values)] if values else math.nan
    if state in (TrialState.COMPLETE, TrialState.PRUNED) and math.isfinite(last):
        return state, last
    return (TrialState.FAIL if state == TrialState.COMPLETE else state), None
