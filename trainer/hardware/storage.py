"""The bytes of weights in each stage of compression.

The pruned and shared stages count as in Han, Mao & Dally, Deep Compression, ICLR 2016,
arXiv:1510.00149: a relative index of 5 bits for each surviving weight (8 in convolutions), with
fillers where gaps are longer, next to its value or its index into the codebook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from trainer import artifact
from trainer.compress.codebooks import codebook_of
from trainer.compress.coding import han
from trainer.errors import ConfigError
from trainer.hardware.energy import NumberFormat

Stage = Literal["dense", "pruned", "shared", "quantized", "coded"]

STAGES: tuple[Stage, ...] = ("dense", "pruned", "shared", "quantized", "coded")
"""In the order of a usual chain of phases."""

_FLOAT = 4  # bytes
_SCALE, _WIDTH = "_quantizer.scale", "_quantizer.width"


@dataclass(frozen=True)
class StoredWeights:
    """The parameters of a model as they are in one stage."""

    stage: Stage
    number: NumberFormat
    """In which the model computes."""
    layers: Mapping[str, float]
    """Bytes of each parameter, by name; those of a weight include its codebook or scales."""

    @property
    def size(self) -> float:
        """Bytes of all parameters."""
        return sum(self.layers.values())


def stored_weights(
    state: Mapping[str, Tensor], parameters: Sequence[str], file: bytes | None = None
) -> list[StoredWeights]:
    """The bytes of the parameters in each stage of the model.

    Args:
        state: The state_dict of a model at the end of its phases.
        parameters: Names of the entries that are parameters; a tied one counts once.
        file: Content of the model's .dcz file, for the coded stage.

    Raises:
        ConfigError: The file is that of another model.
        trainer.artifact.ArtifactError: The file is damaged.
    """
    # Where only weights are quantized, arithmetic stays in fp32.
    integers = any(name.endswith("input_quantizer.width") for name in state)
    number: NumberFormat = "int8" if integers else "fp32"
    sizes = {name: _sizes(name, state) for name in parameters}
    found = []
    for stage in STAGES[:-1]:
        # A parameter that a stage does not change takes what it took before.
        if stage == "dense" or any(stage in own for own in sizes.values()):
            found.append(
                StoredWeights(
                    stage,
                    number if stage == "quantized" else "fp32",
                    {name: _at(stage, own) for name, own in sizes.items()},
                )
            )
    if file is not None:
        rows = {layer["name"]: layer["bytes"] for layer in artifact.describe(file).layers}
        missing = next((name for name in parameters if name not in rows), None)
        if missing is not None:
            raise ConfigError(f"the file is that of another model: it has no {missing}")
        coded = {name: float(rows[name] + rows.get(name + _SCALE, 0)) for name in parameters}
        found.append(StoredWeights("coded", number, coded))
    return found


def _at(stage: Stage, sizes: Mapping[Stage, float]) -> float:
    """Bytes in the last stage up to `stage` that changed a parameter."""
    return next(sizes[s] for s in reversed(STAGES[: STAGES.index(stage) + 1]) if s in sizes)


def _sizes(name: str, state: Mapping[str, Tensor]) -> dict[Stage, float]:
    """Bytes of a parameter in each stage that changed it."""
    tensor, scale = state[name], state.get(name + _SCALE)
    dense = _FLOAT * tensor.numel()
    sizes: dict[Stage, float] = {"dense": dense}
    if tensor.ndim < 2 or not tensor.numel():
        return sizes
    # Values to store, and bits to say where each belongs.
    entries, index = tensor.numel(), 0
    gap_bits = han.CONV_BITS if tensor.ndim > 2 else han.FC_BITS
    kept = (tensor != 0).flatten().cpu().numpy().astype(np.uint16)
    pruned_entries = len(han.entries(kept, gap_bits)[0])
    pruned = pruned_entries * (gap_bits + 8 * _FLOAT) / 8
    if pruned < dense:
        entries, index = pruned_entries, gap_bits
        sizes["pruned"] = pruned
    bits = 8 * _FLOAT if scale is None else int(state[name + _WIDTH])
    value_bits = bits
    book = codebook_of(tensor)
    if book is not None:
        code_bits = max(1, (len(book.values) - 1).bit_length())
        # Integers of few bits repeat as well; sharing leaves clearly fewer values than they have.
        if code_bits < bits - 1:
            value_bits = code_bits
            shared = entries * (index + code_bits) / 8 + _FLOAT * len(book.values)
            sizes["shared"] = min(shared, *sizes.values())
    if scale is not None:
        packed = min(entries * (index + value_bits), tensor.numel() * bits) / 8
        sizes["quantized"] = packed + _FLOAT * scale.numel()
    return sizes
