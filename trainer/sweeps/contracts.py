"""The contracts of samplers and pruners, which are subclasses of Optuna's BaseSampler, BasePruner.

Optuna's own tests of samplers and pruners are not part of its package.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

_TRIALS, _EPOCHS, _PARALLEL = 16, 4, 3
_SPACE: dict[str, BaseDistribution] = {
    "depth": IntDistribution(1, 3),
    "width": IntDistribution(8, 128, log=True),
    "groups": IntDistribution(2, 10, step=4),
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "momentum": FloatDistribution(0.0, 0.9),
    "sparsity": FloatDistribution(0.1, 0.9, step=0.2),
    "kernel": CategoricalDistribution((3, 5, 7)),
    "nesterov": CategoricalDistribution((True, False)),
    "constant": FloatDistribution(0.5, 0.5),
}
_CONDITIONAL = ("groups", "sparsity")  # drawn only where depth is above 1


def check_sampler(sampler: BaseSampler, objectives: int = 1) -> None:
    """Check that a sampler draws valid values in sweeps of all kinds.

    It must draw values of each kind of range (also where some parameters are drawn only in some
    trials), while other trials run, after trials that were pruned or failed, and in a study that
    already has trials; and it must not change trials that have ended.

    Args:
        sampler: An object of the class.
        objectives: Number of objectives with which it is checked.

    Raises:
        AssertionError: The sampler breaks the contract; the message says how.
    """
    assert isinstance(sampler, BaseSampler), (
        f"{type(sampler).__name__} must be a subclass of optuna.samplers.BaseSampler"
    )
    with _only_errors():
        directions = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE] * objectives
        study = optuna.create_study(sampler=sampler, directions=directions[:objectives])
        _drive(study, objectives)
        continued = optuna.create_study(sampler=sampler, directions=directions[:objectives])
        continued.add_trials(study.get_trials())
        _drive(continued, objectives)


def check_pruner(pruner: BasePruner) -> None:
    """Check that a pruner decides about trials of all kinds.

    It must return True or False after each epoch of any trial: the first one, one with values that
    are NaN, one after trials that failed; it must not change values, and must not stop all trials.

    Args:
        pruner: An object of the class.

    Raises:
        AssertionError: The pruner breaks the contract; the message says how.
    """
    assert isinstance(pruner, BasePruner), (
        f"{type(pruner).__name__} must be a subclass of optuna.pruners.BasePruner"
    )
    with _only_errors():
        for direction in (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE):
            _check_direction(pruner, direction)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Context in which Optuna prints nothing but errors."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _drive(study: optuna.Study, objectives: int) -> None:
    """Run trials, a few at a time: some complete, some fail, some are pruned."""
    results = random.Random(0)
    running: list[optuna.Trial] = []
    for number in range(_TRIALS):
        trial = _called("before_trial", study.ask)
        _draw(trial)
        running.append(trial)
        if len(running) < _PARALLEL:
            continue
        ended = running.pop(0)
        before = _finished(study)
        if number % 5 == 0:
            _called("after_trial", lambda t=ended: study.tell(t, state=TrialState.FAIL))
        elif number % 5 == 1:
            _called("after_trial", lambda t=ended: study.tell(t, state=TrialState.PRUNED))
        else:
            values = [results.random() for _ in range(objectives)]
            _called("after_trial", lambda t=ended, v=values: study.tell(t, v))
        after = _finished(study)
        for known, content in before.items():
            assert content == after[known], f"the sampler changed trial {known}, which had ended"


def _finished(study: optuna.Study) -> dict[int, str]:
    """The content of each trial that has ended, by its number."""
    trials = study.get_trials(deepcopy=False)
    return {t.number: f"{t.params} {t.values}" for t in trials if t.state.is_finished()}


def _draw(trial: optuna.Trial) -> None:
    depth = 0
    for name, kind in _SPACE.items():
        if name in _CONDITIONAL and depth < 2:
            continue
        value = _called(f"drawing {name}", lambda n=name, k=kind: _suggest(trial, n, k))
        if name == "depth":
            depth = value
        problem = _problem(kind, value)
        assert problem is None, f"{name}: the sampler drew {value!r}, {problem} of {kind}"


def _suggest(trial: optuna.Trial, name: str, kind: BaseDistribution) -> Any:
    match kind:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, kind.choices)
        case IntDistribution():
            return trial.suggest_int(name, kind.low, kind.high, step=kind.step, log=kind.log)
        case FloatDistribution():
            return trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
    raise AssertionError(kind)


def _problem(kind: BaseDistribution, value: Any) -> str | None:
    """The problem with a drawn value; None: there is none."""
    match kind:
        case CategoricalDistribution():
            if not any(value is choice for choice in kind.choices):
                return "which is not one of the choices"
        case IntDistribution() | FloatDistribution():
            expected = int if isinstance(kind, IntDistribution) else float
            if type(value) is not expected:
                return f"a {type(value).__name__}, not a {expected.__name__},"
            if not kind.low <= value <= kind.high + 1e-9:
                return "which is outside the range"
            if kind.step and abs((value - kind.low) / kind.step % 1 - 0.5) < 0.5 - 1e-6:
                return "which is not on a step"
    return None


def _check_direction(pruner: BasePruner, direction: StudyDirection) -> None:
    study = optuna.create_study(direction=direction, pruner=pruner)
    values = random.Random(0)
    stopped = 0
    for number in range(_TRIALS):
        trial = study.ask()
        level = values.random()
        pruned = False
        for epoch in range(1, _EPOCHS + 1):
            trial.report(math.nan if number % 7 == 3 else level + 0.1 * epoch, epoch)
            frozen = study.get_trials(deepcopy=False)[number]
            given = dict(frozen.intermediate_values)
            where = f"trial {number}, epoch {epoch}"
            answer = _called(f"{where}: prune", lambda t=frozen: pruner.prune(study, t))
            assert isinstance(answer, bool | np.bool_), (
                f"{where}: prune returned {answer!r}, not True or False"
            )
            now = study.get_trials(deepcopy=False)[number].intermediate_values
            assert repr(given) == repr(now) == repr(frozen.intermediate_values), (
                f"{where}: prune changed the values of the trial"
            )
            if answer:
                pruned = True
                break
        stopped += pruned
        if pruned:
            study.tell(trial, state=TrialState.PRUNED)
        elif number % 7 in (3, 5):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, level)
    assert stopped < _TRIALS, f"the pruner stopped every trial (direction {direction.name.lower()})"


def _called(what: str, function: Any) -> Any:
    try:
        return function()
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error
