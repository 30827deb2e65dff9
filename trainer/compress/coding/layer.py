"""A layer's levels as bytes: the smallest of all coders, told apart by the first byte.

A layer is seen as a matrix, one row for each output, and a matrix of levels: 0 for a pruned weight,
1 to K for its cluster, counted in the order of the centroids. A layer that is pruned but not shared
has K = 1: the levels are its mask.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import ans, context, gaps, huffman
from trainer.compress.coding.errors import CorruptError

Levels = NDArray[np.uint16]

CODERS = {"context": 0, "columns": 1, "huffman": 2, "ans": 3}
MAX_CLUSTERS = 65535  # at most
MAX_CONTEXT_POSITIONS = 1 << 23  # positions; above, only gaps are fast enough to be tried unasked
_MAX_COLUMNS = 1 << 16  # columns of the context coder, whose memory grows with them
_SAMPLE = 1 << 16  # positions by which the context coder is compared with the others
_TRIAL = 1 << 18  # positions by which the options of the context coder are compared


def max_positions(length: int) -> int:
    """How many positions a blob of so many bytes can hold at most.

    The range coder spends at least log2(1 / (1 - 2^-12)) bits on a position, which is 22,720
    positions in a byte; the other coders are not used where they would be below that.
    """
    return length * 22_720


def encode_layer(
    levels: NDArray[Any],
    shape: Sequence[int],
    clusters: int,
    negatives: int | None = None,
    coder: str = "auto",
) -> bytes:
    """The levels of one layer as bytes; none for an empty layer.

    Args:
        levels: integers from 0 to `clusters`, of any shape with as many elements as `shape`.
        shape: of the weight, [out, in, ...]: neighbours in it predict one another.
        clusters: 1 to 65535.
        negatives: how many centroids are below zero; None: half of them. Tells signs apart, which
            is worth bytes; the decoder needs the same.
        coder: one of CODERS, or auto: the smallest of them. The context coder is slow, and in a
            large layer it is tried only where it saves 3% of the first rows.

    Raises:
        ValueError: levels that are not 0 to `clusters`, or do not fit the shape.
    """
    matrix = np.asarray(levels).reshape(matrix_shape(shape))
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"{clusters} clusters; 1 to {MAX_CLUSTERS} can be coded")
    if coder != "auto" and coder not in CODERS:
        raise ValueError(f"coder {coder!r}; there are auto, {', '.join(CODERS)}")
    if matrix.size == 0:
        return b""
    if not 0 <= int(matrix.min()) <= int(matrix.max()) <= clusters:
        raise ValueError(f"levels must be from 0 to {clusters}")
    matrix = np.ascontiguousarray(matrix, dtype=np.uint16)
    below = _negatives(clusters, negatives)
    encoders: dict[str, Callable[[], bytes]] = {
        "context": partial(_by_context, matrix, shape, clusters, below, False),
        "columns": partial(_by_context, matrix, shape, clusters, below, True),
        "huffman": partial(gaps.encode, matrix.ravel(), clusters, huffman),
        "ans": partial(gaps.encode, matrix.ravel(), clusters, ans),
    }
    names = [coder]
    if coder == "auto":
        names = list(CODERS) if _context_pays(matrix, clusters, below) else ["huffman", "ans"]
    blobs = [bytes([CODERS[name]]) + encoders[name]() for name in names]
    blobs = [blob for blob in blobs if max_positions(len(blob)) >= matrix.size]
    if not blobs:  # nearly nothing in a huge layer: too small to be told from a made-up claim
        blobs = [bytes([CODERS["context"]]) + encoders["context"]()]
    return min(blobs, key=len)


def decode_layer(
    blob: bytes, shape: Sequence[int], clusters: int, negatives: int | None = None
) -> Levels:
    """The levels of one layer, uint16 in its shape, from the bytes of `encode_layer`.

    Takes memory and time in proportion to the shape, which cannot be larger than the bytes justify.

    Raises:
        CorruptError: no encoder wrote these bytes for such a layer.
    """
    rows, columns = matrix_shape(shape)
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise CorruptError(f"{clusters} clusters")
    if rows * columns > max_positions(len(blob)):
        raise CorruptError(f"{len(blob)} bytes cannot hold {rows * columns} positions")
    if rows * columns == 0:
        if blob:
            raise CorruptError("bytes where no positions are")
        return np.zeros(tuple(shape), np.uint16)
    below = _negatives(clusters, negatives)
    data = blob[1:]
    if blob[0] == CODERS["context"]:
        levels = _from_context(data, rows, columns, clusters, below)
    elif blob[0] == CODERS["columns"]:
        levels = _from_context(data, columns, rows, clusters, below).T
    elif blob[0] == CODERS["huffman"]:
        levels = gaps.decode(data, rows * columns, clusters, huffman)
    elif blob[0] == CODERS["ans"]:
        levels = gaps.decode(data, rows * columns, clusters, ans)
    else:
        raise CorruptError(f"unknown coder {blob[0]}")
    return np.ascontiguousarray(levels.reshape(tuple(shape)))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight: outputs, and all that leads to one."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def _negatives(clusters: int, negatives: int | None) -> int:
    below = clusters // 2 if negatives is None else negatives
    if not 0 <= below <= clusters:
        raise ValueError(f"{below} negative centroids of {clusters}")
    return below


def _context_pays(matrix: Levels, clusters: int, negatives: int) -> bool:
    """Whether the context coder is worth its time: it is not on dense 8-bit weights, for one."""
    if not _SAMPLE < matrix.size <= MAX_CONTEXT_POSITIONS:
        return matrix.size <= _SAMPLE
    columns = matrix.shape[1]
    if columns > _SAMPLE:
        return True  # the first row alone would be more than a sample
    sample = matrix[: _SAMPLE // columns]
    mixed = context.encode(sample, clusters, negatives, 0, 0, 1)
    return len(mixed) < 0.97 * len(gaps.encode(sample.ravel(), clusters, ans))


def _by_context(
    matrix: Levels, shape: Sequence[int], clusters: int, negatives: int, transposed: bool
) -> bytes:
    """The smallest of the context coder's options, compared on the first rows of a large layer."""
    if transposed:
        matrix = np.ascontiguousarray(matrix.T)
    if matrix.shape[1] > _MAX_COLUMNS:
        matrix = _folded(matrix)
    columns = matrix.shape[1]
    sample = matrix[: max(1, _TRIAL // columns)]
    trial = partial(context.encode, sample, clusters, negatives)
    plain = transposed or columns != math.prod(shape[1:])
    candidates = [(0, 0)] if plain else list(_strides(shape, columns))
    near, far = min(candidates, key=lambda strides: len(trial(strides[0], strides[1], 1)))
    speed = min(range(len(context.SPEEDS)), key=lambda speed: len(trial(near, far, speed)))
    return context.encode(matrix, clusters, negatives, near, far, speed)


def _folded(matrix: Levels) -> Levels:
    """All positions in rows of _MAX_COLUMNS; zeros fill the last one up."""
    flat = np.zeros((-(-matrix.size // _MAX_COLUMNS), _MAX_COLUMNS), np.uint16)
    flat.ravel()[: matrix.size] = matrix.ravel()
    return flat


def _from_context(data: bytes, rows: int, columns: int, clusters: int, negatives: int) -> Levels:
    if columns <= _MAX_COLUMNS:
        return context.decode(data, rows, columns, clusters, negatives)
    size = rows * columns
    flat = context.decode(data, -(-size // _MAX_COLUMNS), _MAX_COLUMNS, clusters, negatives).ravel()
    if flat[size:].any():
        raise CorruptError("survivors beyond the layer")
    return flat[:size].reshape(rows, columns)


def _strides(shape: Sequence[int], columns: int) -> Iterator[tuple[int, int]]:
    """How far the row below and the next channel may lie in a row of the matrix."""
    yield 0, 0
    if len(shape) > 2:
        kernel = math.prod(shape[2:])
        if 2 * kernel <= columns:
            yield 0, kernel
            if kernel > shape[-1]:
                yield shape[-1], kernel
        elif 2 * shape[-1] <= columns:
            yield shape[-1], 0
        return
    for channels in (1, 3):  # the input may be an image, or flattened square feature maps
        side = math.isqrt(columns // channels)
        if side > 2 and channels * side * side == columns:
            yield side, side * side if channels > 1 else 0
    for side in range(2, 9):
        if columns % (side * side) == 0 and columns > side * side:
            yield side, side * side
