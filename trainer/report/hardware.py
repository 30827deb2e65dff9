"""The cost of a network on hardware as a table, a chart of energies, and a roofline plot.

Pure functions of what `trainer.hardware.costs.NetworkCosts.as_dict` returns, which summary.json
holds under `hardware`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.hardware.costs import CAUSES
from trainer.hardware.eie import EieSettings
from trainer.hardware.tpu import TPU_V1
from trainer.report.svg import (
    BLUE,
    GREEN,
    HEIGHT,
    ORANGE,
    RED,
    SOFT,
    WIDTH,
    legend,
    log_ticks,
    new_figure,
    style,
    to_svg,
)
from trainer.report.table import Table
from trainer.report.text import NOTHING

Costs = Mapping[str, Any]

_MARKS = {"measured": "", "modelled": "~", "assumed": "?"}
_MACHINES = ("cpu", "tpu", "eie")
_COLUMNS = ("cpu", "engine", "tpu", "eie")
_TITLES = {"cpu": "CPU", "engine": "engine", "tpu": "TPU v1", "eie": "EIE"}
_COLOURS = {"cpu": BLUE, "tpu": ORANGE, "eie": GREEN}


def table(costs: Costs) -> Table:
    """One row for each stage; a mark before a figure shows whether it was measured or modelled."""
    columns = ["stage", "bytes", "MACs", *CAUSES, "energy"]
    for machine in _COLUMNS:
        columns += [f"{_TITLES[machine]} us", f"{_TITLES[machine]} uJ"]
    rows = []
    for stage in costs["stages"]:
        row = [stage["stage"], _cell(stage["bytes"]), _cell(stage["macs"])]
        row += [_cell(stage["energy"][cause]) for cause in CAUSES]
        row.append(_cell(total_energy(stage)))
        for machine in _COLUMNS:
            execution = stage.get(machine) or {"microseconds": None, "microjoules": None}
            row += [_cell(execution[key]) for key in ("microseconds", "microjoules")]
        rows.append(tuple(row))
    return Table(
        title(costs),
        tuple(columns),
        rows,
        "\n".join(caption(costs)),
        optional=(
            "activations",
            "weights",
            "arithmetic",
            "EIE uJ",
            "TPU v1 uJ",
            "engine uJ",
            "CPU uJ",
        ),
    )


def title(costs: Costs) -> str:
    """Title: one sample or a batch."""
    batch = costs["settings"]["batch"]
    return f"Cost of {'one sample' if batch == 1 else f'a batch of {batch} samples'}"


def caption(costs: Costs) -> list[str]:
    """Caption: how to read the table, and what its figures leave out."""
    settings = costs["settings"]
    threads, watts = settings["threads"], settings["cpu_watts"]
    return [
        "no mark: measured; ~ modelled; ? partly assumed. Energies in microjoules.",
        f"arithmetic, weights, activations, energy: operations and memory accesses by the table "
        f"{settings['energy_table']!r} with {settings['buffer_bytes'] / 1024:g} KiB on the chip; "
        "not the energy of a CPU",
        f"CPU: PyTorch, fp32, {threads} thread{'s' * (threads > 1)}, dense in every stage; its "
        f"power is {'an assumption' if watts is None else f'given as {watts:g} W'} unless measured",
        "engine: the same CPU with compressed weights, as trainer.inference.compile makes them",
        "TPU v1: 8 bits in every stage, 40 W (Jouppi et al., 2017). "
        "EIE: 64 elements at 45 nm (Han et al., 2016)",
        *costs["notes"],
    ]


def total_energy(stage: Costs) -> Costs:
    """The energy of all causes as a figure."""
    figures = [stage["energy"][cause] for cause in CAUSES]
    weakest = max(figures, key=lambda figure: list(_MARKS).index(figure["evidence"]))
    return {"value": sum(x["value"] for x in figures), "evidence": weakest["evidence"]}


def charts(costs: Costs) -> dict[str, str]:
    """All charts as SVG, by caption."""
    return {
        "Energy of operations and memory accesses, modelled: data movement dominates, until the "
        "weights fit on the chip.": energies(costs),
        "Operations per second over operations per byte of weights. Lines: limits of the CPU "
        "(measured), of TPU v1 and of EIE (published). Dots: the network; on EIE in each "
        "stage.": roofline(costs),
    }


def energies(costs: Costs) -> str:
    """Draw the energy of each stage as stacked bars."""
    stages = costs["stages"]
    with style():
        figure, axes = new_figure(WIDTH, HEIGHT)
        below = [0.0] * len(stages)
        for cause, colour in zip(CAUSES, (RED, BLUE, GREEN), strict=True):
            heights = [stage["energy"][cause]["value"] for stage in stages]
            places = range(len(stages))
            axes.bar(places, heights, bottom=below, color=colour, label=cause, width=0.7)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.set_xticks(range(len(stages)), [stage["stage"] for stage in stages])
        for place, height in enumerate(below):
            axes.annotate(
                f"{height:.3g}",
                (place, height),
                xytext=(0, 2),
                textcoords="offset points",
                horizontalalignment="center",
                fontsize=8.5,
                color=SOFT,
            )
        axes.set_ylabel("microjoules")
        axes.margins(y=0.1)
        legend(figure, axes, columns=3)
        return to_svg(figure, "hardware-energy")


def roofline(costs: Costs) -> str:
    """Draw the speed of the network on each machine, and the limits of the machines."""
    eie = EieSettings()
    limits = costs["limits"]
    roofs = {
        "cpu": (limits["operations"], limits["bandwidth"]),
        "tpu": (TPU_V1.peak_tops * 1e12, TPU_V1.weight_bandwidth),
        "eie": (2 * eie.elements * eie.clock, None),  # its weights are on the chip
    }
    with style():
        figure, axes = new_figure(WIDTH, HEIGHT + 0.4)
        dots = {machine: _dots(costs["stages"], machine) for machine in _MACHINES}
        intensities = [x for found in dots.values() for x, _ in found]
        left = min([0.5, *intensities]) / 2
        right = max([1e4, *intensities]) * 2
        for machine, (peak, bandwidth) in roofs.items():
            ridge = peak / bandwidth if bandwidth else left
            x = [left, ridge, right]
            y = [min(peak, at * bandwidth) if bandwidth else peak for at in x]
            axes.plot(x, y, color=_COLOURS[machine], label=_TITLES[machine])
            found = dots[machine]
            axes.plot(
                [x for x, _ in found], [y for _, y in found], "o", color=_COLOURS[machine], ms=5
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        log_ticks(axes.xaxis, 10)
        axes.set_xlim(left, right)
        axes.set_xlabel("operations per byte of weights")
        axes.set_ylabel("operations per second")
        legend(figure, axes, columns=3)
        return to_svg(figure, "hardware-roofline")


def _dots(stages: Sequence[Costs], machine: str) -> list[tuple[float, float]]:
    """Operations per byte of weights, and per second.

    CPU and TPU read dense weights in every stage, with 32 and 8 bits; EIE reads those of the
    stage.
    """
    found = []
    for stage in stages if machine == "eie" else stages[:1]:
        if stage[machine]:
            operations = 2 * stage[machine]["macs"]
            seconds = stage[machine]["microseconds"]["value"] / 1e6
            size = stage["bytes"]["value"] / (4 if machine == "tpu" else 1)
            found.append((operations / max(1, size), operations / seconds))
    return [(x, y) for x, y in found if x > 0]


def _cell(figure: Costs | None) -> str:
    if figure is None:
        return NOTHING
    value = figure["value"]
    return _MARKS[figure["evidence"]] + format(value, ",.0f" if value >= 1000 else ".3g")
