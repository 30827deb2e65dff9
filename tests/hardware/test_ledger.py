"""The energy of a small network, computed by hand, and the figures of the lecture."""

import pickle

import pytest
import torch

from tests.hardware.test_workloads import compressed, names
from trainer import artifact
from trainer.hardware import (
    LECTURE,
    EnergyTable,
    Figure,
    StoredWeights,
    Workload,
    inference_costs,
    ring_bytes,
    stored_weights,
    training_cost,
    workloads,
)

UNITS = EnergyTable("units", "", {"fp32": 1.0, "int8": 1.0}, {"fp32": 1.0, "int32": 0.0}, 4.0, 40.0)


def layer(weight: str, inputs: int, outputs: int, nonzero: int, density: float = 1.0) -> Workload:
    return Workload(
        weight, "linear", 1, inputs, outputs, 1, nonzero, inputs, outputs,
        Figure(density, "measured"),
    )  # fmt: skip


NETWORK = [layer("a", 100, 10, 200, density=0.5), layer("b", 10, 5, 50)]
DENSE = StoredWeights("dense", "fp32", {"a": 4000.0, "b": 200.0})
PRUNED = StoredWeights("pruned", "fp32", {"a": 925.0, "b": 200.0})


def test_weights_beyond_the_buffer_come_from_off_chip_memory() -> None:
    """Activations: 440 and 60 bytes; the larger layer leaves 1060 of 1500 bytes for weights."""
    dense, pruned = inference_costs(NETWORK, [DENSE, PRUNED], UNITS, buffer_bytes=1500)
    assert dense.macs == Figure(1050, "measured")
    assert pruned.macs == Figure(250, "measured")
    assert dense.off_chip.weights == 4200 - 1060
    assert pruned.off_chip.weights == 1125 - 1060
    assert dense.on_chip.weights == 4200
    # Samples in, results out; each layer reads its input and writes its output on the chip.
    assert dense.off_chip.activations == 4 * (100 + 5)
    assert dense.on_chip.activations == 4 * (100 + 10 + 10 + 5)
    assert dense.picojoules["arithmetic"] == Figure(2 * 1050, "modelled")
    assert dense.picojoules["weights"].value == 10 * 3140 + 4200
    assert dense.picojoules["activations"].value == 10 * 420 + 500
    assert dense.picojoules["gradients"].value == 0
    assert dense.total_picojoules == 2100 + 35600 + 4700


def test_only_the_rows_that_are_read_move() -> None:
    """Of an embedding, for instance."""
    cost = inference_costs(NETWORK, [DENSE], UNITS, buffer_bytes=0, read={"a": 0.1})[0]
    assert cost.weight_bytes.value == 4200
    assert cost.on_chip.weights == cost.off_chip.weights == 400 + 200


def test_everything_stays_on_a_chip_that_is_large_enough() -> None:
    cost = inference_costs(NETWORK, [DENSE], UNITS, buffer_bytes=10_000)[0]
    assert cost.off_chip.weights == 0
    assert cost.off_chip.total == cost.off_chip.activations


def test_activations_beyond_the_buffer_move_off_the_chip() -> None:
    cost = inference_costs(NETWORK, [DENSE], UNITS, buffer_bytes=400)[0]
    assert cost.off_chip.activations == 420 + 40
    assert cost.off_chip.weights == 4200


def test_a_batch_shares_the_weights() -> None:
    cost = inference_costs(NETWORK, [DENSE], UNITS, buffer_bytes=0, batch=8)[0]
    assert cost.macs.value == 8 * 1050
    assert cost.off_chip.weights == 4200
    assert cost.on_chip.activations == 8 * 500


def test_zero_activations_can_be_skipped() -> None:
    cost = inference_costs(NETWORK, [PRUNED], UNITS, skip_zero_activations=True)[0]
    assert cost.macs == Figure(200 * 0.5 + 50, "measured")
    guess = [layer("a", 100, 10, 200)]
    guess = [Workload(**{**vars(guess[0]), "activation_density": Figure(0.5, "assumed")})]
    cost = inference_costs(guess, [PRUNED], UNITS, skip_zero_activations=True)[0]
    assert cost.macs == Figure(100, "assumed")
    assert cost.picojoules["arithmetic"].evidence == "assumed"


def test_integers_move_fewer_bytes() -> None:
    stored = StoredWeights("quantized", "int8", {"a": 1000.0, "b": 50.0})
    cost = inference_costs(NETWORK, [stored], UNITS, buffer_bytes=0)[0]
    assert cost.on_chip.activations == 125
    assert cost.picojoules["arithmetic"].value == 1050 / 1050 * 250


def test_a_training_step() -> None:
    """Three products; weights read twice; activations written, read and their gradients."""
    cost = training_cost(NETWORK, trainable=300, table=UNITS, buffer_bytes=0, batch=2)
    assert cost.macs.value == 3 * 2 * 1050
    assert cost.on_chip.weights == 2 * 4 * 1050
    assert cost.on_chip.activations == 3 * 2 * 4 * 125
    # Gradient written and read, momentum read and written, weight read and written: 4 bytes each.
    assert cost.on_chip.gradients == 300 * 4 * 6
    assert cost.off_chip == cost.on_chip
    assert cost.picojoules["gradients"].value == 7200 * 11
    fits = training_cost(NETWORK, trainable=300, table=UNITS, buffer_bytes=1 << 20)
    assert fits.off_chip.total == 0
    fewer = training_cost(NETWORK, trainable=30, table=UNITS, buffer_bytes=0)
    assert fewer.picojoules["gradients"].value == 7200 * 11 / 10


def test_costs_travel_to_other_processes() -> None:
    cost = inference_costs(NETWORK, [DENSE])[0]
    assert pickle.loads(pickle.dumps(cost)) == cost


def test_bytes_of_a_ring() -> None:
    assert ring_bytes(1000, workers=1) == 0
    assert ring_bytes(1000, workers=4) == pytest.approx(6000)
    assert ring_bytes(1000, workers=4, wire_bytes=2) == pytest.approx(3000)


def test_data_movement_dominates_until_compression_brings_the_weights_on_the_chip() -> None:
    """The lecture's message, on LeNet-300-100 with a buffer of 128 KiB."""
    model = compressed()
    state = model.state_dict()
    stages = stored_weights(state, names(model), artifact.encode(state))
    found = workloads(model, torch.rand(1, 1, 28, 28))
    costs = {x.stage: x for x in inference_costs(found, stages, LECTURE, 128 << 10)}
    dense, coded = costs["dense"], costs["coded"]
    assert dense.picojoules["weights"].value > 0.9 * dense.total_picojoules
    assert coded.off_chip.weights == 0
    assert coded.total_picojoules < dense.total_picojoules / 50
    assert dense.picojoules["arithmetic"].evidence == "assumed"  # the lecture has no fp32
