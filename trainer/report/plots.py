"""Charts of a run as SVG: learning curves, compression, and weights before and after sharing.

Pure functions from the records of summary.json and metrics.jsonl.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.report.distributions import Distribution
from trainer.report.svg import (
    BAND,
    BLUE,
    CARD,
    GRID,
    HEIGHT,
    ORANGE,
    RED,
    SERIES,
    SOFT,
    WIDTH,
    legend,
    log_ticks,
    new_figure,
    shorten,
    style,
    text_width,
    to_svg,
)

Record = Mapping[str, Any]

_MARKED = 40  # largest number of epochs that are drawn with markers
_SPIKES = 256  # largest codebook whose values are drawn as separate lines
_NAME_SIZE = 8.5  # font size of the names of phases, in points


def losses(phases: Sequence[Record], metrics: Sequence[Record]) -> str:
    """Draw training and validation loss over the epochs of all phases; arguments as `metric_curve`.

    The axis is logarithmic if the losses span more than a factor of 20.
    """
    lines = [("train_loss", None, "training", ORANGE), ("loss", "loss", "validation", BLUE)]
    with style():
        figure, axes = new_figure()
        _over_epochs(axes, phases, metrics, lines)
        axes.set_ylabel("loss")
        values = [entry[key] for entry in metrics for key in ("train_loss", "loss")]
        nonzero = [value for value in values if value]
        if nonzero and 0 < 20 * min(nonzero) < max(nonzero):
            axes.set_yscale("log")
            log_ticks(axes.yaxis, 10)
        legend(figure, axes, columns=2)
        return to_svg(figure, "losses")


def metric_curve(phases: Sequence[Record], metrics: Sequence[Record], name: str) -> str:
    """Draw a validation metric over the epochs of all phases.

    Args:
        phases: the records of summary.json; a phase without training is one point.
        metrics: the lines of metrics.jsonl.
        name: of the metric.
    """
    with style():
        figure, axes = new_figure()
        _over_epochs(axes, phases, metrics, [(name, name, "validation", BLUE)])
        _metric_axis(axes, name)
        return to_svg(figure, "accuracies")


def compression(stages: Sequence[Record], name: str = "accuracy") -> str:
    """Draw a test metric over compression ratio; published accuracies are hollow dots.

    Args:
        stages: of the artifact, as in summary.json.
        name: of the metric.
    """
    with style():
        figure, axes = new_figure(WIDTH, HEIGHT + 0.19 * len(stages))
        for index, stage in enumerate(stages):
            colour = SERIES[index % len(SERIES)]
            axes.plot(
                stage["ratio"],
                _value(stage[name]),
                "o",
                color=colour,
                markersize=8,
                label=f"{stage['name']}, {stage['ratio']:.1f}x",
            )
            published = (stage["published"] or {}) if name == "accuracy" else {}
            if published.get("error") is not None:
                axes.plot(
                    published["ratio"],
                    1 - published["error"],
                    "D",
                    color=colour,
                    markerfacecolor=CARD,
                    label=f"published: {stage['name']}, {published['ratio']:g}x",
                )
        axes.set_xscale("log", base=2)
        log_ticks(axes.xaxis, 2, "x")
        axes.set_xlabel("times smaller than the dense fp32 weights")
        _metric_axis(axes, name, "test ")
        axes.margins(0.08, 0.15)
        legend(figure, axes, columns=1)
        return to_svg(figure, "compression")


def _metric_axis(axes: Axes, name: str, prefix: str = "") -> None:
    """Label the vertical axis with the name of a metric."""
    axes.set_ylabel(f"{prefix}{name}")
    if name.endswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def distribution(index: int, tensor: Distribution) -> str:
    """Draw the weights of a tensor before sharing and, on the same axis, the values after it.

    Args:
        index: a number that no other tensor of the page has.
    """
    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        above.stairs(tensor.counts, tensor.edges, fill=True, color=BLUE)
        if len(tensor.values) <= _SPIKES:
            width = 2.2 if len(tensor.values) <= 40 else 1
            below.vlines(tensor.values, 0, tensor.sizes, color=RED, linewidth=width)
        else:
            sizes, edges = np.histogram(tensor.values, tensor.edges, weights=tensor.sizes)
            below.stairs(sizes, edges, fill=True, color=RED)
        below.set_ylim(bottom=0)
        below.set_xlabel("weight")
        below.xaxis.set_major_locator(MaxNLocator(5))
        for axes, title in ((above, "before"), (below, f"after: {len(tensor.values)} values")):
            axes.set_title(title, loc="left", fontsize=9, color=SOFT)
            axes.set_ylabel("count")
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return to_svg(figure, f"weights-{index}")


def _over_epochs(
    axes: Axes,
    phases: Sequence[Record],
    metrics: Sequence[Record],
    lines: Sequence[tuple[str, str | None, str, str]],
) -> None:
    """Draw curves over the epochs of all phases, one phase after the other.

    Args:
        lines: key in the metrics, key in the records of phases, label, colour.
    """
    starts = []
    begin = 0
    for index, phase in enumerate(phases):
        epochs = [entry for entry in metrics if entry["phase"] == phase["name"]]
        end = begin + len(epochs)
        for key, of_phase, label, colour in lines:
            where = list(range(begin + 1, end + 1))
            values = [_value(entry[key]) for entry in epochs]
            if of_phase and not epochs:
                where, values = [begin], [_value(phase[of_phase])]
                axes.plot(where, values, "D", color=colour, markersize=5)
            if of_phase and index:  # the curve starts where the phase before it ended
                where = [begin, *where]
                values = [_value(phases[index - 1][of_phase]), *values]
            axes.plot(
                where,
                values,
                color=colour,
                marker="o" if len(metrics) <= _MARKED else "",
                markersize=3.5,
                label=label,
            )
        if index % 2:
            axes.axvspan(begin, end, color=BAND, zorder=-1)
        axes.axvline(begin, color=GRID, linewidth=1.2, zorder=-0.5)
        starts.append(begin)
        begin = end
    epochs_in_all = max(1, begin)
    left, right = -0.02 * epochs_in_all, 1.04 * epochs_in_all
    axes.set_xlim(left, right)
    _name_phases(axes, [(start - left) / (right - left) for start in starts], phases)
    axes.set_xlabel("epoch, over all phases")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name_phases(axes: Axes, starts: Sequence[float], phases: Sequence[Record]) -> None:
    """Write the name of each phase above its start, in several rows if names would overlap.

    Args:
        starts: where each phase starts, as a fraction of the width of the axes.
    """
    width = 0.8 * WIDTH  # of the axes, approximately
    ends: list[float] = []  # where the last name of each row ends
    for start, phase in zip(starts, phases, strict=True):
        name = shorten(phase["name"])
        needed = (text_width(name, _NAME_SIZE) + 0.08) / width
        # A name that would leave the chart on the right ends at its phase's start instead.
        flipped = start + needed > 1.05
        first, last = (start - needed, start) if flipped else (start, start + needed)
        row = next((row for row, end in enumerate(ends) if end <= first), len(ends))
        ends[row:] = [last, *ends[row + 1 :]]
        side = "right" if flipped else "left"
        axes.annotate(
            name,
            (start, 1),
            xycoords="axes fraction",
            xytext=(-2 if flipped else 2, 3 + 1.2 * _NAME_SIZE * row),
            textcoords="offset points",
            horizontalalignment=side,
            fontsize=_NAME_SIZE,
            color=SOFT,
            arrowprops={"arrowstyle": "-", "color": GRID, "shrinkA": 0, "shrinkB": 0,
                        "relpos": (float(flipped), 0)},
        ).set_parse_math(False)  # fmt: skip


def _value(value: float | None) -> float:
    return math.nan if value is None else value
