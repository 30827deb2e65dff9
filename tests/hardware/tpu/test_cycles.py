"""Cycles of the TPU: closed forms, the published counters, and what-if studies of the paper."""

from dataclasses import replace
from statistics import geometric_mean

import numpy as np
import pytest

from trainer.hardware.tpu import (
    BUSY_WATTS,
    TPU_PRIME,
    TPU_V1,
    TpuCycles,
    TpuSettings,
    compile_network,
    count_cycles,
)
from trainer.hardware.tpu.applications import (
    APPLICATIONS,
    ASSUMPTIONS,
    Application,
    Pooling,
    Shape,
    application_cycles,
    application_network,
    inception,
)
from trainer.hardware.tpu.network import Rows
from trainer.hardware.tpu.published import (
    APPLICATIONS as PUBLISHED,
)
from trainer.hardware.tpu.published import (
    MATRIX_600_MICROSECONDS,
    TPU_PRIME_SPEEDUP,
)

NO_HOST = replace(TPU_V1, host_bandwidth=1e30)


def run(layers: tuple[Shape, ...], batch: int, settings: TpuSettings = NO_HOST) -> TpuCycles:
    return application_cycles(Application(batch, layers, 256), settings)


def memory_bound_cycles(found: TpuCycles) -> float:
    """Cycles in which the matrix unit multiplies or waits for weights."""
    return found.active + found.weight_stall + found.weight_shift


def test_a_tile_takes_1349_cycles() -> None:
    """65,536 bytes / 34 GB/s * 700 MHz, which is the ridge point of the roofline, 1350."""
    assert TPU_V1.tile_cycles == pytest.approx(1349.3, abs=0.1)
    assert TPU_V1.peak_tops == pytest.approx(92, abs=0.5)


@pytest.mark.parametrize("batch", [16, 168, 200, 1000])
def test_few_rows_wait_for_the_weight_memory(batch: int) -> None:
    """A tile in every 1349 cycles: active for the batch, 256 shifted in, the rest stalled."""
    found = run((Shape(1, 256 * 20, 256 * 20),), batch)  # 400 tiles
    matrix = memory_bound_cycles(found)
    assert found.active == 400 * batch
    assert matrix / 400 == pytest.approx(TPU_V1.tile_cycles, rel=0.01)
    assert found.weight_shift / 400 == pytest.approx(256, rel=0.01)
    assert found.weight_reads == 400 * 65_536


def test_many_rows_hide_the_weight_memory() -> None:
    found = run((Shape(1, 256 * 10, 256 * 10),), 2000)
    first_tile = TPU_V1.tile_cycles + 256
    assert memory_bound_cycles(found) == pytest.approx(100 * 2000 + first_tile)


def test_sixteen_bit_activations_halve_the_speed() -> None:
    shape = (Shape(1, 2560, 2560),)
    slow = application_cycles(Application(64, shape, 256, activation_bytes=2), NO_HOST)
    assert slow.active == 2 * run(shape, 64).active


def test_padding_wastes_part_of_the_array() -> None:
    """600 x 600 fills (600 / 768)^2 of nine tiles: rows 1 and 3 of table 3 for LSTM1."""
    found = run((Shape(1, 600, 600),), 96)
    assert found.useful / found.active == pytest.approx((600 / 768) ** 2)
    lstm1 = PUBLISHED["LSTM1"]
    assert found.useful / found.active == pytest.approx(lstm1.useful / lstm1.active, abs=0.02)


@pytest.mark.parametrize("size", [256, 512])
def test_the_matrix_of_600_at_two_sizes_of_the_array(size: int) -> None:
    """Section 7: nine tiles, 18 us, or four larger tiles, 32 us."""
    settings = replace(NO_HOST, array_size=size)
    program = compile_network(
        application_network(Application(1, (Shape(1, 600, 600),), 600)), settings
    )
    assert len(program.tiles) == {256: 9, 512: 4}[size]
    microseconds = len(program.tiles) * settings.tile_cycles / settings.clock * 1e6
    assert microseconds == pytest.approx(MATRIX_600_MICROSECONDS[size], rel=0.05)
    assert count_cycles(program).seconds * 1e6 == pytest.approx(microseconds, rel=0.12)


def test_every_cycle_is_of_one_kind() -> None:
    for application in APPLICATIONS.values():
        found = application_cycles(application)
        assert memory_bound_cycles(found) + found.non_matrix == pytest.approx(found.total)
        waits = found.input_wait + found.result_wait
        assert 0 < waits <= found.non_matrix
        assert found.useful <= found.active


def test_inputs_from_the_host_are_waited_for() -> None:
    shape = (Shape(1, 2560, 2560),)
    slow = application_cycles(Application(200, shape, 2560))
    seconds = 200 * 2560 / TPU_V1.host_bandwidth
    assert slow.input_wait == pytest.approx(seconds * TPU_V1.clock)
    assert run(shape, 200).input_wait == pytest.approx(0)


def test_a_layer_waits_for_the_results_of_the_one_before() -> None:
    """The last row passes the array and the activation unit before the next layer begins."""
    found = run(2 * (Shape(1, 256, 256),), 2000)
    assert found.result_wait == pytest.approx(2 * 256 + 2000)


def test_double_buffered_accumulators_keep_the_array_busy() -> None:
    """Section 2: 4096 rows, so that the compiler can use two halves at peak performance."""
    assert run((Shape(10_000, 256, 256),), 1).result_wait == 0


