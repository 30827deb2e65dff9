"""The levels of a layer as bytes, by the coder that needs the fewest; the first byte says which.

A layer is a matrix of levels with one row per output: 0 for a pruned weight, 1 to K for its
cluster, in the order of the centroids. A layer that is pruned but not shared has K = 1: the levels
are its mask.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import ans, groups, huffman, search
from trainer.compress.coding.budget import Budget
from trainer.compress.coding.coders import Coder, ContextCoder, GapCoder, GroupCoder, Levels
from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.own import decode_own, encode_own

CODERS: dict[str, Coder] = {
    "context": ContextCoder(transposed=False),
    "columns": ContextCoder(transposed=True),
    "huffman": GapCoder(huffman),
    "ans": GapCoder(ans),
    "groups": GroupCoder(),
}
NUMBERS = {name: number for number, name in enumerate(CODERS)}
"""The first byte of a layer, by the name of its coder."""

OWN = 255
"""The first byte of a layer that was coded by a coder of the user's own."""

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
    coder: str | Coder = "auto",
    budget: Budget | None = None,
) -> bytes:
    """Encode the levels of one layer; an empty layer takes no bytes.

    Args:
        levels: Integers from 0 to `clusters`, of any shape with as many elements as `shape`.
        shape: Shape of the weight, [out, in, ...]: neighbours in it predict one another.
        clusters: Number of clusters, 1 to 65535.
        negatives: How many centroids are below zero; None: half of them. Signs that are known save
            bytes; the decoder needs the same number.
        coder: A name in CODERS; "auto": the one that needs the fewest bytes; or a coder of your
            own. "auto" tries the context coder, which is slow, on a large layer only where it saves
            3% of the first rows.
        budget: Bounds the estimated CPU time of the context coder under "auto"; None: no limit.

    Raises:
        ValueError: The levels are not integers from 0 to `clusters`, or do not fit the shape; or a
            coder of your own fails, or does not decode what it encoded.
    """
    dense = np.asarray(levels).reshape(tuple(shape))
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise ValueError(f"{clusters} clusters; 1 to {MAX_CLUSTERS} can be coded")
    if isinstance(coder, str) and coder != "auto" and coder not in CODERS:
        raise ValueError(f"coder {coder!r}; there are auto, {', '.join(CODERS)}")
    if dense.size == 0:
        return b""
    if not 0 <= int(dense.min()) <= int(dense.max()) <= clusters:
        raise ValueError(f"levels must be from 0 to {clusters}")
    dense = np.ascontiguousarray(dense, dtype=np.uint16).reshape(tuple(shape))
    below = _negatives(clusters, negatives)
    if not isinstance(coder, str):
        blob = bytes([OWN]) + encode_own(coder, dense, clusters, below)
        shortest = -(-dense.size // max_positions(1))
        return blob.ljust(shortest, b"\0")
    if coder == "auto":
        payloads = {
            "columns" if transposed else "context": payload
            for transposed, payload in search.smallest(dense, clusters, below, budget or Budget())
        }
        names = ["huffman", "ans", *(["groups"] if groups.has_pattern(dense) else [])]
    else:
        payloads, names = {}, [coder]
    payloads |= {name: CODERS[name].encode(dense, clusters, below) for name in names}
    blobs = [bytes([NUMBERS[name]]) + payload for name, payload in payloads.items()]
    blobs = [blob for blob in blobs if max_positions(len(blob)) >= dense.size]
    if not blobs:  # so few bytes for a huge layer that a decoder would refuse them as forged
        payload = CODERS["context"].encode(dense, clusters, below)
        blobs = [bytes([NUMBERS["context"]]) + payload]
    return min(blobs, key=len)


def decode_layer(
    blob: bytes,
    shape: Sequence[int],
    clusters: int,
    negatives: int | None = None,
    coder: Coder | None = None,
) -> Levels:
    """Decode the bytes of `encode_layer`.

    Memory and time are in proportion to the shape, which cannot be larger than the bytes justify.

    Args:
        blob: The bytes.
        shape, clusters, negatives: As they were passed to `encode_layer`.
        coder: The coder of your own that encoded the layer, if one did.

    Returns:
        The levels, uint16 in `shape`.

    Raises:
        CorruptError: No encoder wrote these bytes for such a layer.
    """
    size = math.prod(shape)
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise CorruptError(f"{clusters} clusters")
    if size > max_positions(len(blob)):
        raise CorruptError(f"{len(blob)} bytes cannot hold {size} positions")
    if size == 0:
        if blob:
            raise CorruptError("bytes where no positions are")
        return np.zeros(tuple(shape), np.uint16)
    below = _negatives(clusters, negatives)
    if blob[0] == OWN:
        if coder is None:
            raise CorruptError("a coder of the writer's own is needed")
        levels = decode_own(coder, blob[1:], shape, clusters, below)
    elif blob[0] < len(CODERS):
        levels = list(CODERS.values())[blob[0]].decode(blob[1:], shape, clusters, below)
    else:
        raise CorruptError(f"unknown coder {blob[0]}")
    return np.ascontiguousarray(levels).reshape(tuple(shape))


def _negatives(clusters: int, negatives: int | None) -> int:
    below = clusters // 2 if negatives is None else negatives
    if not 0 <= below <= clusters:
        raise ValueError(f"{below} negative centroids of {clusters}")
    return below
