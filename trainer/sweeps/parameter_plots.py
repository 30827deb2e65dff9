"""Charts of a sweep that show the values of parameters, as SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from trainer.report.svg import (
    BLUE,
    CARD,
    ORANGE,
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
from trainer.sweeps.plots import Objective, value_axis


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
        label: short name of the parameter.
        index: a number that no other parameter of the page has.
    """
    drawn = [trial for trial in trials if name in trial.params]
    chosen = {trial.number for trial in best}
    with style():
        figure, axes = new_figure(WIDTH * 0.75, 2.1)
        values = [objective.value(trial) for trial in drawn]
        value_axis(axes, axes.yaxis, objective.name, values)
        scale = Scale(drawn[0].distributions[name])
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
        labels: short name of each parameter.
    """
    ranked = objective.ranked(trials)
    top, half = max(1, len(ranked) // 10), max(1, len(ranked) // 2)
    scales = [Scale(ranked[0].distributions[name]) for name in names]
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


class Scale:
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
        """The position of a value on an axis: the value itself, or the index of a choice."""
        if self._choices:
            # By type too: True == 1.
            return next(
                float(index)
                for index, choice in enumerate(self._choices)
                if (type(choice), choice) == (type(value), value)
            )
        return float(value)

    def fraction(self, value: Any) -> float:
        """The position of a value between the ends of the range, from 0 to 1."""
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
