"""Programs: their instructions, the weight FIFO, and places in the unified buffer."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from tests.hardware.tpu.models import quantized
from trainer.errors import ConfigError, RunError
from trainer.hardware.tpu import TPU_V1, Program, TpuSettings, compile_network, execute, lower
from trainer.hardware.tpu.applications import Application, Shape, application_network
from trainer.hardware.tpu.compiler import _lifetimes, _reads, _writes
from trainer.hardware.tpu.instructions import (
    Activate,
    Halt,
    MatrixMultiply,
    ReadWeights,
    Synchronize,
)
from trainer.models import LeNet5, LeNet300, LSTMLanguageModel

LISTING = """\
 0  Read_Weights       tile 0
 1  Read_Weights       tile 1
 2  Read_Host_Memory   input -> buffer 0x0000000, 1,800 bytes
 3  Synchronize
 4  Set_Configuration  layer 0: layer 0
 5  MatrixMultiply     rows 0..2, inputs 0..255 -> accumulators 0, 10 columns, next tile
 6  MatrixMultiply     rows 0..2, inputs 256..299 += accumulators 0, 10 columns, next tile
 7  Activate           accumulators 0 -> rows 0..2, channels 0..9
 8  Synchronize
 9  Write_Host_Memory  buffer 0x0000800 -> result 0, 30 bytes
10  Halt"""


def small_program(settings: TpuSettings = TPU_V1, **shape: int) -> Program:
    layer = Shape(**({"rows": 1, "inputs": 300, "outputs": 10} | shape))
    return compile_network(application_network(Application(3, (layer,), 600)), settings)


def test_the_listing_of_a_program() -> None:
    assert small_program().listing() == LISTING


def test_a_convolution_is_listed_as_such() -> None:
    text = small_program(rows=20, kernel=3, inputs=4).listing()
    assert "Convolve           rows 0..59, inputs 0..35 -> accumulators 0, 10 columns" in text


def test_rows_that_exceed_half_of_the_accumulators_are_computed_in_parts() -> None:
    program = small_program(rows=1000, inputs=300)  # 3000 rows
    products = [x for x in program.instructions if isinstance(x, MatrixMultiply)]
    assert [(x.first_row, x.rows, x.accumulator, x.accumulate) for x in products] == [
        (0, 1500, 0, False),
        (0, 1500, 0, True),
        (1500, 1500, 2048, False),
        (1500, 1500, 2048, True),
    ]
    assert len(program.tiles) == 4  # both tiles are read again for the second part
    one_tile = small_program(rows=1000, inputs=200)
    assert len(one_tile.tiles) == 1  # it stays in the array
    assert sum(isinstance(x, Activate) for x in one_tile.instructions) == 2


def test_tiles_cover_the_weights_once() -> None:
    program = small_program(inputs=600, outputs=600)
    covered = np.zeros((600, 600), int)
    for tile in program.tiles:
        rows = slice(tile.first_output, tile.first_output + tile.outputs)
        covered[rows, tile.first_input : tile.first_input + tile.inputs] += 1
    assert len(program.tiles) == 9
    assert (covered == 1).all()


def test_passes_for_each_kernel_position() -> None:
    settings = replace(TPU_V1, packed_kernels=False)
    passes = small_program(settings, rows=20, kernel=3, inputs=300).tiles
    assert len(passes) == 9 * 2
    assert [tile.first_input for tile in passes[:4]] == [0, 256, 300, 556]
    packed = small_program(rows=20, kernel=3, inputs=300).tiles
    assert len(packed) == 11  # 2700 inputs


@pytest.mark.parametrize("depth", [1, 4])
def test_the_fifo_is_filled_early_and_never_overflows(depth: int) -> None:
    program = small_program(replace(TPU_V1, weight_fifo_tiles=depth), inputs=600, outputs=600)
    waiting = 0
    for instruction in program.instructions:
        if isinstance(instruction, ReadWeights):
            waiting += 1
        if isinstance(instruction, MatrixMultiply) and instruction.next_tile:
            assert waiting > 0
            waiting -= 1
        assert waiting <= depth
    assert waiting == 0
    assert all(isinstance(x, ReadWeights) for x in program.instructions[:depth])


def test_the_executor_refuses_programs_that_misuse_the_fifo() -> None:
    samples = torch.rand(2, 1, 28, 28)
    program = compile_network(lower(quantized(LeNet300(), samples), samples))
    reads = [x for x in program.instructions if isinstance(x, ReadWeights)]
    others = [x for x in program.instructions if not isinstance(x, ReadWeights)]
    with pytest.raises(RunError, match="reads tile 4 into a full weight FIFO"):
        execute(replace(program, instructions=[*reads, *others]), samples)
    with pytest.raises(RunError, match="takes a tile from an empty weight FIFO"):
        execute(replace(program, instructions=others), samples)


def test_layers_wait_for_the_results_that_they_read() -> None:
    samples = torch.rand(2, 1, 28, 28)
    program = compile_network(lower(quantized(LeNet300(), samples), samples))
    kinds = [type(x) for x in program.instructions if type(x) in (Synchronize, Activate, Halt)]
    # 300, 100 and 10 outputs: two tiles, one, one; each layer and the host wait once.
    assert kinds == [
        Synchronize, Activate, Activate, Synchronize, Activate, Synchronize, Activate, Synchronize,
        Halt,
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["convolutions", "recurrent"])
def test_values_in_use_at_the_same_time_do_not_overlap(model: str) -> None:
    if model == "convolutions":
        samples = torch.rand(2, 1, 28, 28)
        network = lower(quantized(LeNet5(), samples), samples)
    else:
        samples = torch.randint(0, 9, (2, 4))
        made = LSTMLanguageModel(vocabulary=9, embedding=4, hidden=6, layers=2)
        network = lower(quantized(made, samples), samples)
    program = compile_network(network)
    lifetimes = _lifetimes(network)
    values = {v.name: v for x in network.layers for v in (*_reads(x), *_writes(x))}
    for first, second in combinations(values.values(), 2):
        (begin, end), (start, stop) = lifetimes[first.name], lifetimes[second.name]
        if begin <= stop and start <= end:
            a, b = program.addresses[first.name], program.addresses[second.name]
            assert a + first.size <= b or b + second.size <= a
    ends = [program.addresses[value.name] + value.size for value in values.values()]
    assert max(ends) <= program.buffer_bytes < sum(v.size + 256 for v in values.values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unified_buffer=1,000: the network needs 2,304 bytes"):
        small_program(replace(TPU_V1, unified_buffer=1000))
    with pytest.raises(ConfigError, match=r"layer 0 adds up 70,000 products: .* hold 65,793"):
        small_program(inputs=70_000)


@pytest.mark.parametrize(
    "settings", [{"array_size": 0}, {"clock": -1.0}, {"clock": float("nan")}, {"accumulators": 1}]
)
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ConfigError, match="must be"):
        TpuSettings(**settings)
