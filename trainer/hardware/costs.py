"""The costs of a network on all kinds of hardware in each stage: sizes, energy, times.

    costs = network_costs(model, samples, file=Path("model.dcz").read_bytes())
    for stage in costs.stages:
        print(stage.stage, stage.bytes.value, stage.tpu)

`python -m trainer.hardware` prints them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.hardware.cpu import CpuCost, CpuLimits, measure_limits, measure_model
from trainer.hardware.eie import (
    EieCycles,
    EieSettings,
    encode,
    random_activations,
    shared_matrix,
    simulate,
)
from trainer.hardware.eie.power import watts
from trainer.hardware.energy import EIE_TABLE_I, EnergyTable
from trainer.hardware.figures import Evidence, Figure, weakest
from trainer.hardware.ledger import Cause, StageCost, inference_costs
from trainer.hardware.storage import STAGES, Stage, stored_weights
from trainer.hardware.tpu import TpuCycles, compile_network, count_cycles, lower
from trainer.hardware.tpu.applications import Application, Shape, application_cycles
from trainer.hardware.workloads import Workload, read_fractions, uncounted_macs, workloads

CAUSES: tuple[Cause, ...] = ("arithmetic", "weights", "activations")
"""Of the energy of inference."""

_MAX_CODE_BITS = 8  # of a codebook that counts as one
_WITH_CODES: tuple[Stage, ...] = ("shared", "quantized", "coded")
_WITH_INTEGERS: tuple[Stage, ...] = ("quantized", "coded")


@dataclass(frozen=True)
class CostSettings:
    """Assumptions of the costs."""

    table: EnergyTable = EIE_TABLE_I
    """Energies of operations and memory accesses."""
    buffer_bytes: int = 128 << 10
    """Size of the on-chip buffer of the energy model."""
    batch: int = 1
    """Samples that are computed together."""
    threads: int = 1
    """Threads of the CPU."""
    cpu_watts: float | None = None
    """Power of the busy CPU; None: an assumption for each thread."""
    cpu_seconds: float = 0.5
    """How long to repeat the measurement of the CPU."""

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.buffer_bytes < 0:
            raise ConfigError(f"buffer_bytes={self.buffer_bytes}: it must not be negative")
        if self.cpu_watts is not None and not 0 < self.cpu_watts < math.inf:
            raise ConfigError(f"cpu_watts={self.cpu_watts}: it must be above 0 and finite")


@dataclass(frozen=True)
class Execution:
    """A batch on a machine."""

    microseconds: Figure
    microjoules: Figure
    macs: float
    """Multiply-accumulates that it executes: CPU and TPU do not leave out zeros."""


@dataclass(frozen=True)
class StageCosts:
    """The costs of a batch in one stage of compression."""

    stage: Stage
    bytes: Figure
    """Of all parameters as they are stored."""
    macs: Figure
    """Multiply-accumulates with weights that are not zero."""
    energy: Mapping[Cause, Figure]
    """Microjoules of arithmetic and memory accesses, by cause. Not the energy of a CPU."""
    cpu: Execution
    """PyTorch in fp32, with dense arrays in every stage."""
    tpu: Execution
    """TPU v1, with 8-bit weights in every stage."""
    eie: Execution | None
    """EIE; None before weights are shared, or if no matrix-vector product is."""
    engine: Execution | None = None
    """The CPU with compressed weights (trainer.inference); None in all stages but the last, and
    where it was not measured."""


@dataclass(frozen=True)
class NetworkCosts:
    """The costs of a network in each stage that it went through."""

    settings: CostSettings
    stages: Sequence[StageCosts]
    layers: Sequence[Workload]
    limits: CpuLimits
    notes: Sequence[str]
    """What the figures do not contain, and what was assumed."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; each figure has its value and how it was found."""
        plain = asdict(replace(self, settings=CostSettings()))
        settings = self.settings
        plain["settings"] = {
            "energy_table": settings.table.name,
            "buffer_bytes": settings.buffer_bytes,
            "batch": settings.batch,
            "threads": settings.threads,
            "cpu_watts": settings.cpu_watts,
        }
        plain["limits"] = self.limits._asdict()
        return plain


