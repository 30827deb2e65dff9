"""The figures of a report as SVG text: pure functions, drawn without a display.

Figures are made as objects, not through pyplot, which keeps global state. Text stays text: it is
small, sharp and can be searched. Everything is drawn for a white background.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from trainer.report.distributions import Distribution

# Colours that people with colour-blindness can tell apart: Okabe & Ito, 2008.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
_COLOURS = ("#4d4d4d", _BLUE, _ORANGE, _GREEN, _RED, _PURPLE, "#56b4e9")
_GREY, _BAND = "#6b7280", "#f1f4f8"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trainer",  # the same figure is the same text
    "font.size": 9,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
_MARKED = 40  # epochs up to which each gets a marker
_LETTERS = 28  # of a phase's name
_SPIKES = 256  # values of a codebook up to which each gets a line of its own

# The first drawing on a machine builds a cache of fonts, and would say so on standard error.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def losses(phases: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Training and validation loss over the epochs of all phases, as `accuracies`."""
    return _over_epochs(
        "losses",
        "loss",
        phases,
        metrics,
        [("train_loss", None, "training", _ORANGE), ("loss", "loss", "validation", _BLUE)],
    )


def accuracies(phases: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Validation accuracy over the epochs of all phases.

    Args:
        phases: the records of summary.json; one without training is a point at its place.
        metrics: the lines of metrics.jsonl.
    """
    lines = [("accuracy", "accuracy", "validation", _BLUE)]
    return _over_epochs("accuracies", "accuracy", phases, metrics, lines)


def compression(stages: Sequence[Mapping[str, Any]]) -> str:
    """Test accuracy over compression ratio, the published figures as hollow marks.

    Args:
        stages: of the artefact, as in summary.json.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.8, 3.4)
        for index, stage in enumerate(stages):
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(
                stage["ratio"],
                stage["accuracy"],
                "o",
                color=colour,
                markersize=8,
                label=f"{stage['name']}, {stage['ratio']:.1f}x",
            )
            literature = stage["published"] or {}
            if literature.get("error") is not None:
                axes.plot(
                    literature["ratio"],
                    1 - literature["error"],
                    "D",
                    color=colour,
                    markerfacecolor="white",
                    label=f"published: {stage['name']}, {literature['ratio']:g}x",
                )
        _logarithmic(axes)
        axes.set_xlabel("times smaller than the dense FP32 weights")
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.margins(0.08, 0.15)
        _legend(figure, axes, columns=2)
        return _svg(figure, "compression")


def distribution(index: int, tensor: Distribution) -> str:
    """The weights of a tensor before sharing, and below on the same axis the values after it.

    Args:
        index: a number that no other tensor of the page has.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.8, 3.2), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        above.stairs(tensor.counts, tensor.edges, fill=True, color=_BLUE)
        if len(tensor.values) <= _SPIKES:
            width = 2.2 if len(tensor.values) <= 40 else 1
            below.vlines(tensor.values, 0, tensor.sizes, color=_RED, linewidth=width)
        else:
            sizes, edges = np.histogram(tensor.values, tensor.edges, weights=tensor.sizes)
            below.stairs(sizes, edges, fill=True, color=_RED)
        below.set_ylim(bottom=0)
        below.set_xlabel("weight")
        below.xaxis.set_major_locator(MaxNLocator(5))
        for axes, title in ((above, "before"), (below, f"after: {len(tensor.values)} values")):
            axes.set_title(title, loc="left", fontsize=9, color=_GREY)
            axes.set_ylabel("weights")
            axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return _svg(figure, f"weights-{index}")


def _over_epochs(
    name: str,
    label: str,
    phases: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    lines: Sequence[tuple[str, str | None, str, str]],
) -> str:
    """Curves over the epochs of all phases, one after the other.

    Args:
        lines: key in the metrics, key in the records of phases, title, colour.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(4.8, 3.4)
        begin = 0
        for index, phase in enumerate(phases):
            epochs = [entry for entry in metrics if entry["phase"] == phase["name"]]
            end = begin + len(epochs)
            for key, of_phase, title, colour in lines:
                places = list(range(begin + 1, end + 1))
                values = [_value(entry[key]) for entry in epochs]
                if of_phase and not epochs:
                    places, values = [begin], [_value(phase[of_phase])]
                    axes.plot(places, values, "D", color=colour, markersize=5)
                if of_phase and index:  # the curve comes from where the phase before it ended
                    places = [begin, *places]
                    values = [_value(phases[index - 1][of_phase]), *values]
                axes.plot(
                    places,
                    values,
                    color=colour,
                    marker="o" if len(metrics) <= _MARKED else "",
                    markersize=3.5,
                    label=title,
                )
            if index % 2:
                axes.axvspan(begin, end, color=_BAND, zorder=-1)
            axes.axvline(begin, color="#cbd2da", linewidth=0.8, zorder=-0.5)
            axes.text(
                (begin + end) / 2,
                1.02,
                _short(phase["name"]),
                transform=axes.get_xaxis_transform(),
                rotation=30 if len(phases) > 1 else 0,
                horizontalalignment="left" if len(phases) > 1 else "center",
                rotation_mode="anchor",
                fontsize=8,
                color=_GREY,
                parse_math=False,
            )
            begin = end
        axes.set_xlim(-0.02 * max(1, begin), 1.04 * max(1, begin))
        axes.set_xlabel("epoch, over all phases")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        if label == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure, axes, columns=len(lines))
        return _svg(figure, name)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    """A legend below the axes, each title once."""
    handles, titles = axes.get_legend_handles_labels()
    once = dict(zip(titles, handles, strict=True))
    if not once:
        return
    legend = figure.legend(
        list(once.values()), list(once), loc="outside lower center", ncols=columns, fontsize=8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _logarithmic(axes: Axes) -> None:
    """Powers of two as ticks, in plain figures."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def _value(value: float | None) -> float:
    return math.nan if value is None else value


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element to put into a page, its ids made unique by `name`."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # Letters that matplotlib's own font lacks: the browser has one that does not.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        FigureCanvasSVG(figure).print_svg(text, metadata=nothing)
    found = text.getvalue()
    found = found[found.index("<svg") :]
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", found)
