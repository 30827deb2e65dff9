"""Read .dcz files: decode the state_dict, or describe the content."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.artifact.container import ArtifactError, split
from trainer.artifact.tensors import (
    ALIAS,
    CODEBOOK,
    CODER,
    DTYPES,
    GRID,
    MASK,
    RAW,
    SCALE,
    STEPPED,
    TRELLIS,
    UNIFORM,
    Entry,
    coder_path,
    is_scale,
    look_up,
    multiplied,
    parse,
)
from trainer.compress.coding import Coder, CorruptError, decode_floats, decode_layer
from trainer.compress.quantize import is_quantizer_entry
from trainer.compress.trellis import multiples_of

T = TypeVar("T")

_KINDS = {
    CODEBOOK: "shared",
    GRID: "quantized",
    UNIFORM: "uniform",
    TRELLIS: "trellis",
    MASK: "pruned",
    RAW: "plain",
}
_CODED = (CODEBOOK, GRID, *STEPPED, MASK)

# Maximum bytes of all decoded tensors by default: `_MIN_ALLOWED`, or `_GROWTH` times the size of
# the file if that is more.
_MIN_ALLOWED, _GROWTH = 1 << 30, 1000


@dataclass(frozen=True)
class Description:
    """The content of a file. The bytes of all layers and of the frame add up to its size."""

    about: Mapping[str, Any]
    # Elements of the floating-point tensors, without running statistics and tensors of quantizers.
    # Equal tensors count once. The model may count others, since it knows its buffers and ties.
    parameters: int
    # name, shape, kind, weights, nonzero, distinct, bits, bytes of each tensor; `distinct` is the
    # number of different nonzero values of a shared, quantized or uniform tensor, else None.
    layers: list[dict[str, Any]]
    frame: int  # bytes that belong to no single tensor: header, lengths, checksums


def load(
    path: str | os.PathLike[str], max_bytes: int | None = None, coder: Coder | None = None
) -> dict[str, Tensor]:
    """Read the state_dict in a .dcz file. No two tensors share memory.

    Args:
        path: The file.
        max_bytes: Maximum size of all decoded tensors together. A file whose header claims more is
            refused before anything is allocated. None: 1 GiB, or 1000 times the size of the file if
            that is more.
        coder: An object of the class that coded the layers, if it is not one of this package: code
            that a file names is never imported. Other files do not need it.

    Raises:
        ArtifactError: The file is not a .dcz file, is damaged or forged, needs another coder, or
            its tensors take more than `max_bytes` or more than the free memory.
        OSError: The file cannot be read.
    """
    return loads(Path(path).read_bytes(), max_bytes, coder)


def loads(
    content: bytes, max_bytes: int | None = None, coder: Coder | None = None
) -> dict[str, Tensor]:
    """As `load`, from the content of a file."""
    file = _File(content, max_bytes, coder)
    return file.guarded(file.tensors)


def read_about(content: bytes) -> Mapping[str, Any]:
    """The plain values that `encode` stored beside the tensors, which are not decoded.

    Raises:
        ArtifactError: The content is not that of a .dcz file, or it is damaged.
    """
    header, _ = split(content)
    about = header.get("about", {})
    if not isinstance(about, dict):
        raise ArtifactError("the header is damaged: its `about` is not a mapping")
    return about


def describe(
    content: bytes, max_bytes: int | None = None, coder: Coder | None = None
) -> Description:
    """Describe the content of a .dcz file. All tensors are decoded for it.

    Args:
        content: The content of the file.
        max_bytes, coder: As for `load`.

    Raises:
        ArtifactError: As `load`.
    """
    file = _File(content, max_bytes, coder)
    layers = file.guarded(file.layers)
    own = [entry for entry in file.entries if entry.kind != ALIAS]
    parameters = sum(
        entry.size
        for entry in own
        if DTYPES[entry.dtype].is_floating_point and not _statistic(entry)
    )
    frame = len(content) - sum(layer["bytes"] for layer in layers)
    return Description(file.about, parameters, layers, frame)


class _File:
    """A file whose header is parsed and validated, and whose tensors are not decoded yet."""

    def __init__(self, content: bytes, max_bytes: int | None, coder: Coder | None) -> None:
        header, sections = split(content)
        rows = header.get("tensors")
        if not isinstance(rows, list) or not isinstance(header.get("about", {}), dict):
            raise ArtifactError("the file is damaged: its header lists no tensors")
        self.about: Mapping[str, Any] = header.get("about", {})
        self._coder = _matching(header.get(CODER), coder)
        self.entries = [parse(row) for row in rows]
        self._own = _resolved(self.entries)
        self._bytes = sum(self._own[entry.name].nbytes for entry in self.entries)
        allowed = max(_MIN_ALLOWED, _GROWTH * len(content)) if max_bytes is None else max_bytes
        if self._bytes > allowed:
            raise ArtifactError(
                f"its tensors would take {self._bytes:,} bytes, and {allowed:,} are allowed; if "
                "you trust where it comes from, allow more: max_bytes=BYTES in Python, --max-bytes "
                "on the command line"
            )
        coded = [entry for entry in self.entries if entry.kind in _CODED]
        self._counts: dict[str, int] = {}  # number of values in each stream, by type
        for entry in self.entries:
            if entry.kind != ALIAS:
                self._counts[entry.stored] = self._counts.get(entry.stored, 0) + entry.count
        stored = sorted(self._counts)
        if len(sections) != len(coded) + len(stored):
            raise ArtifactError(
                f"damaged: it has {len(sections)} sections, not the number that its header needs"
            )
        self._layers = {e.name: s for e, s in zip(coded, sections, strict=False)}
        self._streams = dict(zip(stored, sections[len(coded) :], strict=True))

    def guarded(self, decode: Callable[[], T]) -> T:
        """Call `decode`.

        Raises:
            ArtifactError: There is not enough memory.
        """
        try:
            return decode()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise  # torch raises a plain RuntimeError if there is not enough memory
            raise ArtifactError(
                f"there is not enough memory for its tensors, {self._bytes:,} bytes"
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, decoded."""
        decoded = self._decoded()
        found = {}
        for entry in self.entries:
            tensor = decoded[self._own[entry.name].name]
            found[entry.name] = tensor.clone() if entry.kind == ALIAS else tensor
        return found

    def layers(self) -> list[dict[str, Any]]:
        """A description of each tensor, with its share of the bytes; see `Description.layers`."""
        facts = {name: self._facts(name, tensor) for name, tensor in self._decoded().items()}
        found = []
        for entry in self.entries:
            own = self._own[entry.name]
            row = facts[own.name]
            if entry.kind == ALIAS:
                bits = 8 * DTYPES[own.dtype].itemsize
                row = {**row, "name": entry.name, "kind": f"= {entry.of}", "bits": bits, "bytes": 0}
            found.append(row)
        return found

    def _facts(self, name: str, tensor: Tensor) -> dict[str, Any]:
        entry = self._own[name]
        stream = len(self._streams[entry.stored]) * entry.count
        share = stream / max(1, self._counts[entry.stored])
        bits, coded = 8 * DTYPES[entry.stored].itemsize, entry.kind in (CODEBOOK, GRID, *STEPPED)
        distinct = entry.clusters if entry.kind in STEPPED else entry.count
        if coded:
            bits = max(1, (distinct - 1).bit_length())
        return {
            "name": name,
            "shape": list(entry.shape),
            "kind": _KINDS[entry.kind],
            "weights": entry.size,
            "nonzero": int(tensor.count_nonzero()),
            "distinct": distinct if coded else None,
            "bits": bits,
            "bytes": round(share + len(self._layers.get(name, b""))),
        }

    def _decoded(self) -> dict[str, Tensor]:
        """All tensors by name, decoded, except aliases."""
        streams = {stored: self._numbers(stored) for stored in self._streams}
        places = dict.fromkeys(streams, 0)
        found: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.kind == ALIAS:
                continue
            start, dtype = places[entry.stored], DTYPES[entry.stored]
            places[entry.stored] = end = start + entry.count * dtype.itemsize
            values = torch.empty(entry.count, dtype=dtype)
            values.view(torch.uint8).numpy()[:] = streams[entry.stored][start:end]
            found[entry.name] = self._tensor(entry, values.to(DTYPES[entry.dtype]))
        for entry in self.entries:
            if entry.kind == GRID:
                own = self._own.get(entry.name + SCALE)
                scale = None if own is None else found[own.name]
                found[entry.name] = _scaled(entry, found[entry.name], scale)
        return found

    def _numbers(self, stored: str) -> NDArray[np.uint8]:
        """The bytes of all values that are stored as the type `stored`."""
        dtype, count = DTYPES[stored], self._counts[stored]
        try:
            raw = decode_floats(self._streams[stored], count * dtype.itemsize, dtype.itemsize)
        except CorruptError as error:
            raise ArtifactError(f"the file is damaged: its {stored} values: {error}") from error
        numbers = np.frombuffer(raw, np.uint8)
        if dtype is torch.bool and numbers.max(initial=0) > 1:
            raise ArtifactError("the file is damaged: a bool is neither 0 nor 1")
        return numbers

    def _tensor(self, entry: Entry, values: Tensor) -> Tensor:
        if entry.kind not in _CODED:
            return values.reshape(entry.shape)
        meanings = _integers(entry, values) if entry.kind in STEPPED else values
        negatives = 0 if entry.kind == MASK else int((meanings < 0).sum())
        layer = bytes(self._layers[entry.name])
        try:
            levels = decode_layer(layer, entry.shape, entry.clusters, negatives, self._coder)
        except CorruptError as error:
            raise ArtifactError(f"{entry.name!r}: {error}") from error
        levels = levels.reshape(entry.shape)
        if entry.kind == TRELLIS:
            return torch.from_numpy(multiples_of(_meant(entry, levels, meanings))) * values[0]
        if entry.kind == UNIFORM:
            meanings = meanings * values
        if entry.kind != MASK:
            return torch.from_numpy(_meant(entry, levels, meanings))
        numbers = values.numpy()
        dense = np.zeros(entry.shape, dtype=numbers.dtype)
        if int(levels.sum(dtype=np.int64)) != entry.count:
            raise ArtifactError(f"{entry.name!r}: the numbers of its positions and values differ")
        dense[levels != 0] = numbers
        return torch.from_numpy(dense)