def network_costs(
    model: nn.Module,
    samples: Tensor,
    file: bytes | None = None,
    settings: CostSettings | None = None,
    evidence: Evidence = "measured",
    dense: nn.Module | None = None,
) -> NetworkCosts:
    """Compute the costs of a model at the end of its phases.

    Args:
        model: With plain weights, perhaps quantized.
        samples: Inputs [N, ...]: densities of activations are averages over all of them, and the
            first `settings.batch` are computed.
        file: Content of the model's .dcz file.
        settings: What the costs are computed for.
        evidence: How sizes and densities are known: "assumed" for a model that was not trained, or
            for random samples.
        dense: The model without quantizers, with any weights, which the CPU runs; None: `model`.

    Raises:
        ConfigError: There are too few samples, a recurrent layer gets a packed sequence, or the
            file is that of another model.
        trainer.artifact.ArtifactError: The file is damaged.
    """
    settings = settings or CostSettings()
    batch = samples[: settings.batch]
    if len(batch) < settings.batch:
        raise ConfigError(f"batch={settings.batch}: there are only {len(samples)} samples")
    found = workloads(model, samples)
    parameters = [name for name, _ in model.named_parameters()]
    stages = stored_weights(model.state_dict(), parameters, file)
    ledger = inference_costs(
        found,
        stages,
        settings.table,
        settings.buffer_bytes,
        settings.batch,
        read=read_fractions(model, batch),
    )
    notes = []
    elsewhere = uncounted_macs(model, samples[:1], found)
    if elsewhere > 0:
        notes.append(
            f"{elsewhere:,} multiply-accumulates a sample belong to no linear, convolutional or "
            "recurrent layer, such as those of queries and keys in attention; only the CPU's "
            "figures contain them"
        )
    cpu = measure_model(
        dense or model, batch, settings.threads, settings.cpu_watts, settings.cpu_seconds
    )
    counted = float(settings.batch * sum(x.dense_macs for x in found))
    on_cpu = Execution(_micro(cpu.seconds), _micro(cpu.joules), counted)
    as_if = _on_tpu(_cycles_of_shapes(found, settings.batch), "assumed", counted)
    quantized, problem = as_if, "the model is not quantized with activations=8"
    if any(stored.stage == "quantized" for stored in stages):
        try:
            cycles = count_cycles(compile_network(lower(model, batch)))
            quantized, problem = _on_tpu(cycles, weakest(("modelled", evidence)), counted), ""
        except ConfigError as error:
            problem = str(error)
    if problem:
        notes.append(f"TPU: the layers' shapes, taken as 8-bit matrices one by one ({problem})")
    with_codes = any(stored.stage in ("shared", "quantized") for stored in stages)
    on_eie = _on_eie(model, found, settings, evidence, notes) if with_codes else None
    present = [cost.stage for cost in ledger]
    first_codes = min((STAGES.index(s) for s in _WITH_CODES if s in present), default=len(STAGES))
    rows = [
        StageCosts(
            stage=cost.stage,
            bytes=_at_least(cost.weight_bytes, evidence),
            macs=_at_least(cost.macs, evidence),
            energy=_microjoules(cost, evidence),
            cpu=on_cpu,
            tpu=quantized if cost.stage in _WITH_INTEGERS else as_if,
            eie=on_eie if STAGES.index(cost.stage) >= first_codes else None,
        )
        for cost in ledger
    ]
    return NetworkCosts(settings, rows, found, measure_limits(settings.threads), notes)


def modelled_costs(
    names: Collection[str],
    model: nn.Module,
    samples: Tensor,
    settings: CostSettings | None = None,
) -> dict[str, float]:
    """Costs of one sample that follow from models of hardware, without a measurement.

    Args:
        names: Which. `energy`: microjoules of arithmetic and memory accesses in the last stage;
            `tpu_cycles`: of the layers' shapes, taken as 8-bit matrices one by one; `eie_cycles`:
            of all linear and recurrent layers, without convolutions.
        model: With plain weights, perhaps quantized, at the end of its phases.
        samples: Inputs [N, ...], of which densities of activations are averages.
        settings: What the costs are computed for.

    Raises:
        ConfigError: EIE cannot execute a layer, or a recurrent layer gets a packed sequence.
    """
    settings = settings or CostSettings()
    found = workloads(model, samples)
    costs = {}
    if "energy" in names:
        parameters = [name for name, _ in model.named_parameters()]
        stages = stored_weights(model.state_dict(), parameters)
        read = read_fractions(model, samples[:1])
        *_, last = inference_costs(found, stages, settings.table, settings.buffer_bytes, read=read)
        costs["energy"] = sum(last.picojoules[cause].value for cause in CAUSES) / 1e6
    if "tpu_cycles" in names:
        costs["tpu_cycles"] = _cycles_of_shapes(found, 1).total
    if "eie_cycles" in names:
        matrices = [x for x in found if x.kind != "convolution"]
        if not matrices:
            raise ConfigError("eie_cycles: the model has no linear or recurrent layer")
        try:
            cycles = sum(x.rows * _eie_product(model, x)[0].cycles for x in matrices)
        except ConfigError as error:
            raise ConfigError(f"eie_cycles: {error}") from error
        costs["eie_cycles"] = float(cycles)
    return costs


