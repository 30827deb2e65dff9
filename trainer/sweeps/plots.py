"""Charts of a sweep as SVG, in the style of all reports (trainer.report.svg)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from optuna.trial import FrozenTrial, TrialState

from trainer.report.svg import (
    BLUE,
    ORANGE,
    RED,
    SERIES,
    SOFT,
    WIDTH,
    legend,
    log_ticks,
    new_figure,
    points,
    shorten,
    style,
    to_svg,
)
from trainer.sweeps.study import reported_values

MAX_TRIALS = 500  # per chart: the best, and others evenly spaced over the sweep
MAX_SLICES = 8  # parameters drawn against an objective, the most important ones
MAX_AXES = 12  # parameters in parallel coordinates
_WIDE_RANGE = 20  # largest / smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Objective:
    """One objective of a sweep."""

    index: int  # in the values of a trial
    name: str
    maximize: bool

    def value(self, trial: FrozenTrial) -> float:
        """Its value of a completed trial."""
        return float(trial.values[self.index])

    def ranked(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Completed trials, the best first."""
        sign = -1 if self.maximize else 1
        return sorted(trials, key=lambda trial: (sign * self.value(trial), trial.number))


def thin_out(trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """At most `MAX_TRIALS` of the trials, `best` among them, in the order of their numbers."""
    if len(trials) <= MAX_TRIALS:
        return list(trials)
    kept = {trial.number: trial for trial in best[: MAX_TRIALS // 5]}
    step = len(trials) / (MAX_TRIALS - len(kept))
    for index in range(MAX_TRIALS - len(kept)):
        trial = trials[int(index * step)]
        kept[trial.number] = trial
    return [kept[number] for number in sorted(kept)]


def history(trials: Sequence[FrozenTrial], objective: Objective) -> str:
    """Draw the objective of each completed trial and the best value so far."""
    with style():
        figure, axes = new_figure()
        values = [objective.value(trial) for trial in trials]
        best = (
            np.maximum.accumulate(values) if objective.maximize else np.minimum.accumulate(values)
        )
        numbers = [trial.number for trial in trials]
        value_axis(axes, axes.yaxis, objective.name, values)
        points(axes, numbers, values, BLUE, 4, label="trial")
        axes.step(numbers, best, color=ORANGE, where="post", label="best so far")
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(figure, axes, columns=2)
        return to_svg(figure, f"history-{objective.index}")


def importances(found: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> str:
    """Draw how much each parameter matters to each objective.

    Args:
        found: by objective, the importance of each parameter (`parameter_importances`).
        labels: short name of each parameter.
    """
    names = by_importance(found)[:MAX_AXES]
    with style():
        figure, axes = new_figure(WIDTH, 0.8 + 0.3 * len(names) + 0.2 * (len(found) > 1))
        height = 0.8 / len(found)
        for index, (objective, values) in enumerate(found.items()):
            places = [row + (index - (len(found) - 1) / 2) * height for row in range(len(names))]
            axes.barh(
                places,
                [values.get(name, 0.0) for name in names],
                height=height,
                color=SERIES[1 + index % (len(SERIES) - 1)],
                label=objective,
            )
        axes.set_yticks(range(len(names)), [shorten(labels[name]) for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("importance")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if len(found) > 1:
            legend(figure, axes, columns=3)
        return to_svg(figure, "importances")


def parameter_importances(
    study: optuna.Study, objectives: Sequence[Objective]
) -> dict[str, dict[str, float]]:
    """The importance of each parameter for good values of each objective, by objective.

    PED-ANOVA (Watanabe, Bansal & Hutter, IJCAI 2023) compares trials with a low target with the
    rest, so an objective that is maximized changes its sign.
    """
    found = {}
    for objective in objectives:

        def target(trial: FrozenTrial, of: Objective = objective) -> float:
            return -of.value(trial) if of.maximize else of.value(trial)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about few trials, whose number is in the charts
            found[objective.name] = optuna.importance.get_param_importances(study, target=target)
    return found


def by_importance(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """All parameters, the most important first, over all objectives together."""
    names = dict.fromkeys(name for values in found.values() for name in values)
    return sorted(names, key=lambda name: -sum(values.get(name, 0.0) for values in found.values()))


def pareto(
    trials: Sequence[FrozenTrial], front: Sequence[FrozenTrial], x: Objective, y: Objective
) -> str:
    """Draw two objectives against each other, and the Pareto front."""
    on_front = {trial.number for trial in front}
    rest = [trial for trial in trials if trial.number not in on_front]
    with style():
        figure, axes = new_figure()
        value_axis(axes, axes.xaxis, x.name, [x.value(trial) for trial in trials])
        value_axis(axes, axes.yaxis, y.name, [y.value(trial) for trial in trials])
        points(axes, [x.value(t) for t in rest], [y.value(t) for t in rest], SOFT, 4, 0.6, "trial")
        best = sorted(front, key=x.value)
        values = [x.value(trial) for trial in best], [y.value(trial) for trial in best]
        axes.plot(*values, color=ORANGE, linewidth=1, zorder=2)
        points(axes, *values, ORANGE, 6, label="Pareto front")
        legend(figure, axes, columns=2)
        return to_svg(figure, f"pareto-{x.index}-{y.index}")


def intermediate(trials: Sequence[FrozenTrial], label: str) -> str:
    """Draw the values that pruners compare, by epoch: those of pruned trials and of the others."""
    curves = [(trial.state, sorted(reported_values(trial).items())) for trial in trials]
    with style():
        figure, axes = new_figure()
        values = [value for _, curve in curves for _, value in curve if math.isfinite(value)]
        value_axis(axes, axes.yaxis, label, values or [0.0])
        for state, colour, title in (
            (TrialState.PRUNED, RED, "pruned"),
            (TrialState.COMPLETE, BLUE, "complete"),
        ):
            found = [curve for its_state, curve in curves if its_state == state]
            for curve in found:
                if len(curve) > 1:
                    steps, heights = zip(*curve, strict=True)
                    axes.plot(steps, heights, color=colour, alpha=0.7, linewidth=0.9, label=title)
            # A trial with a single value, such as one pruned after its first epoch.
            single = [curve[0] for curve in found if len(curve) == 1]
            if single:
                steps, heights = zip(*single, strict=True)
                entry = None if len(single) < len(found) else title
                points(axes, steps, heights, colour, 4, 0.7, entry)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(figure, axes, columns=2)
        return to_svg(figure, "intermediate")


def value_axis(axes: Axes, axis: Any, name: str, values: Sequence[float]) -> None:
    """Label an axis, and format its numbers as usual for the measure.

    Args:
        axis: axes.xaxis or axes.yaxis.
    """
    axis.set_label_text(name)
    if name.endswith("accuracy"):
        axis.set_major_formatter(PercentFormatter(1.0))
    elif min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        log_ticks(axis, 10)
        axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    elif max(values) >= 1000:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))


def _compact(value: float) -> str:
    """A number, abbreviated: 12k, 3.4M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
