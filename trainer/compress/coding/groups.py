"""Levels as two streams of symbols: which inputs of a group survive, and the survivors' clusters.

Made for patterns such as 2 of 4: there are 6 ways to choose them, so that a position takes 0.65
bits instead of 1.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import ans, varint
from trainer.compress.coding.errors import CorruptError

Levels = NDArray[np.uint16]

SIZES = (4, 8)  # of a group; the encoder takes the smaller bytes


def has_pattern(levels: Levels) -> bool:
    """Whether at most half of each group survive, and nearly as many on average."""
    if levels.ndim < 2:
        return False
    for size in SIZES:
        if levels.shape[1] % size == 0:
            counts = np.count_nonzero(_grouped(levels, size), axis=1)
            if counts.max() <= size // 2 and counts.mean() > size // 2 - 1:
                return True
    return False


def encode(levels: Levels, clusters: int) -> bytes:
    """Encode levels [out, in, ...], or of any other shape with less gain.

    The bytes hold the size of a group, the length of the coded groups, these, and the values.
    """
    return min((_encode(levels, clusters, size) for size in SIZES), key=len)


def _encode(levels: Levels, clusters: int, size: int) -> bytes:
    groups = _grouped(levels, size)
    symbols = (groups != 0) @ (1 << np.arange(size))
    coded = ans.encode(symbols.astype(np.uint16), 1 << size)
    values = groups[groups != 0] - np.uint16(1)
    return bytes([size]) + varint.encode(len(coded)) + coded + ans.encode(values, clusters)


def decode(blob: bytes, shape: Sequence[int], clusters: int) -> Levels:
    """Decode levels of this shape.

    Raises:
        CorruptError: No encoder wrote these bytes for such a layer.
    """
    if not blob or blob[0] not in SIZES:
        raise CorruptError("the head of a layer coded in groups is damaged")
    size = blob[0]
    length, at = varint.decode(blob, 1)
    if length > len(blob) - at:
        raise CorruptError("the head of a layer coded in groups does not fit its shape")
    moved = _moved(shape)
    count = int(np.prod(moved))
    symbols = ans.decode(blob[at : at + length], -(-count // size), 1 << size)
    mask = (symbols[:, None] >> np.arange(size, dtype=np.uint16) & 1).astype(bool)
    groups = np.zeros(mask.shape, np.uint16)
    groups[mask] = ans.decode(blob[at + length :], int(mask.sum()), clusters) + np.uint16(1)
    flat = groups.ravel()
    if flat[count:].any():
        raise CorruptError("groups lead beyond the layer")
    levels = flat[:count].reshape(moved)
    return np.moveaxis(levels, -1, 1) if len(shape) > 1 else levels.reshape(tuple(shape))


def _moved(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape [out, in, ...] with the inputs last."""
    return (*shape[:1], *shape[2:], *shape[1:2])


def _grouped(levels: Levels, size: int) -> Levels:
    """Groups of consecutive inputs [groups, size], the last one filled with zeros."""
    flat = (np.moveaxis(levels, 1, -1) if levels.ndim > 1 else levels).ravel()
    return np.pad(flat, (0, -flat.size % size)).reshape(-1, size)