def _matching(path: object, coder: Coder | None) -> Coder | None:
    """The coder to use for a file.

    Args:
        path: Dotted path of a class, as in the header; None: all coders are of this package.
        coder: As for `load`.

    Raises:
        ArtifactError: Another coder is needed.
    """
    if path is None:
        return None
    if not isinstance(path, str):
        raise ArtifactError("the header is wrong about the coder: it must be a class path")
    if coder is None or coder_path(coder) != path:
        given = "none was given" if coder is None else f"{coder_path(coder)} was given"
        raise ArtifactError(
            f"its layers are coded by the class {path[:80]!r}, and {given}; pass an object of that "
            "class: coder=... in Python, --coder on the command line"
        )
    return coder


def _resolved(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The entry that stores the tensor of each name; an alias refers to another entry."""
    own: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in own:
            raise ArtifactError(f"two tensors are named {entry.name[:80]!r}")
        if entry.kind == ALIAS and entry.of not in own:
            raise ArtifactError(f"{entry.name[:80]!r} refers to {entry.of[:80]!r}: unknown")
        own[entry.name] = own[entry.of] if entry.kind == ALIAS else entry
    return own


def _scaled(entry: Entry, integers: Tensor, scale: Tensor | None) -> Tensor:
    """The weight of an entry of kind GRID: its integers times their scales.

    Raises:
        ArtifactError: There are no scales, or they do not fit its shape.
    """
    if scale is None or not is_scale(scale, entry.shape):
        raise ArtifactError(f"{entry.name!r} has no scales that fit it")
    return multiplied(integers, scale).reshape(entry.shape)


def _meant(entry: Entry, levels: NDArray[np.uint16], meanings: Tensor) -> NDArray[Any]:
    """What levels stand for: 0 for 0, and `meanings` for 1, 2, ..."""
    numbers = meanings.numpy()
    table = np.zeros(entry.clusters + 1, dtype=numbers.dtype)
    table[1 : 1 + len(numbers)] = numbers
    return look_up(table, levels)


def _integers(entry: Entry, step: Tensor) -> Tensor:
    """What the levels of an entry with a step stand for, ascending; int32.

    Raises:
        ArtifactError: The step is invalid.
    """
    if not 0 < float(step) < math.inf:
        raise ArtifactError(f"{entry.name!r} has a step of {float(step)}")
    below = torch.arange(-entry.below, 0, dtype=torch.int32)
    return torch.cat((below, torch.arange(1, entry.above + 1, dtype=torch.int32)))


def _statistic(entry: Entry) -> bool:
    """Whether a tensor belongs to a quantizer or holds running statistics."""
    if is_quantizer_entry(entry.name):
        return True
    return entry.name.rpartition(".")[2] in ("running_mean", "running_var")
