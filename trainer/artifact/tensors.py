"""What the header of a .dcz file says of each tensor, typed and checked. docs/artifact.md."""

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import torch

from trainer.artifact.container import ArtifactError

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

CODEBOOK, MASK, RAW, ALIAS = "c", "m", "r", "a"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    CODEBOOK: a coded layer of indices in its section, `count` values in a stream of `stored` type.
    MASK: a coded layer of positions in its section, `count` other values in the stream. Both are
        of type f32 and not empty.
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

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def as_json(self) -> list[Any]:
        """As the header has it."""
        if self.kind == ALIAS:
            return [self.name, self.of]
        head = [self.name, self.dtype, list(self.shape), self.kind]
        return [*head, self.stored] if self.kind == RAW else [*head, self.count, self.stored]


def parse(row: Any) -> Entry:
    """The entry that a row of the header means. Raises ArtifactError."""
    match row:
        case [str(name), str(of)]:
            return Entry(name, ALIAS, of=of)
        case [str(name), str(dtype), list(shape), str(kind), str(stored)] if kind == RAW:
            count = None
        case [str(name), str(dtype), list(shape), str(kind), int(count), str(stored)] if kind in (
            CODEBOOK,
            MASK,
        ):
            pass
        case _:
            raise ArtifactError(f"the header has an entry that is none: {reprlib.repr(row)}")
    sound = all(type(n) is int and 0 <= n < 1 << 48 for n in [*shape, count or 0])
    if not sound or len(shape) > 16 or dtype not in DTYPES or stored not in DTYPES:
        raise ArtifactError(f"the header is wrong about {name[:80]!r}: {reprlib.repr(row)}")
    size = math.prod(shape)
    # Sides count where others are 0 as well: NumPy and PyTorch multiply them.
    spread = math.prod(n or 1 for n in shape)
    most = min(size, (1 << 16) - 1) if kind == CODEBOOK else size
    if spread >= 1 << 48 or (count or 0) > most:
        raise ArtifactError(f"the header claims too much of {name[:80]!r}: {reprlib.repr(row)}")
    if kind != RAW and (dtype != "f32" or not size):
        raise ArtifactError(f"{name[:80]!r} cannot be coded: it is empty, or not f32")
    return Entry(name, kind, dtype, tuple(shape), size if count is None else count, stored)
