"""From a state_dict to the bytes of a .dcz file."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.artifact.container import MAGIC, MAGIC_2, MAGIC_3, header_text, join
from trainer.artifact.tensors import (
    ALIAS,
    CODEBOOK,
    CODER,
    DTYPES,
    GRID,
    MASK,
    MAX_DIMENSIONS,
    NAMES,
    RAW,
    SCALE,
    STEPPED,
    TRELLIS,
    UNIFORM,
    Entry,
    coder_path,
    fits_format,
    is_scale,
    look_up,
    multiplied,
)
from trainer.compress.coding import MAX_CLUSTERS, Budget, Coder, encode_floats, encode_layer
from trainer.compress.half import is_exact, shared_values, to_half
from trainer.compress.quantize import broadcast_scale
from trainer.compress.trellis import levels_of

Levels = NDArray[np.uint16] | NDArray[np.bool_]
Ints = NDArray[np.int32]

_MIN_ON_GRID = 3  # distinct values below which a codebook takes hardly more bytes than a step
_SPARE_ON_GRID = 16  # unused integers that a grid may have, besides one per value


def encode(
    weights: Mapping[str, Tensor],
    dtype: str = "fp16",
    coder: str | Coder = "auto",
    about: Mapping[str, Any] | None = None,
    max_seconds: float | None = None,
) -> bytes:
    """The content of a .dcz file.

    A quantized weight is written as coded integers, next to the scales of its quantizer; another
    float32 tensor of integers times a step as coded integers and the step (as coded levels if the
    integers are paths of a trellis: trainer.compress.trellis), one with few distinct values as a
    codebook and coded indices, one with zeros as coded positions and its other values; all others,
    such as half-precision weights, as their values.
    Tensors that are equal are written once. Only `dtype` rounds values; all others are exact, minus
    zero included: a weight times a mask has one in place of each negative weight, and takes many
    fewer bytes as `weight * mask + 0.0`. In addition to the weights, up to about 25 bytes of memory
    per element of the largest tensor are used.

    Args:
        weights: a state_dict: tensors by name.
        dtype: type in which codebooks, biases and norms (float32 tensors of at most one
            dimension) are written: "fp16", for values that it rounds only slightly (see
            trainer.compress.half), or "fp32".
        coder: of positions and indices: a name, or an object of a class of your own, whose dotted
            path the file records; see trainer.compress.coding.encode_layer.
        about: plain values that `describe` gives back.
        max_seconds: estimated CPU time that coder="auto" may take to search for the fewest bytes,
            without the first compilation; None: no limit. The estimate does not depend on the
            machine, so the bytes do not either.

    Raises:
        TypeError, ValueError: as `check`, or `about` takes more bytes than the format allows.
        ValueError: a coder of your own fails; the message names the tensor.
    """
    check(weights)
    entries: list[Entry] = []
    layers: list[bytes] = []
    streams: dict[str, list[memoryview]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    budget = Budget(max_seconds, sum(tensor.numel() for tensor in weights.values()))
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        budget.next_tensor(tensor.numel())
        exact = dtype == "fp32" or is_exact(name, weights)
        key = (tensor.dtype, tensor.shape, exact, hashlib.sha256(_raw(tensor)).digest())
        if tensor.numel() and key in seen:
            entries.append(Entry(name, ALIAS, of=seen[key]))
            continue
        seen[key] = name
        entry, layer, values = _written(
            name, tensor, weights.get(name + SCALE), exact, coder, budget
        )
        entries.append(entry)
        layers += [] if layer is None else [layer]
        streams.setdefault(entry.stored, []).append(_raw(values))
    header: dict[str, Any] = {"about": dict(about or {})}
    if not isinstance(coder, str):
        header[CODER] = coder_path(coder)
    header["tensors"] = [entry.as_json() for entry in entries]
    coded = [
        encode_floats(b"".join(streams.pop(stored)), DTYPES[stored].itemsize)
        for stored in sorted(streams)
    ]
    kinds = {entry.kind for entry in entries}
    magic = MAGIC_3 if TRELLIS in kinds else MAGIC_2 if UNIFORM in kinds else MAGIC
    return join(header, [*layers, *coded], magic)


def try_coder(coder: Coder) -> None:
    """Encode and decode a small layer, to find out early whether a coder of your own works.

    Raises:
        ValueError: It raises an exception, or does not decode what it encoded.
    """
    levels = np.array([[0, 1, 2], [2, 0, 0]])
    encode_layer(levels, levels.shape, 2, 1, coder)


def check(weights: Mapping[str, Any]) -> None:
    """Check whether a state_dict can be written. The tensors may be on the meta device.

    Raises:
        TypeError: an entry is not a tensor, or of a type that the format does not have.
        ValueError: one has too many dimensions, or names and shapes take more bytes than the
            format allows.
    """
    rows = []
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a {type(tensor).__name__} cannot be written, only tensors")
        if tensor.dtype not in NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)
            raise TypeError(f"{name}: a {tensor.dtype} tensor cannot be written, only {known}")
        shape = tuple(tensor.shape)
        if not fits_format(shape):
            raise ValueError(
                f"{name}: a tensor of {len(shape)} dimensions and {tensor.numel()} elements cannot "
                f"be written, only {MAX_DIMENSIONS} dimensions and less than 2^48 elements"
            )
        dtype = NAMES[tensor.dtype]
        longest = min(tensor.numel(), MAX_CLUSTERS)
        row = Entry(name, UNIFORM, dtype, shape, 1, dtype, below=longest, above=tensor.numel())
        rows.append(row.as_json())  # the longest entry that this tensor can have
    header_text({"tensors": rows})


def _written(
    name: str, tensor: Tensor, scale: Tensor | None, exact: bool, coder: str | Coder, budget: Budget
) -> tuple[Entry, bytes | None, Tensor]:
    """How a tensor is written, its coded layer if it has one, and the values for the stream."""
    found = None if scale is None else _on_grid(name, tensor, scale.detach().cpu())
    entry, levels, values = found or _plan(name, tensor, exact)
    if levels is None:
        return entry, None, values
    if entry.kind in STEPPED:
        negatives = entry.below
    else:
        negatives = 0 if entry.kind == MASK else int((values < 0).sum())
    try:
        layer = encode_layer(levels, entry.shape, entry.clusters, negatives, coder, budget)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return entry, layer, values


def _on_grid(
    name: str, tensor: Tensor, scale: Tensor
) -> tuple[Entry, Levels | None, Tensor] | None:
    """As `_plan`, for a weight of 8-bit integers times a scale; None for any other weight."""
    shape = tuple(tensor.shape)
    if tensor.dtype != torch.float32 or not tensor.numel() or not is_scale(scale, shape):
        return None
    rounded = (tensor / broadcast_scale(scale, tensor.ndim)).round_()
    if not bool(rounded.abs().amax() <= 127):  # or NaN
        return None
    integers = rounded.to(torch.int8)
    del rounded
    if not _same_bits(multiplied(integers, scale), tensor):
        return None
    codes = integers.numpy()
    values = np.unique(codes)
    values = values[values != 0]
    table = np.zeros(256, np.uint16)
    table[values.view(np.uint8)] = np.arange(len(values)) + 1
    levels = look_up(table, codes.view(np.uint8))
    return Entry(name, GRID, "f32", shape, len(values), "i8"), levels, torch.from_numpy(values)


def _plan(name: str, tensor: Tensor, exact: bool) -> tuple[Entry, Levels | None, Tensor]:
    """How a tensor is written, its levels if they are coded, and the values for the stream, in the
    type in which they are stored.
    """
    dtype, shape = NAMES[tensor.dtype], tuple(tensor.shape)
    found = shared_values(tensor)
    if found is not None:
        if stepped := _stepped(tensor, found):
            kind, step, integers = stepped
            below, above = max(0, -int(integers.min())), max(0, int(integers.max()))
            entry = Entry(name, kind, dtype, shape, 1, NAMES[step.dtype], below=below, above=above)
            return entry, _levels(integers, below), step.reshape(1)
        values, survivors = found if exact else to_half(found), int(tensor.count_nonzero())
        if _bits_of_shared(values, survivors) <= 32 * survivors:
            entry = Entry(name, CODEBOOK, dtype, shape, len(values), NAMES[values.dtype])
            return entry, _places(tensor, found), values
    is_float = tensor.dtype == torch.float32 and tensor.numel() > 0
    if is_float and tensor.ndim > 1:
        kept = tensor.view(torch.int32) != 0  # minus zero is kept
        count = int(kept.sum())
        if count < 0.9 * tensor.numel():
            return Entry(name, MASK, dtype, shape, count, dtype), kept.numpy(), tensor[kept]
    values = to_half(tensor) if is_float and tensor.ndim < 2 and not exact else tensor
    return Entry(name, RAW, dtype, shape, tensor.numel(), NAMES[values.dtype]), None, values


def _stepped(tensor: Tensor, values: Tensor) -> tuple[str, Tensor, Ints] | None:
    """A tensor as integers and a step.

    Args:
        tensor: float32.
        values: Its distinct values other than zero, finite or infinite, ascending.

    Returns:
        The kind of the entry; the step, in fp16 if it is exact in that; and the integers of that
        kind, int32 in the tensor's shape. None if there is no grid, or if a codebook takes hardly
        more bytes.
    """
    if len(values) < _MIN_ON_GRID or not bool(values.isfinite().all()):
        return None
    # Floats are integers times powers of two, so the greatest common divisor is exact.
    ratios = [abs(value).as_integer_ratio() for value in values.tolist()]
    unit = max(below for _, below in ratios)
    step = math.gcd(*(above * (unit // below) for above, below in ratios))
    low, high = (round(value * unit / step) for value in (values[0].item(), values[-1].item()))
    span = max(0, -low) + max(0, high)
    if span > 2 * MAX_CLUSTERS - 2:
        return None
    exact = torch.tensor(step / unit, dtype=torch.float32)
    half = exact.half()
    stored = half if float(half) == float(exact) else exact
    integers = np.rint(tensor.numpy() / np.float32(exact)).astype(np.int32)
    if (levels := levels_of(integers.copy())) is not None:  # span is about twice theirs
        return TRELLIS, stored, levels
    longest = min(MAX_CLUSTERS, 2 * len(values) + _SPARE_ON_GRID)
    return (UNIFORM, stored, integers) if span <= longest else None


def _levels(integers: Ints, below: int) -> NDArray[np.uint16]:
    """The level of each integer from -`below` on: 0 for 0, else from 1 on."""
    levels = integers + below + (integers < 0)
    return np.where(integers == 0, 0, levels).astype(np.uint16)


def _bits_of_shared(values: Tensor, survivors: int) -> float:
    """Upper bound on the bits of a codebook and the indices into it."""
    index = math.log2(max(1, len(values)))
    return 8 * values.element_size() * len(values) + index * survivors


def _places(tensor: Tensor, values: Tensor) -> NDArray[np.uint16]:
    """The level of each element: 0 for zero, otherwise 1 + its index among the values."""
    weights = tensor.numpy()
    there = weights != 0
    levels = np.zeros(weights.shape, np.uint16)
    levels[there] = np.searchsorted(values.numpy(), weights[there]) + 1
    return levels


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied if it is contiguous."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data
