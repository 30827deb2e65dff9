"""The charts of the lecture as SVG, in the style of all reports (trainer.report.svg)."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import PercentFormatter

from trainer.report.svg import (
    CARD,
    SERIES,
    SOFT,
    legend,
    log_ticks,
    new_figure,
    style,
    to_svg,
)
from trainer.sweeps.analysis.answer import Spread


@dataclass(frozen=True)
class Line:
    """One curve: means, and the standard deviations of the repeats as error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[Spread]
    colour: int = 1  # index into SERIES
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A published value: a hollow diamond, or a dotted vertical line if `y` is None."""

    label: str
    x: float
    y: float | None = None
    colour: int = 0


def curves(
    name: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    x: str,
    y: str,
    percent: str = "",
    log: str = "",
    bottom: float | None = None,
    ratio: bool = False,
) -> str:
    """Draw curves and published values.

    Args:
        name: Unique within the page.
        lines: The curves.
        marks: The published values.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        percent: The axes in percent: "x", "y" or "xy".
        log: The logarithmic axes, likewise.
        bottom: Smallest value that is drawn; curves may leave the chart there.
        ratio: Whether x values are ratios, written 2x.
    """
    with style():
        figure, axes = new_figure()
        for line in lines:
            deviations = [0.0 if s.n < 2 else s.deviation for s in line.y]
            axes.errorbar(
                line.x,
                [s.mean for s in line.y],
                deviations if any(deviations) else None,
                color=SERIES[line.colour],
                linestyle="--" if line.dashed else "-",
                marker="o",
                markersize=3.5,
                elinewidth=0.9,
                label=line.label,
            )
        for mark in marks:
            colour = SERIES[mark.colour] if mark.colour else SOFT
            if mark.y is None:
                axes.axvline(mark.x, color=colour, linestyle=":", label=mark.label)
            else:
                axes.plot(mark.x, mark.y, "D", color=colour, markerfacecolor=CARD, label=mark.label)
        for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if letter in log:
                (axes.set_xscale if letter == "x" else axes.set_yscale)("log", base=2)
                log_ticks(axis, 2, "x" if ratio and letter == "x" else "")
            if letter in percent:
                axis.set_major_formatter(PercentFormatter(1.0))
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        legend(figure, axes, columns=2 if len(lines) + len(marks) > 3 else 1)
        return to_svg(figure, name)
