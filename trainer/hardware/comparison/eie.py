"""The EIE model compared with the tables of Han et al., ISCA 2016, arXiv:1602.01528.

The matrices are random, with the densities of table III. These are rounded: a weight density of 4%
may be 3.5 to 4.5%. The published times belong to trained matrices and one vector for each. Only
those of one layer are published; `published_layer` reads them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, geometric_mean

import numpy as np

from trainer.hardware.comparison.table import ComparisonTable, compare, percent
from trainer.hardware.eie import (
    EieCycles,
    EieSettings,
    EncodedMatrix,
    encode,
    random_activations,
    random_codes,
    simulate,
    square_millimetres,
    watts,
)
from trainer.hardware.eie import published as paper
from trainer.hardware.eie.power import MODULE_MILLIWATTS

_DEFAULT = EieSettings()
_UNLIMITED = 1 << 30  # entries of an element: small accelerators could not hold the matrices
_BISECTIONS = 8
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # queue depths, and processing elements


def eie_tables() -> list[ComparisonTable]:
    """All tables; they take about two minutes."""
    runs = [layer_runs(layer) for layer in paper.LAYERS]
    return [
        theoretical_times(runs),
        actual_times(runs),
        summary(runs),
        queue_depths(),
        *elements(),
        power(),
    ]


@dataclass(frozen=True)
class LayerRuns:
    """A layer at the densities of table III, and at others that are rounded to the same."""

    layer: paper.PublishedLayer
    low: EieCycles
    nominal: EieCycles
    high: EieCycles
    best: EieCycles
    """Where the theoretical time is the closest to the published one."""


def layer_runs(layer: paper.PublishedLayer) -> LayerRuns:
    """Simulate a layer over the interval that its rounded densities leave."""
    low, nominal, high = (_run(layer, x) for x in (-1.0, 0.0, 1.0))
    candidates = [low, nominal, high]
    below, above = -1.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        candidates.append(_run(layer, middle))
        if _theoretical(candidates[-1]) < layer.theoretical:
            below = middle
        else:
            above = middle
    best = min(candidates, key=lambda run: abs(_theoretical(run) - layer.theoretical))
    return LayerRuns(layer, low, nominal, high, best)


def theoretical_times(runs: Sequence[LayerRuns]) -> ComparisonTable:
    """Table IV, with perfect load balance."""
    rows = []
    for x in runs:
        published, ours = x.layer.theoretical, _theoretical(x.nominal)
        cells = [x.layer.name, f"{published:.1f}", f"{ours:.1f}", percent(ours, published)]
        ends = _theoretical(x.low), _theoretical(x.high)
        for low, high in (ends, closed_bounds(x.layer)):
            cells += [f"{low:.1f} to {high:.1f}", _verdict(published, low, high)]
        rows.append(tuple(cells))
    header = (
        "layer",
        "paper",
        "ours",
        "difference",
        "within the rounding",
        "paper is",
        "closed form, no filler to most",
        "paper is",
    )
    title = "EIE: table IV, theoretical microseconds (fillers included)"
    return ComparisonTable(title, header, tuple(rows))


def actual_times(runs: Sequence[LayerRuns]) -> ComparisonTable:
    """Table IV, with load imbalance and queues."""
    rows, errors, reached = [], [], []
    for x in runs:
        published, layer = x.layer.actual, x.layer
        nominal, best = x.nominal.seconds * 1e6, x.best.seconds * 1e6
        ratio = x.best.seconds / x.best.theoretical_seconds
        published_ratio = published / layer.theoretical
        row = nominal / published - 1, best / published - 1, ratio / published_ratio - 1
        errors.append(row)
        if abs(_theoretical(x.best) / layer.theoretical - 1) < 0.02:
            reached.append(abs(row[1]))
        rows.append(
            (
                layer.name,
                f"{published:.1f}",
                f"{nominal:.1f}",
                f"{row[0]:+.1%}",
                f"{best:.1f}",
                f"{row[1]:+.1%}",
                f"{published_ratio:.2f}",
                f"{ratio:.2f}",
                f"{row[2]:+.1%}",
            )
        )
    means = [f"{fmean(map(abs, column)):.1%}" for column in zip(*errors, strict=True)]
    rows.append(("mean of magnitudes", "", "", means[0], "", means[1], "", "", means[2]))
    header = (
        "layer",
        "paper",
        "ours, nominal densities",
        "difference",
        "ours, theoretical time matched",
        "difference",
        "paper, actual / theoretical",
        "ours",
        "difference",
    )
    note = (
        f"Of the {len(reached)} layers whose theoretical time can be matched within 2%, the actual "
        f"time differs by {fmean(reached):.1%} on average."
    )
    return ComparisonTable("EIE: table IV, actual microseconds", header, tuple(rows), note)


def summary(runs: Sequence[LayerRuns]) -> ComparisonTable:
    """The means of figures 6 and 7, and table V."""
    mean = geometric_mean(x.layer.cpu_dense / (x.nominal.seconds * 1e6) for x in runs)
    own = geometric_mean(layer.cpu_dense / layer.actual for layer in paper.LAYERS)
    frames = 1 / next(x.nominal.seconds for x in runs if x.layer.name == "Alex-7")
    table = paper.EIE_64
    return compare(
        "EIE: figures 6 and 7, table V",
        [
            ("speed-up over CPU, geometric mean", paper.CPU_SPEEDUP, mean),
            ("the same from the paper's own times in table IV", paper.CPU_SPEEDUP, own),
            (
                f"energy efficiency over CPU at {paper.CPU_WATTS} W, geometric mean",
                paper.CPU_ENERGY_RATIO,
                mean * paper.CPU_WATTS / watts(64),
            ),
            ("Alex-7, frames/s", table.frames_per_second, frames),
            ("Alex-7, frames/J", table.frames_per_joule, frames / watts(64)),
        ],
    )


def queue_depths() -> ComparisonTable:
    """Figure 8."""
    rows = []
    for layer in paper.LAYERS:
        runs = (_run(layer, settings=replace(_DEFAULT, queue_depth=depth)) for depth in _COUNTS)
        rows.append((layer.name, *(f"{run.efficiency:.0%}" for run in runs)))
    title = "EIE: figure 8, busy cycles by queue depth (paper: about half at 1, knee at 8)"
    return ComparisonTable(title, ("layer", *map(str, _COUNTS)), tuple(rows))


def elements() -> list[ComparisonTable]:
    """Figure 11, and 256 elements in table V."""
    rows, ratio = [], 1.0
    for layer in paper.LAYERS:
        cycles = {n: _run(layer, settings=replace(_DEFAULT, elements=n)).cycles for n in _COUNTS}
        rows.append((layer.name, *(f"{cycles[1] / x:.0f}" for x in cycles.values())))
        if layer.name == "Alex-7":
            ratio = cycles[64] / cycles[256]
    title = "EIE: figure 11, speed-up by processing elements (paper: near-linear but for NT-We)"
    published = paper.EIE_256.frames_per_second / paper.EIE_64.frames_per_second
    clock = paper.EIE_256.clock / paper.EIE_64.clock
    more = [
        ("cycles of 64 / cycles of 256", published / clock, ratio),
        ("frames/s at 1.2 GHz, ratio", published, ratio * clock),
    ]
    return [
        ComparisonTable(title, ("layer", *map(str, _COUNTS)), tuple(rows)),
        compare("EIE: 256 instead of 64 elements, Alex-7 (table V)", more),
    ]


def power() -> ComparisonTable:
    """Tables II and V."""
    small, large = paper.EIE_64, paper.EIE_256
    return compare(
        "EIE: tables II and V, power and area from the published modules",
        [
            ("one element, mW", paper.ELEMENT_MILLIWATTS, sum(MODULE_MILLIWATTS.values())),
            ("64 elements, W", small.watts, watts(64)),
            ("64 elements, mm2", small.square_millimetres, square_millimetres(64)),
            ("256 elements, W (paper: at 28 nm, 1.2 GHz)", large.watts, watts(256)),
        ],
    )


def published_layer(checkout: str | os.PathLike[str]) -> ComparisonTable:
    """Alex-8 with the memory contents and the vector that the authors of EIE published.

    Args:
        checkout: Of github.com/RalphMao/EIE-simulator; its folder data/ is read.

    Raises:
        OSError: The files are not there.
    """
    data = Path(checkout) / "data"
    activations = np.maximum(np.fromfile(data / "act.dat", np.float32), 0)
    columns = len(activations)
    files = (data / "ptr" / f"ptr{element}.dat" for element in range(64))
    pointers = np.stack([np.fromfile(file, np.uint32)[: columns + 1] for file in files])
    matrix = EncodedMatrix(
        rows=1000,
        columns=columns,
        elements=64,
        codes=np.zeros(0, np.uint16),
        zeros=np.zeros(0, np.uint8),
        pointers=pointers.astype(np.int64),
    )
    found = simulate(matrix, activations, _DEFAULT)
    layer = next(x for x in paper.LAYERS if x.name == "Alex-8")
    density = 100 * np.count_nonzero(activations) / columns
    return compare(
        "EIE: Alex-8, with the memory contents that its authors published",
        [
            ("theoretical us", layer.theoretical, _theoretical(found)),
            ("actual us", layer.actual, found.seconds * 1e6),
            ("activations that are not zero, %", 100 * layer.activation_density, density),
        ],
    )


def closed_bounds(layer: paper.PublishedLayer) -> tuple[float, float]:
    """Theoretical microseconds without fillers at the lowest density, and with most of them at the
    highest: 1 / (1 - q) entries for each weight, with q the chance of 16 zeros in a row.
    """
    times = []
    for rounding, with_fillers in ((-1, False), (1, True)):
        density, activations = _densities(layer, rounding)
        q = (1 - density) ** 16 if with_fillers else 0.0
        entries = layer.inputs * layer.outputs * density * activations / (1 - q)
        times.append(entries / _DEFAULT.elements / _DEFAULT.clock * 1e6)
    return times[0], times[1]


def _run(
    layer: paper.PublishedLayer, rounding: float = 0.0, settings: EieSettings = _DEFAULT
) -> EieCycles:
    """A layer at its densities, moved by a part of what they may have been rounded by."""
    density, activations = _densities(layer, rounding)
    matrix = _encoded(layer.outputs, layer.inputs, density, settings.elements)
    unlimited = replace(settings, entries_per_element=_UNLIMITED)
    return simulate(matrix, random_activations(layer.inputs, activations), unlimited)


@lru_cache(maxsize=1)
def _encoded(outputs: int, inputs: int, density: float, elements: int) -> EncodedMatrix:
    return encode(random_codes(outputs, inputs, density), replace(_DEFAULT, elements=elements))


def _densities(layer: paper.PublishedLayer, rounding: float) -> tuple[float, float]:
    """Of weights and activations; a rounding of -1 or 1 gives the ends of the interval."""
    exact = layer.activation_density == 1
    activations = layer.activation_density + (0 if exact else 0.0005 * rounding)
    return layer.weight_density + 0.005 * rounding, activations


def _theoretical(run: EieCycles) -> float:
    return run.theoretical_seconds * 1e6


def _verdict(value: float, low: float, high: float) -> str:
    if low <= value <= high:
        return "inside"
    return percent(value, low if value < low else high) + " outside"
