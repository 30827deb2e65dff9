"""From a state_dict to the bytes of a .dcz file."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.artifact.container import join
from trainer.artifact.tensors import (
    ALIAS,
    CODEBOOK,
    DTYPES,
    GRID,
    MASK,
    NAMES,
    RAW,
    SCALE,
    Entry,
    multiplied,
)
from trainer.compress.codebooks import codebook_of
from trainer.compress.coding import encode_floats, encode_layer
from trainer.compress.quantize import is_grid

_HALF = 65504.0  # the largest number of fp16


def encode(
    weights: Mapping[str, Tensor],
    numbers: str = "fp16",
    coder: str = "auto",
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """The content of a .dcz file.

    A quantized weight is written as coded integers, next to the scales of its quantizer; any other
    tensor with few distinct values as a codebook and coded indices, one with zeros as coded
    positions and its other values, any other as its values; tensors that are equal are written
    once. Nothing is lost but what `numbers` rounds.

    Args:
        weights: a state_dict: tensors by name.
        numbers: type in which codebooks, biases and norms (float32 tensors of at most one
            dimension) are written: "fp16", where they do not overflow, or "fp32".
        coder: of positions and indices: see trainer.compress.coding.encode_layer.
        about: plain values that `describe` gives back.

    Raises:
        TypeError: a tensor of a type that the format does not know.
        ValueError: names and `about` take more than the format has room for.
    """
    entries: list[Entry] = []
    layers: list[bytes] = []
    streams: dict[str, list[bytes]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name}: a {tensor.dtype} tensor cannot be written")
        key = (tensor.dtype, tensor.shape, _raw(tensor))
        if tensor.numel() and key in seen:
            entries.append(Entry(name, ALIAS, of=seen[key]))
            continue
        seen[key] = name
        scale = weights.get(name + SCALE)
        found = None if scale is None else _on_grid(name, tensor, scale.detach().cpu())
        entry, levels, values = found or _plan(name, tensor, numbers)
        if levels is not None:
            clusters = 1 if entry.kind == MASK else max(1, entry.count)
            negatives = 0 if entry.kind == MASK else int((values < 0).sum())
            matrix = levels.numpy().astype(np.uint16)
            layers.append(encode_layer(matrix, entry.shape, clusters, negatives, coder))
        streams.setdefault(entry.stored, []).append(_raw(values))
        entries.append(entry)
    header = {"about": dict(about or {}), "tensors": [entry.as_json() for entry in entries]}
    coded = [
        encode_floats(b"".join(streams[stored]), DTYPES[stored].itemsize)
        for stored in sorted(streams)
    ]
    return join(header, [*layers, *coded])


def _on_grid(
    name: str, tensor: Tensor, scale: Tensor
) -> tuple[Entry, Tensor | None, Tensor] | None:
    """As `_plan`, for a weight that is integers of 8 bits times a scale; None where it is not."""
    if tensor.dtype != torch.float32 or not tensor.numel():
        return None
    integers = (tensor / multiplied(torch.ones_like(tensor), scale)).round()
    inside = bool(integers.isfinite().all()) and integers.abs().max() <= 127
    if not inside or _raw(multiplied(integers.to(torch.int8), scale)) != _raw(tensor):
        return None
    values, codes = integers.unique(return_inverse=True)
    zero = int((values < 0).sum())  # the place of zero, were it there
    if zero < len(values) and values[zero] == 0:
        levels = torch.where(codes == zero, 0, codes + (codes < zero).to(codes.dtype))
        values = values[values != 0]
    else:
        levels = codes + 1
    shape = tuple(tensor.shape)
    return Entry(name, GRID, "f32", shape, len(values), "i8"), levels, values.to(torch.int8)


def _plan(name: str, tensor: Tensor, numbers: str) -> tuple[Entry, Tensor | None, Tensor]:
    """How a tensor is written, its levels if they are coded, and the values that go into a stream,
    in the type in which they are stored.
    """
    dtype, shape = NAMES[tensor.dtype], tuple(tensor.shape)
    numbers = "fp32" if is_grid(name) else numbers
    codable = tensor.dtype == torch.float32 and tensor.numel() > 0
    book = codebook_of(tensor) if codable else None
    if book is not None and not (tensor == 0).logical_and(tensor.signbit()).any():
        values = _narrowed(book.values, numbers)
        entry = Entry(name, CODEBOOK, dtype, shape, len(values), NAMES[values.dtype])
        return entry, book.codes, values
    kept = (tensor != 0) | tensor.signbit() if codable else None
    if kept is not None and tensor.ndim > 1 and int(kept.sum()) < 0.9 * tensor.numel():
        survivors = tensor[kept]
        return Entry(name, MASK, dtype, shape, survivors.numel(), dtype), kept, survivors
    values = _narrowed(tensor, numbers) if kept is not None and tensor.ndim < 2 else tensor
    return Entry(name, RAW, dtype, shape, tensor.numel(), NAMES[values.dtype]), None, values


def _narrowed(values: Tensor, numbers: str) -> Tensor:
    fits = values.numel() == 0 or bool(values.abs().max() <= _HALF)
    return values.half() if numbers == "fp16" and fits else values


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return bytes(flat.numpy().data)
