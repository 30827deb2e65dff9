"""The levels of a layer as bytes, by the coder that needs the fewest; the first byte says which.

A layer is a matrix of levels with one row per output: 0 for a pruned weight, 1 to K for its
cluster, in the order of the centroids. A layer that is pruned but not shared has K = 1: the levels
are its mask.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import ans, gaps, huffman, search
from trainer.compress.coding.budget import Budget
from trainer.compress.coding.errors import CorruptError

Levels = NDArray[np.uint16]

CODERS = {"context": 0, "columns": 1, "huffman": 2, "ans": 3}
MAX_CLUSTERS = 65535


def max_positions(length: int) -> int:
    """The largest number of positions that a blob of `length` bytes can hold.

    The range coder spends at least log2(1 / (1 - 2^-12)) bits on a position, which is 22,720
    positions per byte; the other coders are not used where they would be below that.
    """
    return length * 22_720


def encode_layer(
    levels: NDArray[Any],
    shape: Sequence[int],
    clusters: int,
    negatives: int | None = None,
    coder: str = "auto",
    budget: Budget | None = None,
) -> bytes:
    """Encode the levels of one layer; an empty layer takes no bytes.

    Args:
        levels: Integers from 0 to `clusters`, of any shape with as many elements as `shape`.
        shape: Shape of the weight, [out, in, ...]: neighbours in it predict one another.
        clusters: Number of clusters, 1 to 65535.
        negatives: How many centroids are below zero; None: half of them. Signs that are known save
            bytes; the decoder needs the same number.
        coder: A name in CODERS, or "auto": the one that needs the fewest bytes. "auto" tries the
            context coder, which is slow, on a large layer only where it saves 3% of the first rows.
        budget: Bounds the estimated CPU time of the context coder under "auto"; None: no limit.

    Raises:
        ValueError: The levels are not integers from 0 to `clusters`, or do not fit the shape.
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
    arguments = matrix, shape, clusters, _negatives(clusters, negatives)
    encoders: dict[str, Callable[[], bytes]] = {
        "context": partial(search.encode, *arguments, False),
        "columns": partial(search.encode, *arguments, True),
        "huffman": partial(gaps.encode, matrix.ravel(), clusters, huffman),
        "ans": partial(gaps.encode, matrix.ravel(), clusters, ans),
    }
    payloads: dict[str, bytes] = {}
    if coder == "auto":
        found = search.smallest(*arguments, budget or Budget())
        names = {False: "context", True: "columns"}
        payloads = {names[transposed]: found[transposed] for transposed in sorted(found)}
        payloads |= {name: encoders[name]() for name in ("huffman", "ans")}
    else:
        payloads = {coder: encoders[coder]()}
    blobs = [bytes([CODERS[name]]) + payload for name, payload in payloads.items()]
    blobs = [blob for blob in blobs if max_positions(len(blob)) >= matrix.size]
    if not blobs:  # so few bytes for a huge layer that a decoder would refuse them as forged
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
        levels = search.decode(data, rows, columns, clusters, below)
    elif blob[0] == CODERS["columns"]:
        levels = search.decode(data, columns, rows, clusters, below).T
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
