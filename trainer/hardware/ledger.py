"""The energy of a network by cause: arithmetic, weights, activations, gradients.

The memory is a model: an on-chip buffer holds the activations of the layer at work, and with the
rest as much of the weights as fits; what does not fit is read from off-chip memory for each batch.
Within a layer, reuse is perfect: each weight and each activation moves once between the buffer and
the arithmetic units; of an embedding, only the rows that are looked up. So the traffic is a lower
bound. The energy is that of arithmetic units and memories, not that of a CPU; see
trainer.hardware.energy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from trainer.hardware.energy import HOROWITZ, EnergyTable, NumberFormat
from trainer.hardware.figures import Evidence, Figure, weakest
from trainer.hardware.storage import Stage, StoredWeights
from trainer.hardware.workloads import Workload

Cause = Literal["arithmetic", "weights", "activations", "gradients"]

_VALUE_BYTES: Mapping[NumberFormat, int] = MappingProxyType({"fp32": 4, "fp16": 2, "int8": 1})


@dataclass(frozen=True)
class Traffic:
    """Bytes that move for one batch."""

    weights: float
    activations: float
    gradients: float = 0.0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weights + self.activations + self.gradients


@dataclass(frozen=True)
class StageCost:
    """The energy of a batch in one stage of compression."""

    stage: Stage
    batch: int
    macs: Figure
    """Multiply-accumulates with weights that are not zero."""
    weight_bytes: Figure
    """Bytes of all parameters as they are stored."""
    off_chip: Traffic
    """Bytes between off-chip memory and the chip. Modelled, like the next."""
    on_chip: Traffic
    """Bytes between on-chip memory and arithmetic units."""
    picojoules: Mapping[Cause, Figure]

    @property
    def total_picojoules(self) -> float:
        """Of all causes."""
        return sum(figure.value for figure in self.picojoules.values())


def inference_costs(
    workloads: Sequence[Workload],
    stages: Sequence[StoredWeights],
    table: EnergyTable = HOROWITZ,
    buffer_bytes: float = 8 << 20,
    batch: int = 1,
    skip_zero_activations: bool = False,
    read: Mapping[str, float] = MappingProxyType({}),
) -> list[StageCost]:
    """The cost of the forward pass of a batch, stage by stage.

    Args:
        workloads: Of the model at the end of its phases.
        stages: Of the same model.
        table: Energies of operations and memory accesses.
        buffer_bytes: Size of the on-chip buffer.
        batch: Samples that are computed together.
        skip_zero_activations: Whether the hardware leaves out products with activations that are
            zero, as EIE does.
        read: The fraction of a parameter that a batch reads, by name; all others are read as a
            whole. `read_fractions` finds it for embeddings.
    """
    return [
        _cost(workloads, stored, table, buffer_bytes, batch, skip_zero_activations, read)
        for stored in stages
    ]


def training_cost(
    workloads: Sequence[Workload],
    trainable: int,
    table: EnergyTable = HOROWITZ,
    buffer_bytes: float = 8 << 20,
    batch: int = 1,
    number: NumberFormat = "fp32",
    optimizer_values: int = 1,
) -> StageCost:
    """The cost of a training step with dense weights.

    A step computes three products where inference computes one: the results, the gradients of the
    inputs and those of the weights. It reads the weights twice, and keeps activations for the
    backward pass, which moves their gradients as well. Gradients of weights are written once and
    read once; the optimizer reads and writes its values and the weights.

    Args:
        workloads: Of the model.
        trainable: Values that the optimizer updates: packed weights and codebooks are fewer than
            the weights that they stand for.
        table: Energies of operations and memory accesses.
        buffer_bytes: Size of the on-chip buffer.
        batch: Samples of a step on one worker.
        number: Format of the arithmetic and of the activations; gradients are 32 bits.
        optimizer_values: Values that the optimizer keeps for each trainable one: 1 for momentum, 2
            for Adam.
    """
    size = _VALUE_BYTES[number]
    macs = 3 * batch * sum(x.dense_macs for x in workloads)
    weights = 2 * size * sum(x.weights for x in workloads)
    kept = size * batch * sum(x.input_values + x.output_values for x in workloads)
    activations = 3 * kept
    # Gradient written and read, optimizer values and weight read and written.
    gradients = 4.0 * trainable * (2 + 2 * optimizer_values + 2)
    state = weights / 2 + kept + 4.0 * trainable * (1 + optimizer_values)
    outside = max(0.0, 1 - buffer_bytes / state) if state else 0.0
    on_chip = Traffic(weights, activations, gradients)
    off_chip = Traffic(outside * weights, outside * activations, outside * gradients)
    return StageCost(
        stage="dense",
        batch=batch,
        macs=Figure(macs, "modelled"),
        weight_bytes=Figure(weights / 2, "measured"),
        off_chip=off_chip,
        on_chip=on_chip,
        picojoules=_energy(table, number, macs, off_chip, on_chip, "modelled"),
    )


def ring_bytes(trainable: int, workers: int, wire_bytes: int = 4) -> float:
    """Bytes that each worker sends in a step: 2 (N - 1) / N times the gradients (ring all-reduce).

    Their energy depends on the network and is in no table, so it is not modelled.
    """
    return 2 * (workers - 1) / workers * wire_bytes * trainable


def _cost(
    workloads: Sequence[Workload],
    stored: StoredWeights,
    table: EnergyTable,
    buffer_bytes: float,
    batch: int,
    skip_zero_activations: bool,
    read: Mapping[str, float],
) -> StageCost:
    size = _VALUE_BYTES[stored.number] * batch
    macs, evidence = 0.0, list[Evidence](["measured"])
    for x in workloads:
        products: float = x.dense_macs if stored.stage == "dense" else x.macs
        if skip_zero_activations:
            products = products * x.activation_density.value
            evidence.append(x.activation_density.evidence)
        macs += batch * products
    layers = [size * (x.input_values + x.output_values) for x in workloads]
    room = max(0.0, buffer_bytes - max(layers, default=0))
    # The samples and the results of the network come from outside and go there.
    ends = size * (workloads[0].input_values + workloads[-1].output_values) if workloads else 0
    spilled = sum(max(0.0, layer - buffer_bytes) for layer in layers)
    weights = sum(own * read.get(name, 1.0) for name, own in stored.layers.items())
    off_chip = Traffic(max(0.0, weights - room), ends + spilled)
    on_chip = Traffic(weights, sum(layers))
    found = weakest(evidence)
    return StageCost(
        stage=stored.stage,
        batch=batch,
        macs=Figure(macs, found),
        weight_bytes=Figure(stored.size, "measured"),
        off_chip=off_chip,
        on_chip=on_chip,
        picojoules=_energy(table, stored.number, macs, off_chip, on_chip, found),
    )


def _energy(
    table: EnergyTable,
    number: NumberFormat,
    macs: float,
    off_chip: Traffic,
    on_chip: Traffic,
    evidence: Evidence,
) -> Mapping[Cause, Figure]:
    arithmetic: Evidence = "assumed" if table.assumes_mac(number) else "modelled"
    memory: Evidence = (
        "assumed" if table.assumed & {"on_chip_word", "off_chip_word"} else "modelled"
    )
    moved: dict[Cause, tuple[float, float]] = {
        "weights": (off_chip.weights, on_chip.weights),
        "activations": (off_chip.activations, on_chip.activations),
        "gradients": (off_chip.gradients, on_chip.gradients),
    }
    energy: dict[Cause, Figure] = {
        "arithmetic": Figure(macs * table.mac(number), weakest((arithmetic, evidence)))
    }
    for cause, (outside, inside) in moved.items():
        energy[cause] = Figure(table.off_chip(outside) + table.on_chip(inside), memory)
    return energy
