"""Coded layers: a matrix of levels as bytes, by the coder that makes the fewest."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.compress.coding import ans, context, huffman
from trainer.compress.coding.errors import CorruptError

Levels = npt.NDArray[np.uint16]


class Coder(NamedTuple):
    """One way to code a layer. `decode` raises CorruptError where it can tell that bytes are wrong;
    that it always can is the container's business, whose sections have checksums.
    """

    encode: Callable[[Levels, int], bytes]
    decode: Callable[[bytes, tuple[int, int], int], Levels]


CODERS = {
    "huffman": Coder(huffman.encode, huffman.decode),
    "ans": Coder(ans.encode, ans.decode),
    "context": Coder(context.encode, context.decode),
}
_NAMES = list(CODERS)  # the first byte of a coded layer is a place in this list


def encode_layer(levels: Levels, clusters: int, coder: str = "auto") -> bytes:
    """Code a matrix.

    Args:
        levels: uint16 [rows, columns], 0 for a weight that is zero, 1 to `clusters` for the others.
        coder: one of CODERS, or auto: the one that makes the fewest bytes.
    """
    names = _NAMES if coder == "auto" else [coder]
    made = (bytes([_NAMES.index(n)]) + CODERS[n].encode(levels, clusters) for n in names)
    return min(made, key=len)


def decode_layer(blob: bytes, shape: tuple[int, int], clusters: int) -> Levels:
    """The matrix that `encode_layer` was given. Allocates no more than its shape and size justify.

    Raises:
        CorruptError: the bytes are no coded layer of this shape.
    """
    if not blob or blob[0] >= len(_NAMES):
        raise CorruptError("the coder of a layer is missing or unknown")
    if shape[0] * shape[1] > most_positions(len(blob)):
        raise CorruptError(f"{len(blob)} bytes cannot hold {shape[0]} x {shape[1]} weights")
    return CODERS[_NAMES[blob[0]]].decode(blob[1:], shape, clusters)


def most_positions(length: int) -> int:
    """How many positions a coded layer of `length` bytes can have: none costs nothing.

    A decision of the context coder takes 0.00035 bits at least (binary.FLOOR), a word of the
    range decoder may lie beyond the end; the other coders take more.
    """
    return (length + 8) * 8 * 2839  # 65536 / 16 * ln 2
