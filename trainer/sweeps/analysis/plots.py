"""Charts of the analyses as SVG, in the style of all reports (trainer.report.svg)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from trainer.report.svg import (
    BLUE,
    HEIGHT,
    ORANGE,
    SERIES,
    SOFT,
    TEXT,
    WIDTH,
    legend,
    new_figure,
    shorten,
    style,
    to_svg,
)


class Cell(NamedTuple):
    """Means over the seeds of one combination of methods."""

    change: float  # of accuracy, in percentage points
    accuracy: float  # fraction
    size: float  # bytes


def matrix(methods: Sequence[str], cells: Mapping[tuple[int, int], Cell]) -> str:
    """Draw one cell for each pair of methods; the larger the change, the stronger the colour.

    Args:
        cells: by row and column, the indices of two methods.
    """
    names = [shorten(method, 14) for method in methods]
    largest = max((abs(cell.change) for cell in cells.values()), default=0.0) or 1.0
    with style():
        figure, axes = new_figure(WIDTH, 0.6 + 0.75 * len(methods))
        for (row, column), cell in cells.items():
            axes.add_patch(
                Rectangle(
                    (column - 0.48, row - 0.48),
                    0.96,
                    0.96,
                    color=ORANGE if cell.change < 0 else BLUE,
                    alpha=0.75 * abs(cell.change) / largest,
                )
            )
            for below, text, colour, size in (
                (-0.2, f"{cell.change:+.2f}", TEXT, 12),
                (0.1, f"{cell.accuracy:.2%}", TEXT, 8.5),
                (0.32, f"{cell.size:,.0f} bytes", TEXT, 8.5),
            ):
                axes.text(column, row + below, text, color=colour, fontsize=size,
                          horizontalalignment="center", verticalalignment="center")  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.tick_top()
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        return to_svg(figure, "interference")


def sensitivity_curves(
    curves: Mapping[tuple[str, bool], Sequence[tuple[float, float]]],
    layers: Sequence[str],
    dense: float,
    index: int,
) -> str:
    """Draw accuracy against sparsity for some layers, without retraining (dashed) and with it.

    Args:
        curves: sparsity and accuracy by layer, and by whether it was retrained.
        dense: accuracy of the dense model.
        index: a number that no other such chart of the page has.
    """
    with style():
        figure, axes = new_figure(WIDTH, HEIGHT + 0.17 * len(layers))
        axes.axhline(dense, color=SOFT, linestyle=":", linewidth=1.2)
        for number, layer in enumerate(layers):
            for retrained, dashes in ((False, "--"), (True, "-")):
                curve = curves.get((layer, retrained), [])
                axes.plot(
                    [sparsity for sparsity, _ in curve],
                    [accuracy for _, accuracy in curve],
                    dashes,
                    color=SERIES[1 + number % (len(SERIES) - 1)],
                    marker="o",
                    markersize=3.5,
                    label=f"{shorten(layer)}, {'retrained' if retrained else 'only pruned'}",
                )
        axes.set_xlabel("sparsity of the layer")
        axes.set_ylabel("accuracy")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        legend(figure, axes, columns=2)
        return to_svg(figure, f"sensitivity-{index}")
