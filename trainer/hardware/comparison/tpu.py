"""The TPU model compared with the tables of Jouppi et al., ISCA 2017, arXiv:1704.04760."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import fmean, geometric_mean

from trainer.hardware.comparison.table import ComparisonTable, compare, percent
from trainer.hardware.tpu import TPU_PRIME, TPU_V1, TpuCycles, TpuSettings, compile_network
from trainer.hardware.tpu import published as paper
from trainer.hardware.tpu.applications import (
    APPLICATIONS,
    ASSUMPTIONS,
    Application,
    Shape,
    application_cycles,
    application_network,
)

_Part = Callable[[TpuCycles], float]

# Rows of table 3: the name of the published figure, and the cycles that it counts.
_ROWS: dict[str, tuple[str, _Part]] = {
    "1 active": ("active", lambda x: x.active),
    "2 useful": ("useful", lambda x: x.useful),
    "3 unused": ("unused", lambda x: x.active - x.useful),
    "4 weight stall": ("weight_stall", lambda x: x.weight_stall),
    "5 weight shift": ("weight_shift", lambda x: x.weight_shift),
    "6 non-matrix": ("non_matrix", lambda x: x.non_matrix),
}

# Share of each application in all TPUs. Table 1 has 61, 29 and 5% for pairs; how MLP0 and MLP1
# share theirs follows from the weighted mean of table 6, the others are halved.
_SHARES = {"MLP0": 57.7, "MLP1": 3.3, "LSTM0": 14.5, "LSTM1": 14.5, "CNN0": 2.5, "CNN1": 2.5}

_VARIANTS = {
    "memory x 4 (paper: mean 3)": replace(TPU_V1, weight_bandwidth=4 * TPU_V1.weight_bandwidth),
    "clock x 4": replace(TPU_V1, clock=4 * TPU_V1.clock),
    "clock and accumulators x 4 (paper: about 1, CNNs 2)": replace(
        TPU_V1, clock=4 * TPU_V1.clock, accumulators=4 * TPU_V1.accumulators
    ),
    "array 512 x 512 (paper: slightly slower)": replace(TPU_V1, array_size=512),
    "array 512 x 512, accumulators x 4": replace(
        TPU_V1, array_size=512, accumulators=4 * TPU_V1.accumulators
    ),
    "TPU' (paper: 2.6 geometric, 3.9 weighted)": TPU_PRIME,
}


def tpu_tables() -> list[ComparisonTable]:
    """All tables; they take a few seconds."""
    return [closed_forms(), counters(), counters(given=True), operations(), variants()]


def closed_forms() -> ComparisonTable:
    """The time to load a tile, and the tiles of a matrix of 600 x 600."""
    figures = [("cycles to load a tile", 1350.0, TPU_V1.tile_cycles)]
    network = application_network(Application(1, (Shape(1, 600, 600),), 600))
    for size, microseconds in paper.MATRIX_600_MICROSECONDS.items():
        settings = replace(TPU_V1, array_size=size)
        tiles = len(compile_network(network, settings).tiles)
        loading = tiles * settings.tile_cycles / settings.clock * 1e6
        figures.append((f"600 x 600 at {size} x {size}: {tiles} tiles, us", microseconds, loading))
    return compare("TPU: closed forms", figures)


def counters(given: bool = False) -> ComparisonTable:
    """Rows 1 to 6 of table 3.

    Args:
        given: Whether row 6 is taken from the paper, whose authors cannot fully explain it, and the
            rest of the cycles is distributed in the proportions of the simulation.
    """
    rows = []
    for row, (field, part) in _ROWS.items():
        cells = [row]
        for name, published in paper.APPLICATIONS.items():
            found = _cycles(name)
            expected = getattr(published, field)
            ours = 100 * part(found) / found.total
            if given:
                matrix = found.total - found.non_matrix
                ours = (100 - published.non_matrix) * part(found) / matrix
                ours = expected if field == "non_matrix" else ours
            cells.append(f"{expected:.1f} / {ours:.1f} / {ours - expected:+.1f}")
        rows.append(tuple(cells))
    source = "row 6 taken from the paper" if given else "everything simulated"
    return ComparisonTable(
        f"TPU: table 3, % of cycles, {source} (paper / ours / difference)",
        ("row", *paper.APPLICATIONS),
        tuple(rows),
        "" if given else _assumptions(),
    )


def operations() -> ComparisonTable:
    """Row 9 of table 3, compared with row 2 of the same table."""
    rows, errors, counted = [], [], []
    for name, published in paper.APPLICATIONS.items():
        ours = _cycles(name).tops
        # With 16-bit activations, an active cycle is half a product.
        speed = APPLICATIONS[name].activation_bytes
        by_counters = published.useful / 100 * TPU_V1.peak_tops / speed
        errors.append(abs(ours / published.tops - 1))
        counted.append(abs(ours / by_counters - 1))
        rows.append(
            (
                name,
                f"{published.tops:.1f}",
                f"{ours:.1f}",
                percent(ours, published.tops),
                f"{by_counters:.1f}",
                percent(ours, by_counters),
                percent(by_counters, published.tops),
            )
        )
    means = f"{fmean(errors):.0%}", f"{fmean(counted):.0%}"
    rows.append(("mean of magnitudes", "", "", means[0], "", means[1], ""))
    return ComparisonTable(
        "TPU: table 3, row 9, TOPS",
        (
            "application",
            "paper",
            "ours",
            "difference",
            "paper's row 2 x peak",
            "ours to that",
            "paper's row 2 to its row 9",
        ),
        tuple(rows),
    )


def variants() -> ComparisonTable:
    """The what-if studies of section 7."""
    rows = []
    for title, settings in _VARIANTS.items():
        speedups = {
            name: _cycles(name).seconds / _cycles(name, settings).seconds for name in APPLICATIONS
        }
        weighted = sum(_SHARES[name] * x for name, x in speedups.items()) / sum(_SHARES.values())
        means = fmean(speedups.values()), geometric_mean(speedups.values()), weighted
        rows.append((title, *(f"{x:.2f}" for x in (*speedups.values(), *means))))
    return ComparisonTable(
        "TPU: speed-up of variants",
        ("variant", *APPLICATIONS, "mean", "geometric mean", "weighted mean"),
        tuple(rows),
    )


@cache
def _cycles(name: str, settings: TpuSettings = TPU_V1) -> TpuCycles:
    return application_cycles(APPLICATIONS[name], settings)


def _assumptions() -> str:
    lines = (f"- {name}: {text}" for name, text in ASSUMPTIONS.items())
    return "\n".join(["Assumed shapes, fixed before any comparison:", "", *lines])
