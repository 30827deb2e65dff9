"""The charts of a sweep as SVG, in the style of all reports (trainer.report.svg)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from trainer.report.svg import (
    BLUE,
    CARD,
    ORANGE,
    RED,
    SERIES,
    SOFT,
    TEXT,
    WIDTH,
    legend,
    log_ticks,
    new_figure,
    points,
    shorten,
    style,
    to_svg,
)
from trainer.report.text import significant
from trainer.sweeps.labels import format_measure
from trainer.sweeps.study import watched_values

MAX_TRIALS = 500  # drawn in a chart: the best, and others evenly spaced over the sweep
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
        _value_axis(axes, axes.yaxis, objective.name, values)
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
        labels: by parameter, its name for people.
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
            warnings.simplefilter("ignore")  # that few trials say little is plain to see
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
        _value_axis(axes, axes.xaxis, x.name, [x.value(trial) for trial in trials])
        _value_axis(axes, axes.yaxis, y.name, [y.value(trial) for trial in trials])
        points(axes, [x.value(t) for t in rest], [y.value(t) for t in rest], SOFT, 4, 0.6, "trial")
        best = sorted(front, key=x.value)
        values = [x.value(trial) for trial in best], [y.value(trial) for trial in best]
        axes.plot(*values, color=ORANGE, linewidth=1, zorder=2)
        points(axes, *values, ORANGE, 6, label="Pareto front")
        legend(figure, axes, columns=2)
        return to_svg(figure, f"pareto-{x.index}-{y.index}")


def slices(
    trials: Sequence[FrozenTrial],
    best: Sequence[FrozenTrial],
    objective: Objective,
    name: str,
    label: str,
    index: int,
) -> str:
    """Draw an objective against one parameter, the best trials in another colour.

    Args:
        label: the name of the parameter for people.
        index: a number that no other parameter of the page has.
    """
    drawn = [trial for trial in trials if name in trial.params]
    chosen = {trial.number for trial in best}
    with style():
        figure, axes = new_figure(WIDTH * 0.75, 2.1)
        values = [objective.value(trial) for trial in drawn]
        _value_axis(axes, axes.yaxis, objective.name, values)
        scale = _Scale(drawn[0].distributions[name])
        for colour, size, part in (
            (BLUE, 4, [t for t in drawn if t.number not in chosen]),
            (ORANGE, 6, [t for t in drawn if t.number in chosen]),
        ):
            x = [scale.number(trial.params[name]) for trial in part]
            points(axes, x, [objective.value(trial) for trial in part], colour, size)
        scale.apply(axes)
        axes.set_xlabel(shorten(label, 32), parse_math=False)
        return to_svg(figure, f"slice-{objective.index}-{index}")


def parallel(
    trials: Sequence[FrozenTrial],
    objective: Objective,
    names: Sequence[str],
    labels: Mapping[str, str],
) -> str:
    """Draw each trial as a line through its parameters, the best ones in another colour.

    The axes lie below one another, with the objective at the bottom, so that the chart fits a
    phone.

    Args:
        names: parameters that every trial has.
        labels: by parameter, its name for people.
    """
    ranked = objective.ranked(trials)
    top, half = max(1, len(ranked) // 10), max(1, len(ranked) // 2)
    scales = [_Scale(ranked[0].distributions[name]) for name in names]
    places = [[scale.fraction(trial.params[name]) for trial in ranked]
              for name, scale in zip(names, scales, strict=True)]  # fmt: skip
    values = np.array([objective.value(trial) for trial in ranked])
    low, high = float(values.min()), float(values.max())
    places.append(list((values - low) / (high - low) if high > low else np.full(len(values), 0.5)))
    lines = np.array(places).T  # [trial, axis]
    with style():
        figure, axes = new_figure(WIDTH, 0.5 + 0.5 * len(places))
        for part, colour, opacity, width, label in (
            (lines[half:], SOFT, 0.25, 0.8, "others"),
            (lines[top:half], BLUE, 0.4, 0.8, "better half"),
            (lines[:top], ORANGE, 1.0, 1.4, "best 10%"),
        ):
            _polylines(axes, part, colour, opacity, width)
            if len(part):
                axes.plot([], [], color=colour, alpha=opacity, label=label)
        ends = [(scale.label(0), scale.label(1)) for scale in scales]
        ends.append((format_measure(objective.name, low), format_measure(objective.name, high)))
        titles = [*(shorten(labels[name], 32) for name in names), objective.name]
        for row, ((left, right), title) in enumerate(zip(ends, titles, strict=True)):
            axes.plot([0, 1], [row, row], color=SOFT, linewidth=1, zorder=1)
            text: Any = {"fontsize": 8, "color": SOFT, "parse_math": False}
            axes.text(-0.015, row, left, ha="right", va="center", **text)
            axes.text(1.015, row, right, ha="left", va="center", **text)
            axes.text(0, row - 0.12, title, ha="left", va="bottom", fontsize=9, color=TEXT,
                      parse_math=False, zorder=4,
                      bbox={"facecolor": CARD, "edgecolor": "none", "alpha": 0.8, "pad": 1},
                      )  # fmt: skip
        axes.set_ylim(len(places) - 0.8, -0.6)
        axes.set_xlim(-0.12, 1.12)
        axes.set_axis_off()
        legend(figure, axes, columns=3)
        return to_svg(figure, f"parallel-{objective.index}")


def intermediate(trials: Sequence[FrozenTrial], label: str) -> str:
    """Draw the values that pruners compare, by epoch: those of pruned trials and of the others."""
    with style():
        figure, axes = new_figure()
        for state, colour, title in (
            (TrialState.PRUNED, RED, "pruned"),
            (TrialState.COMPLETE, BLUE, "complete"),
        ):
            for trial in trials:
                values = watched_values(trial)
                if trial.state != state or not values:
                    continue
                steps = sorted(values)
                heights = [values[step] for step in steps]
                axes.plot(steps, heights, color=colour, alpha=0.5, linewidth=0.9, label=title)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend(figure, axes, columns=2)
        return to_svg(figure, "intermediate")


class _Scale:
    """An axis for the values of one parameter: numbers, numbers on a log scale, or choices."""

    def __init__(self, distribution: BaseDistribution) -> None:
        self._choices: Sequence[Any] = ()
        self._log = self._integer = False
        match distribution:
            case CategoricalDistribution(choices=choices):
                self._choices = choices
                self._low, self._high = 0.0, float(len(choices) - 1)
            case FloatDistribution() | IntDistribution():
                self._log = distribution.log
                self._integer = isinstance(distribution, IntDistribution)
                self._low, self._high = float(distribution.low), float(distribution.high)

    def number(self, value: Any) -> float:
        """Where a value lies on an axis: itself, or the position of a choice."""
        if self._choices:
            # By type too: True == 1.
            return next(
                float(index)
                for index, choice in enumerate(self._choices)
                if (type(choice), choice) == (type(value), value)
            )
        return float(value)

    def fraction(self, value: Any) -> float:
        """Where a value lies between the ends of the range, from 0 to 1."""
        low, high, number = self._low, self._high, self.number(value)
        if self._log:
            low, high, number = math.log(low), math.log(high), math.log(number)
        return (number - low) / (high - low) if high > low else 0.5

    def label(self, end: int) -> str:
        """The value at the low end (0) or at the high end (1)."""
        if self._choices:
            return shorten(str(self._choices[-end]), 10)
        return significant(self._high if end else self._low, 3)

    def apply(self, axes: Axes) -> None:
        """Set up the horizontal axis of a chart for such values."""
        if self._choices:
            letters = max(3, 30 // len(self._choices))
            axes.set_xticks(
                range(len(self._choices)), [shorten(str(c), letters) for c in self._choices]
            )
            axes.set_xlim(-0.5, len(self._choices) - 0.5)
        elif self._log:
            axes.set_xscale("log")
            log_ticks(axes.xaxis, 10)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=self._integer))


def _value_axis(axes: Axes, axis: Any, name: str, values: Sequence[float]) -> None:
    """Name an axis, and write its numbers as the measure is usually written.

    Args:
        axis: axes.xaxis or axes.yaxis.
    """
    axis.set_label_text(name)
    if name == "accuracy":
        axis.set_major_formatter(PercentFormatter(1.0))
    elif min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        log_ticks(axis, 10)
        axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    elif max(values) >= 1000:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))


def _compact(value: float) -> str:
    """A number in few letters: 12k, 3.4M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def _polylines(axes: Axes, lines: Any, colour: str, opacity: float, width: float) -> None:
    """Draw lines through the axes of parallel coordinates as one path.

    Args:
        lines: [line, axis], positions from 0 to 1.
    """
    if not len(lines):
        return
    rows = np.arange(lines.shape[1], dtype=float)
    vertices = np.stack((lines, np.broadcast_to(rows, lines.shape)), axis=2).reshape(-1, 2)
    codes = np.full(lines.shape, Path.LINETO)
    codes[:, 0] = Path.MOVETO
    path = Path(vertices, codes.reshape(-1))
    path.should_simplify = False
    axes.add_patch(
        PathPatch(path, fill=False, edgecolor=colour, alpha=opacity, linewidth=width, zorder=2)
    )
