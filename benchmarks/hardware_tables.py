"""The simulators of TPU v1 and EIE beside the published tables: paper, ours, difference.

    python benchmarks/hardware_tables.py [--scalesim OTHER_VENV/bin/python]
        [--eie-simulator CHECKOUT] [--quick]

Prints Markdown, after about two minutes. Everything is computed from fixed seeds; only the last
table has measured times.

--scalesim        a Python that has scalesim 3.0.0 (which needs numpy<2): adds SCALE-Sim's cycles
                  for the same matrix products
--eie-simulator   a checkout of github.com/RalphMao/EIE-simulator, the simulator of EIE's authors:
                  adds the layer whose memory contents they published in its folder data/
"""

import argparse
import datetime
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainer.engine.world import World
from trainer.hardware.comparison import (
    ComparisonTable,
    eie_tables,
    percent,
    published_layer,
    tpu_tables,
)
from trainer.hardware.comparison.eie import power
from trainer.hardware.comparison.tpu import closed_forms
from trainer.hardware.eie import (
    EieSettings,
    encode,
    random_activations,
    random_codes,
    simulate,
)
from trainer.hardware.tpu import TPU_V1, compile_network, count_cycles, execute, lower
from trainer.hardware.tpu.applications import Application, Shape, application_network
from trainer.models import LeNet5
from trainer.phases import Quantize

PRODUCTS = ((200, 2000, 2000), (64, 2048, 1024), (96, 600, 600), (2888, 2304, 256))
SCALESIM_SIDE = Path(__file__).with_name("scalesim_side.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scalesim", metavar="PYTHON")
    parser.add_argument("--eie-simulator", metavar="CHECKOUT")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, seed 0")
    tables = [closed_forms()] if options.quick else tpu_tables()
    if options.scalesim:
        tables.append(systolic_cycles(options.scalesim))
    tables += [power()] if options.quick else eie_tables()
    if options.eie_simulator:
        tables.append(published_layer(options.eie_simulator))
    tables.append(speeds(2, 256) if options.quick else speeds(64, 4096))
    for table in tables:
        print(f"\n{table.markdown()}")


def systolic_cycles(python: str) -> ComparisonTable:
    """Cycles of the array alone, with weights that arrive at once.

    SCALE-Sim shifts a tile in, streams the rows, and waits for the last sum before the next tile:
    size + rows + 2 size - 2 cycles. Our model shifts a tile in while the one before it is in use.
    """
    done = subprocess.run(
        [python, str(SCALESIM_SIDE)],
        input=json.dumps(PRODUCTS),
        capture_output=True,
        text=True,
        check=True,
    )
    instant = replace(
        TPU_V1, weight_bandwidth=1e30, host_bandwidth=1e30, accumulators=2 * 4096, array_size=256
    )
    rows = []
    for (m, k, n), theirs in zip(PRODUCTS, json.loads(done.stdout), strict=True):
        program = compile_network(
            application_network(Application(m, (Shape(1, k, n),), k)), instant
        )
        found = count_cycles(program)
        in_turn = len(program.tiles) * (m + 3 * instant.array_size - 2) - 1
        overlapped = found.active + found.weight_shift + found.weight_stall
        rows.append(
            (
                f"{m} x {k} by {k} x {n}",
                f"{theirs:,}",
                f"{in_turn:,}",
                percent(in_turn, theirs),
                f"{overlapped:,.0f}",
            )
        )
    return ComparisonTable(
        "Array of 256 x 256: cycles of SCALE-Sim 3.0.0 (weight stationary) and ours",
        ("product", "SCALE-Sim", "ours, tiles in turn", "difference", "ours, tiles overlapped"),
        tuple(rows),
    )


def speeds(images: int, size: int) -> ComparisonTable:
    """Seconds that simulations take here: of `images` on the TPU, of a square matrix on EIE."""
    samples = torch.rand(images, 1, 28, 28)
    model = quantized(LeNet5(), samples)

    def tpu() -> None:
        program = compile_network(lower(model, samples))
        execute(program, samples)
        count_cycles(program)

    def eie() -> None:
        settings = EieSettings()
        matrix = encode(random_codes(size, size, 0.09), settings)
        simulate(matrix, random_activations(size, 0.353), settings)

    return ComparisonTable(
        "Seconds of simulation",
        ("what", "ours", "target"),
        (
            (f"LeNet-5 on the TPU, {images} images: compile, execute, count", seconds(tpu), "2"),
            (f"{size} x {size} on EIE (4096: Alex-7): draw, encode, count", seconds(eie), "10"),
        ),
    )


def quantized(model: nn.Module, samples: torch.Tensor) -> nn.Module:
    phase = Quantize()
    world = World.single(torch.device("cpu"))
    phase.enter(model, world)
    with torch.no_grad():
        model(samples)
    phase.after_step(model, world, 1, 1)
    phase.leave(model)
    return model


def seconds(work: Callable[[], None]) -> str:
    start = time.perf_counter()
    work()
    return f"{time.perf_counter() - start:.2f}"


if __name__ == "__main__":
    main()