def add_engine(costs: NetworkCosts, cost: CpuCost) -> NetworkCosts:
    """The costs with those of the engine for compressed weights, in the last stage."""
    *before, last = costs.stages
    engine = Execution(_micro(cost.seconds), _micro(cost.joules), last.macs.value)
    return replace(costs, stages=[*before, replace(last, engine=engine)])


def _microjoules(cost: StageCost, evidence: Evidence) -> dict[Cause, Figure]:
    """The energy of a stage by cause."""
    found = {cause: _at_least(cost.picojoules[cause], evidence) for cause in CAUSES}
    return {cause: Figure(x.value / 1e6, x.evidence) for cause, x in found.items()}


def _micro(figure: Figure) -> Figure:
    """A figure in millionths of its unit."""
    return Figure(figure.value * 1e6, figure.evidence)


def _at_least(figure: Figure, evidence: Evidence) -> Figure:
    """The figure, found no better than `evidence` says."""
    return Figure(figure.value, weakest((figure.evidence, evidence)))


def _cycles_of_shapes(found: Sequence[Workload], batch: int) -> TpuCycles:
    """Cycles of the matrix products of all layers together, as if they were quantized.

    Each call of a layer is a product of its own, and so is each time step, which needs the one
    before.
    """
    layers: list[Shape] = []
    for x in found:
        rows, more = divmod(x.rows, x.calls)
        for call in range(x.calls):
            layers.append(Shape(rows + (call < more), x.inputs, x.outputs, matrices=x.groups))
    source = found[0].input_values if found else 1
    return application_cycles(Application(batch, tuple(layers), source))


def _on_tpu(cycles: TpuCycles, evidence: Evidence, macs: float) -> Execution:
    return Execution(
        Figure(cycles.seconds * 1e6, evidence), Figure(cycles.joules * 1e6, evidence), macs
    )


def _on_eie(
    model: nn.Module,
    found: Sequence[Workload],
    settings: CostSettings,
    evidence: Evidence,
    notes: list[str],
) -> Execution | None:
    """Time and energy of the matrix-vector products on EIE; None if it cannot execute any.

    EIE has no batches: samples are computed one after the other.
    """
    eie = EieSettings()
    seconds, executed, left_out = 0.0, 0, []
    how: list[Evidence] = ["modelled", evidence]
    for x in found:
        try:
            if x.kind == "convolution":
                raise ConfigError("a convolution")
            cycles, bits = _eie_product(model, x)
        except ConfigError as error:
            left_out.append(f"{x.weight} ({str(error).partition(':')[0]})")
            continue
        if bits > eie.code_bits:
            notes.append(f"EIE: {x.weight} needs codes of {bits} bits instead of {eie.code_bits}")
        how.append(x.activation_density.evidence)
        seconds += x.rows * settings.batch * cycles.seconds
        executed += x.macs
    if left_out:
        share = executed / max(1, sum(x.macs for x in found))
        notes.append(
            f"EIE executes {share:.1%} of the multiply-accumulates; not {', '.join(left_out)}"
        )
    if not executed:
        return None
    # Which activations are zero is drawn at random, with the density that was measured.
    how_found = weakest(how)
    return Execution(
        Figure(seconds * 1e6, how_found),
        Figure(seconds * 1e6 * watts(eie.elements), how_found),
        float(settings.batch * executed),
    )


def _eie_product(model: nn.Module, x: Workload) -> tuple[EieCycles, int]:
    """The cycles of a matrix-vector product on EIE, and the bits of its codes.

    Raises:
        ConfigError: The weights have too many values.
    """
    eie = EieSettings()
    layer, _, parameter = x.weight.rpartition(".")
    matrix = shared_matrix(getattr(model.get_submodule(layer), parameter))
    bits = max(eie.code_bits, int(matrix.codes.max(initial=0)).bit_length())
    if bits > _MAX_CODE_BITS:
        raise ConfigError(f"{len(matrix.codebook) - 1:,} values")
    own = replace(eie, code_bits=bits)
    activations = random_activations(x.inputs, x.activation_density.value)
    return simulate(encode(matrix.codes, own), activations, own), bits


def random_samples(shape: Sequence[int], tokens: int | None, count: int) -> Tensor:
    """Random samples if there is no data: [count, *shape], uniform in [0, 1), or tokens.

    Args:
        shape: Of a sample.
        tokens: Size of the vocabulary; None: samples are not tokens.
        count: Number of samples.
    """
    generator = torch.Generator().manual_seed(0)
    if tokens is not None:
        return torch.randint(0, tokens, (count, *shape), generator=generator)
    return torch.rand(count, *shape, generator=generator)