def test_accumulators_that_are_not_read_yet_are_waited_for() -> None:
    """Results of 4 bytes take the activation unit four cycles a row, the matrix unit one."""
    found = application_cycles(Application(1, (Shape(10_000, 256, 256),), 256), NO_HOST)
    network = application_network(Application(1, (Shape(10_000, 256, 256),), 256))
    value = network.layers[0].destination.value
    wide = replace(value, dtype=np.dtype(np.int32))
    layer = replace(network.layers[0], destination=Rows(wide))
    slow = count_cycles(compile_network(replace(network, layers=[layer], output=wide), NO_HOST))
    assert slow.active == found.active
    # Five parts of 2000 rows, each of which is read in 8000 cycles: the third one waits for the
    # end of the first reading, the others for another 8000 cycles less their own 2000.
    assert slow.result_wait == pytest.approx(4000 + 2 * 6000, rel=0.001)


@pytest.mark.parametrize("name", ["MLP0", "MLP1", "LSTM0"])
def test_rows_1_4_and_5_of_memory_bound_applications(name: str) -> None:
    """Given row 6: the cycles outside of the matrix unit, which the paper cannot fully explain."""
    published = PUBLISHED[name]
    found = application_cycles(APPLICATIONS[name])
    share = (100 - published.non_matrix) / memory_bound_cycles(found)
    tolerance = {"MLP0": 2.0, "MLP1": 3.0, "LSTM0": 2.0}[name]
    assert found.active * share == pytest.approx(published.active, abs=tolerance)
    assert found.weight_stall * share == pytest.approx(published.weight_stall, abs=tolerance)
    assert found.weight_shift * share == pytest.approx(published.weight_shift, abs=tolerance)


def test_mlp0_is_as_fast_as_published() -> None:
    found = application_cycles(APPLICATIONS["MLP0"])
    assert found.tops == pytest.approx(PUBLISHED["MLP0"].tops, rel=0.05)
    assert found.joules == found.seconds * BUSY_WATTS


def test_cnn0_hides_all_weights() -> None:
    found = application_cycles(APPLICATIONS["CNN0"])
    assert found.weight_stall + found.weight_shift < 0.005 * found.total


def test_faster_memories_help_where_weights_are_waited_for() -> None:
    speedups = {
        name: application_cycles(application).seconds
        / application_cycles(application, TPU_PRIME).seconds
        for name, application in APPLICATIONS.items()
    }
    assert geometric_mean(speedups.values()) == pytest.approx(TPU_PRIME_SPEEDUP, rel=0.05)
    assert speedups["MLP0"] > 3
    assert speedups["CNN0"] < 1.05


def test_a_faster_clock_helps_convolutions_alone() -> None:
    """Figure 11: with more accumulators, CNNs gain about twofold and the others nothing."""
    fast = replace(TPU_V1, clock=4 * TPU_V1.clock, accumulators=4 * TPU_V1.accumulators)
    speedups = {
        name: application_cycles(application).seconds
        / application_cycles(application, fast).seconds
        for name, application in APPLICATIONS.items()
    }
    for name in ("MLP0", "MLP1", "LSTM0", "LSTM1"):
        assert speedups[name] < 1.1
    for name in ("CNN0", "CNN1"):
        assert speedups[name] == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize(
    ("name", "batch", "layers", "weights", "intensity"),
    [
        ("MLP0", 200, 5, 20e6, 200),
        ("MLP1", 168, 4, 5e6, 168),
        ("LSTM0", 64, 24, 52e6, 64),
        ("LSTM1", 96, 37, 34e6, 96),
        ("CNN0", 8, 16, 8e6, 2888),
        ("CNN1", 32, 76, 100e6, 1750),
    ],
)
def test_assumed_shapes_are_consistent_with_table_1(
    name: str, batch: int, layers: int, weights: float, intensity: float
) -> None:
    application = APPLICATIONS[name]
    assert application.batch == batch
    # CNN1: 69 of 72 convolutions, and all poolings.
    matrices = [x for x in application.layers if isinstance(x, Shape)]
    assert len(matrices) == (layers if name != "CNN1" else 73)
    assert len(application.layers) - len(matrices) == (0 if name != "CNN1" else 13)
    assert application.weights == pytest.approx(weights, rel=0.08)
    assert application.intensity == pytest.approx(intensity, rel=0.005)
    assert name in ASSUMPTIONS


def test_a_pooling_takes_the_activation_unit_and_the_next_layer_waits() -> None:
    """A cycle for 256 bytes that are read or written."""
    first, second = Shape(1000, 64, 64), Shape(250, 64, 64)
    found = [
        application_cycles(Application(8, layers, 64))
        for layers in ((first, second), (first, Pooling(1000, 250, 64), second))
    ]
    cycles = 8 * (1000 + 250) * 64 / 256
    assert found[1].result_wait - found[0].result_wait == pytest.approx(cycles)
    assert found[1].macs == found[0].macs


def test_inception_has_its_published_size() -> None:
    """About 2 billion multiply-accumulates at 224 pixels, and a last module of 1024 channels."""
    layers = [x for x in inception(224) if isinstance(x, Shape)]
    assert len(layers) == 69
    assert sum(x.rows * x.weights for x in layers) == pytest.approx(2.0e9, rel=0.03)
    assert (
        sum(x.outputs for x in layers[-7:] if x.inputs == 1024 and x.outputs in (352, 128)) == 480
    )
