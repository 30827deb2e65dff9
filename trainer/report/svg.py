"""Matplotlib figures as SVG text, with colours that follow the theme of the page.

All charts of the run report, the sweep report and notebooks are drawn here, so that they look
alike. Colours are written as CSS variables with the light theme's value as fallback: the page
defines the variables for its light and its dark theme (`templates/style.css.j2`), and a figure
outside a page is light. Text is not converted to paths, so that it is small and can be searched.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.cells import cell_len

from trainer.report.theme import CHART

TEXT, SOFT, AXIS, GRID, BAND, CARD = (
    CHART[name][0] for name in ("text", "soft", "axis", "grid", "band", "card")
)
SERIES = tuple(light for name, (light, _) in CHART.items() if re.fullmatch(r"c\d", name))
_, BLUE, ORANGE, GREEN, RED, PURPLE, _ = SERIES

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trainer",  # equal figures give equal text
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": AXIS,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,  # grid lines mark the ticks
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDTH, HEIGHT = 4.4, 3.1  # inches, of a chart that is as wide as a phone
_LETTERS = 28  # of a name in a chart, at most
_EM = 0.62  # width of a letter of matplotlib's default font, relative to the font size

_ROOT = (
    'role="img" stroke-linejoin="round" stroke-linecap="butt" '
    "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif\""
)
_NAMES = {light: name for name, (light, _) in CHART.items()}
_COLOUR = re.compile("|".join(_NAMES))
_DATA = re.compile(r' (?:d|x|y|points|transform)="[^"]*"')
_DECIMALS = re.compile(r"(\.\d)\d+")
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r'(?:url\(#|href="#)([^")]*)')
# Text without an effect in a browser: matplotlib's list of fonts, invisible backgrounds,
# rotations by 0 degrees, and settings of the <svg> element.
_NEEDLESS = re.compile(
    r"; font-family: [^;\"]*|; stroke-linejoin: \w+|; stroke-linecap: (?:square|butt)"
    r'|<path [^>]*style="fill: none"/>|<style.*?</style>| transform="rotate\(-0 [^"]*"',
    re.DOTALL,
)
_EMPTY = re.compile(r"<(g|defs)>\s*</\1>|<g/>")

# The first figure on a machine builds a font cache, which would be logged to standard error.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings with which figures have to be made and converted by `to_svg`."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, without pyplot, which has global state.

    Args:
        width, height: in inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Figure, name: str) -> str:
    """Convert a figure to an <svg> element that can be put into a page.

    Args:
        name: unique within the page; it keeps the ids of several figures apart.
    """
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # Letters that matplotlib's default font lacks are drawn by the browser in another font.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        FigureCanvasSVG(figure).print_svg(text, metadata=no_metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"font: ([\d.]+)px ", r"font-size: \1px; font-family: ", svg)
    svg = _NEEDLESS.sub("", svg)
    while _EMPTY.search(svg):
        svg = _EMPTY.sub("", svg)
    svg = _DATA.sub(lambda found: _compact(found[0]), svg)
    svg = svg.replace("<svg", f"<svg {_ROOT}", 1)
    svg = _COLOUR.sub(lambda found: f"var(--{_NAMES[found[0]]},{found[0]})", svg)
    used = set(_REFERENCE.findall(svg))
    svg = _ID.sub(lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    return re.sub(r"\n\s*", "\n", svg)


def _compact(attribute: str) -> str:
    """Shorten the numbers and the commands of a path; a line without length becomes `h0`."""
    text = re.sub(r"\s*\n\s*", "", _DECIMALS.sub(r"\1", attribute))
    text = re.sub(r"([MLQCz]) ", r"\1", text)
    return re.sub(r"M(\S+ \S+?)L\1(?=[M\"])", r"M\1h0", text)


def points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    size: float = 5,
    opacity: float = 1.0,
    label: str | None = None,
) -> None:
    """Draw dots as one path, which takes a fifth of the bytes of as many markers.

    Args:
        x, y: positions in data coordinates; points that are not finite are left out.
        size: diameter in points.
    """
    where = np.column_stack((np.asarray(x, dtype=float), np.asarray(y, dtype=float)))
    where = where[np.isfinite(where).all(axis=1)]
    if label is not None:  # the legend would show a path as a rectangle
        axes.plot([], [], "o", color=colour, markersize=size, alpha=opacity, label=label)
    if not len(where):
        return
    # A line of length 0 with round ends is a dot.
    codes = np.tile([Path.MOVETO, Path.LINETO], len(where))
    path = Path(np.repeat(where, 2, axis=0), codes)
    path.should_simplify = False
    axes.add_patch(
        PathPatch(
            path,
            fill=False,
            edgecolor=colour,
            alpha=opacity,
            linewidth=size,
            capstyle="round",
            joinstyle="round",
            zorder=3,
            clip_on=False,
        )
    )
    axes.update_datalim(where)
    axes.autoscale_view()


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Put a legend below the axes, with each label once."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if not unique:
        return
    made = figure.legend(
        list(unique.values()), list(unique), loc="outside lower center", ncols=columns
    )
    for text in made.get_texts():
        text.set_parse_math(False)


def log_ticks(axis: Any, base: int, suffix: str = "") -> None:
    """Label powers of `base` and a few other values on a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(base, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{suffix}"))


def shorten(name: str, letters: int = _LETTERS) -> str:
    """A name for a chart, cut to a number of letters."""
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def text_width(text: str, size: float) -> float:
    """Approximate width of a text, in inches.

    Args:
        size: of the font, in points.
    """
    return _EM * cell_len(text) * size / 72
