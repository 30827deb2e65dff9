"""The entries of the header of a .dcz file, one for each tensor: see docs/artifact.md."""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.artifact.container import ArtifactError
from trainer.compress.coding import Coder
from trainer.compress.quantize import broadcast_scale

DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

CODEBOOK, GRID, UNIFORM, TRELLIS, MASK, RAW, ALIAS = "c", "q", "u", "t", "m", "r", "a"
STEPPED = (UNIFORM, TRELLIS)  # kinds with a step
# Suffixes of the names of the tensors that hold the scales and the bits of a GRID.
SCALE, WIDTH = "_quantizer.scale", "_quantizer.width"

CODER = "coder"  # key in the header: dotted path of the class that coded the layers

MAX_DIMENSIONS = 16  # maximum number of dimensions of a tensor
_PIECE = 1 << 20  # elements per indexing operation


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    CODEBOOK: a coded layer of indices in its section, `count` values in a stream of `stored` type.
    GRID: the same, and the values are integers, stored as i8, to be multiplied by the tensor named
        NAME_quantizer.scale, which has one element, or one for each index of the first dimension.
    UNIFORM: a coded layer of integers in its section, from -`below` to `above`, and in a stream of
        `stored` type the step that they are multiplied by.
    TRELLIS: the same, but the integers are levels of trainer.compress.trellis, and its multiples
        are multiplied by the step.
    MASK: a coded layer of positions in its section, `count` other values in the stream. These
        five are of type f32 and not empty.
    RAW: all its values in the stream.
    ALIAS: the tensor named `of`, again.
    """

    name: str
    kind: str
    dtype: str = "f32"
    shape: tuple[int, ...] = ()
    count: int = 0
    stored: str = "f32"
    of: str = ""
    below: int = 0
    above: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, decoded."""
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def clusters(self) -> int:
        """Number of clusters of a coded layer: its largest level, at least 1."""
        if self.kind in STEPPED:
            return self.below + self.above
        return 1 if self.kind == MASK else max(1, self.count)

    def as_json(self) -> list[Any]:
        """The row of the header that describes this entry."""
        if self.kind == ALIAS:
            return [self.name, self.of]
        head = [self.name, self.dtype, list(self.shape), self.kind]
        if self.kind in STEPPED:
            return [*head, self.below, self.above, self.stored]
        return [*head, self.stored] if self.kind == RAW else [*head, self.count, self.stored]


def coder_path(coder: Coder) -> str:
    """The dotted path of a coder's class, as the header records it."""
    return f"{type(coder).__module__}.{type(coder).__qualname__}"


def multiplied(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor` times a scale with one element, or with one per index of its first dimension.

    Raises:
        RuntimeError: The shapes do not fit.
    """
    return tensor * broadcast_scale(scale, tensor.ndim)


def is_scale(scale: Tensor, shape: Sequence[int]) -> bool:
    """Whether `scale` has a type and shape that scales of a GRID of this shape may have."""
    sizes = ((), (1,), tuple(shape[:1]))
    return scale.dtype == torch.float32 and tuple(scale.shape) in sizes


def fits_format(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is within the limits of the format."""
    # An empty tensor counts its other dimensions, too: NumPy and PyTorch multiply them.
    return len(shape) <= MAX_DIMENSIONS and math.prod(n or 1 for n in shape) < 1 << 48


def look_up(table: NDArray[Any], places: NDArray[Any]) -> NDArray[Any]:
    """`table[places]`, in pieces: NumPy converts indices to 8 bytes each, which takes memory."""
    found = np.empty(places.shape, table.dtype)
    flat, wanted = found.reshape(-1), places.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        flat[start : start + _PIECE] = table[wanted[start : start + _PIECE]]
    return found


def parse(row: Any) -> Entry:
    """Parse and validate a row of the header.

    Raises:
        ArtifactError: The row is not one that `Entry.as_json` could have written.
    """
    below = above = 0
    match row:
        case [str(name), str(of)]:
            return Entry(name, ALIAS, of=of)
        case [str(name), str(dtype), list(shape), str(kind), str(stored)] if kind == RAW:
            count = None
        case [str(name), str(dtype), list(shape), str(kind), int(count), str(stored)] if kind in (
            CODEBOOK,
            GRID,
            MASK,
        ):
            pass
        case [
            str(name),
            str(dtype),
            list(shape),
            str(kind),
            int(below),
            int(above),
            str(stored),
        ] if kind in STEPPED:
            count = 1
        case _:
            raise ArtifactError(f"the header has an invalid entry: {reprlib.repr(row)}")
    numbers = [*shape, below, above] if count is None else [*shape, below, above, count]
    sound = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
    if not sound or dtype not in DTYPES or stored not in DTYPES:
        raise ArtifactError(f"the header is wrong about {name[:80]!r}: {reprlib.repr(row)}")
    possible = fits_format(shape)
    size = (
        math.prod(shape) if possible else 0
    )  # the product of a million dimensions would take minutes
    max_count = min(size, (1 << 16) - 1) if kind in (CODEBOOK, GRID) else size
    if not possible or (count or 0) > max_count:
        raise ArtifactError(f"{name[:80]!r} exceeds the limits of the format: {reprlib.repr(row)}")
    if kind in STEPPED and (not 0 < below + above < 1 << 16 or stored not in ("f32", "f16")):
        raise ArtifactError(f"the header is wrong about {name[:80]!r}: {reprlib.repr(row)}")
    if kind != RAW and (dtype != "f32" or not size):
        raise ArtifactError(f"{name[:80]!r} cannot be of this kind: it is empty, or not f32")
    if kind == GRID and stored != "i8":
        raise ArtifactError(f"{name[:80]!r} consists of integers, but is stored as {stored}")
    if DTYPES[stored].itemsize > DTYPES[dtype].itemsize:
        raise ArtifactError(f"{name[:80]!r} is of type {dtype}, but is stored as {stored}")
    count = size if count is None else count
    return Entry(name, kind, dtype, tuple(shape), count, stored, below=below, above=above)
