"""Early stopping by a number that is not the one objective: a study of it in memory.

Optuna's pruners compare the values of the objective, and know one only; its TPE takes the last of
them for the result of a pruned trial, and fails on a study of several objectives whose pruned
trials have any. So the watched values are kept beside the study, and trial n is mirrored here as
trial n of a study that pruners understand.
"""

import math
from collections.abc import Mapping

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState


class Proxy:
    """Trials by the same numbers as in the study proper."""

    def __init__(self, name: str, direction: StudyDirection, pruner: BasePruner) -> None:
        """Args: name: Hyperband assigns trials to brackets by it."""
        sampler = optuna.samplers.RandomSampler(seed=0)  # nothing is drawn
        self.study = optuna.create_study(
            direction=direction, study_name=name, pruner=pruner, sampler=sampler
        )
        self._trials: list[optuna.Trial] = []

    def replay(self, number: int, values: Mapping[int, float], state: TrialState) -> None:
        """Take over a trial from an earlier session."""
        for epoch, value in sorted(values.items()):
            self.report(number, epoch, value)
        if state.is_finished():
            self.end(number, state)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Note a value. Returns whether the pruner would stop the trial there."""
        trial = self._trial(number)
        trial.report(value, epoch)
        return trial.should_prune()

    def end(self, number: int, state: TrialState) -> None:
        """The trial has ended so; one without a last value says nothing to the pruner."""
        trial = self._trial(number)
        values = self.study.trials[number].intermediate_values
        if state == TrialState.COMPLETE and values and math.isfinite(values[max(values)]):
            self.study.tell(trial, values[max(values)])
        else:
            lost = TrialState.FAIL if state == TrialState.COMPLETE else state
            self.study.tell(trial, state=lost)

    def _trial(self, number: int) -> optuna.Trial:
        while len(self._trials) <= number:
            self._trials.append(self.study.ask())
        return self._trials[number]
