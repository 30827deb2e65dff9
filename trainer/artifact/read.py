"""From the bytes of a .dcz file to a state_dict, and to what can be said about it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.artifact.container import ArtifactError, split
from trainer.artifact.tensors import (
    ALIAS,
    CODEBOOK,
    DTYPES,
    GRID,
    MASK,
    RAW,
    SCALE,
    Entry,
    multiplied,
    parse,
)
from trainer.compress.coding import CorruptError, decode_floats, decode_layer
from trainer.compress.quantize import is_grid

_KINDS = {CODEBOOK: "shared", GRID: "quantized", MASK: "pruned", RAW: "plain"}
_CODED = (CODEBOOK, GRID, MASK)

LIMIT = 1 << 36  # bytes of all tensors: a file that claims more is refused


@dataclass(frozen=True)
class Description:
    """What a file holds."""

    about: Mapping[str, Any]
    parameters: int  # single values of its floating tensors but running statistics, ties once
    layers: list[dict[str, Any]]  # name, shape, kind, weights, nonzero, bits, bytes of each tensor


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a .dcz file.

    Raises:
        ArtifactError: it is none, damaged, or made up.
        OSError: it cannot be read.
    """
    return loads(Path(path).read_bytes())


def loads(content: bytes) -> dict[str, Tensor]:
    """The state_dict in the content of a .dcz file. Raises ArtifactError."""
    return _File(content).tensors()


def describe(content: bytes) -> Description:
    """What the content of a .dcz file is made of; it is decoded whole. Raises ArtifactError."""
    file = _File(content)
    tensors = file.tensors()
    layers = [file.facts(entry, tensors[entry.name]) for entry in file.entries]
    parameters = sum(
        entry.size
        for entry in file.entries
        if entry.kind != ALIAS and DTYPES[entry.dtype].is_floating_point and not _statistic(entry)
    )
    return Description(file.about, parameters, layers)


class _File:
    """The parsed frame of a file: entries, and for each the bytes that it is made of."""

    def __init__(self, content: bytes) -> None:
        header, sections = split(content)
        rows = header.get("tensors")
        if not isinstance(rows, list) or not isinstance(header.get("about", {}), dict):
            raise ArtifactError("the header lists no tensors")
        self.about: Mapping[str, Any] = header.get("about", {})
        self.entries = [parse(row) for row in rows]
        if len({entry.name for entry in self.entries}) != len(self.entries):
            raise ArtifactError("two tensors have one name")
        if sum(e.size * DTYPES[e.dtype].itemsize for e in self.entries) > LIMIT:
            raise ArtifactError(f"the tensors would take more than {LIMIT} bytes")
        coded = [entry for entry in self.entries if entry.kind in _CODED]
        self._counts: dict[str, int] = {}  # of the values in each stream
        for entry in self.entries:
            if entry.kind != ALIAS:
                self._counts[entry.stored] = self._counts.get(entry.stored, 0) + entry.count
        stored = sorted(self._counts)
        if len(sections) != len(coded) + len(stored):
            raise ArtifactError(f"{len(sections)} sections are not what the header announces")
        self._layers = {e.name: bytes(s) for e, s in zip(coded, sections, strict=False)}
        self._streams = dict(zip(stored, sections[len(coded) :], strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Everything, decoded."""
        places = {stored: (self._numbers(stored), 0) for stored in self._streams}
        found: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.kind == ALIAS:
                if entry.of not in found:
                    raise ArtifactError(f"{entry.name!r} is said to equal {entry.of!r}: unknown")
                found[entry.name] = found[entry.of]
                continue
            values, place = places[entry.stored]
            places[entry.stored] = values, place + entry.count
            own = values[place : place + entry.count].to(DTYPES[entry.dtype])
            found[entry.name] = self._tensor(entry, own)
        for entry in self.entries:
            if entry.kind == GRID:
                found[entry.name] = _scaled(entry, found[entry.name], found.get(entry.name + SCALE))
        for entry in self.entries:
            if entry.kind == ALIAS:
                found[entry.name] = found[entry.of]
        return found

    def facts(self, entry: Entry, tensor: Tensor) -> dict[str, Any]:
        """One tensor's share of the file."""
        size = 0.0
        if entry.kind != ALIAS:
            stream = len(self._streams[entry.stored])
            size = stream * entry.count / max(1, self._counts[entry.stored])
            size += len(self._layers.get(entry.name, b""))
        bits = 8 * DTYPES[entry.dtype if entry.kind == ALIAS else entry.stored].itemsize
        if entry.kind in (CODEBOOK, GRID):
            bits = max(1, (entry.count - 1).bit_length())
        return {
            "name": entry.name,
            "shape": list(tensor.shape),
            "kind": _KINDS.get(entry.kind) or f"= {entry.of}",
            "weights": tensor.numel(),
            "nonzero": int(tensor.count_nonzero()),
            "bits": bits,
            "bytes": round(size),
        }

    def _numbers(self, stored: str) -> Tensor:
        dtype, count = DTYPES[stored], self._counts[stored]
        try:
            raw = decode_floats(
                bytes(self._streams[stored]), count * dtype.itemsize, dtype.itemsize
            )
        except CorruptError as error:
            raise ArtifactError(f"the {stored} numbers: {error}") from error
        if dtype is torch.bool and raw.strip(b"\0\1"):
            raise ArtifactError("a bool is neither 0 nor 1")
        return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)

    def _tensor(self, entry: Entry, values: Tensor) -> Tensor:
        if entry.kind not in _CODED:
            return values.reshape(entry.shape).clone()
        clusters = 1 if entry.kind == MASK else max(1, entry.count)
        negatives = 0 if entry.kind == MASK else int((values < 0).sum())
        try:
            levels = decode_layer(self._layers[entry.name], entry.shape, clusters, negatives)
        except CorruptError as error:
            raise ArtifactError(f"{entry.name!r}: {error}") from error
        levels = levels.reshape(entry.shape)  # a scalar comes as one element
        if entry.kind != MASK:
            table = np.zeros(clusters + 1, dtype=values.numpy().dtype)
            table[1 : 1 + len(values)] = values.numpy()
            return torch.from_numpy(np.asarray(table[levels]))
        dense = np.zeros(entry.shape, dtype=values.numpy().dtype)
        if int(levels.sum(dtype=np.int64)) != entry.count:
            raise ArtifactError(f"{entry.name!r}: its positions and values differ in number")
        dense[levels != 0] = values.numpy()
        return torch.from_numpy(dense)


def _scaled(entry: Entry, integers: Tensor, scale: Tensor | None) -> Tensor:
    """The weight that a GRID means. Raises ArtifactError where there are no scales for it."""
    sizes = ((), (1,), entry.shape[:1])
    if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) not in sizes:
        raise ArtifactError(f"{entry.name!r} has no scales that fit it")
    return multiplied(integers, scale)


def _statistic(entry: Entry) -> bool:
    if is_grid(entry.name):
        return True
    return entry.name.rpartition(".")[2] in ("running_mean", "running_var")
