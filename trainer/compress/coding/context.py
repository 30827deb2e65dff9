"""Positions and values of a layer by context: what is decoded already predicts what comes.

Matrices of pruned layers are not random: inputs that say nothing lose all their weights, units die,
neighbouring pixels fare alike. For each position the coder asks how full its row and its column
have been so far, and what is beside it; for each value, which values came before.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from trainer.compress.coding.binary import (
    FLOOR,
    code,
    decoder,
    encoder,
    ended,
    finish,
    learn,
    mixed,
)
from trainer.compress.coding.errors import CorruptError

Levels = npt.NDArray[np.uint16]

_FEW = 1 << 22  # positions of a layer that is worth several attempts, and mixing
_INPUTS = 10  # contexts of a position
_VALUE_INPUTS = 5  # contexts of a value
_SETS = 48  # weight sets
_RATES = (2, 6, 14)  # of the mixing weights

_TRANSPOSED, _FAST = 1, 2  # flags


def encode(levels: Levels, clusters: int) -> bytes:
    """Code a matrix [rows, columns] of levels in [0, clusters]: the best of several attempts."""
    if levels.size > _FEW:
        return _attempt(levels, clusters, _FAST, 0, 1)
    best = b""
    for flags, matrix in ((0, levels), (_TRANSPOSED, levels.T)):
        for stride in _strides(levels.shape[1], (levels != 0).sum(0)):
            made = _attempt(matrix, clusters, flags, stride, 1)
            if not best or len(made) < len(best):
                best, chosen = made, (matrix, flags, stride)
    matrix, flags, stride = chosen
    others = (_attempt(matrix, clusters, flags, stride, rate) for rate in (0, 2))
    return min([best, *others], key=len)


def decode(blob: bytes, shape: tuple[int, int], clusters: int) -> Levels:
    """What `encode` was given. Raises CorruptError where the bytes cannot be its result."""
    if len(blob) < 2 or blob[0] >= 4 * len(_RATES):
        raise CorruptError("the coder's settings are missing or unknown")
    flags, rate = blob[0] & 3, blob[0] >> 2
    stride, body = blob[1], blob[2:]
    rows, columns = reversed(shape) if flags & _TRANSPOSED else shape
    levels = np.zeros((rows, columns), dtype=np.uint16)
    state, buffer = decoder(body)
    _run(levels, clusters, flags, stride, rate, state, buffer, True)
    if not ended(state, body) or int(levels.max(initial=0)) > clusters:
        raise CorruptError("the coded layer does not end where it should")
    return np.ascontiguousarray(levels.T) if flags & _TRANSPOSED else levels


def _attempt(matrix: Levels, clusters: int, flags: int, stride: int, rate: int) -> bytes:
    levels = np.ascontiguousarray(matrix)
    bits = levels.size + int(np.count_nonzero(levels)) * _depth(clusters)
    state, buffer = encoder(bits)
    _run(levels, clusters, flags, stride, rate, state, buffer, False)
    return bytes([flags | rate << 2, stride]) + finish(state, buffer)


def _run(
    levels: Levels,
    clusters: int,
    flags: int,
    stride: int,
    rate: int,
    state: Any,
    buffer: Any,
    decoding: bool,
) -> None:
    if flags & _FAST:
        _plain(levels, clusters, _depth(clusters), state, buffer, decoding)
    else:
        across, down = (0, stride) if flags & _TRANSPOSED else (stride, 0)
        depth = _depth(clusters)
        _mixing(levels, clusters, depth, across, down, _RATES[rate], state, buffer, decoding)


def _depth(clusters: int) -> int:
    """Bits of a cluster's number."""
    return (clusters - 1).bit_length()


def _strides(columns: int, occupied: npt.NDArray[np.int64]) -> list[int]:
    """Distances at which columns may resemble one another: none, a square image's width, and the
    lag at which the number of weights in a column correlates best with itself.
    """
    found = {0}
    side = int(columns**0.5)
    if side * side == columns and 1 < side < 256:
        found.add(side)
    centred = occupied - occupied.mean()
    lags = range(2, min(256, columns // 2))
    if len(lags) and centred.any():
        found.add(
            max(lags, key=lambda lag: float(centred[lag:] @ centred[:-lag]) / (columns - lag))
        )
    return sorted(found)


@numba.njit(cache=True, inline="always")
def _fullness(n: int, of: int) -> int:
    """n of `of` positions so far as a logarithmic class, 0 to 23: two classes an octave."""
    v = (n * 1024 + 256) // (of + 2)
    width = 0
    while v >> width:
        width += 1
    if width < 2:
        return width
    return min(23, 2 * width + ((v >> (width - 2)) & 1) - 2)


@numba.njit(cache=True)
def _mixing(
    levels: Any,
    clusters: int,
    depth: int,
    across: int,
    down: int,
    rate: int,
    state: Any,
    buffer: Any,
    decoding: bool,
) -> None:
    rows, columns = levels.shape
    # Where the counters of each context begin.
    sizes = np.array(
        [1, columns, 24 * 24, 8 * 8 * 8, 24 * 16, 256, 24 * 24, max(across, down, 1) * 2, 24 * 16,
         24 * 24 * 4], dtype=np.int64)  # fmt: skip
    nodes = 1 << depth
    value_sizes = np.array([nodes, nodes * 4, nodes * 4, nodes * 24, nodes * 16], dtype=np.int64)
    first = np.zeros(_INPUTS + 1, dtype=np.int64)
    for i in range(_INPUTS):
        first[i + 1] = first[i] + sizes[i]
    value_first = np.zeros(_VALUE_INPUTS + 1, dtype=np.int64)
    value_first[0] = first[_INPUTS]
    for i in range(_VALUE_INPUTS):
        value_first[i + 1] = value_first[i] + value_sizes[i]
    chances = np.full(value_first[_VALUE_INPUTS], 1 << 21, dtype=np.int32)
    counts = np.zeros(value_first[_VALUE_INPUTS], dtype=np.int16)
    weights = np.full(_SETS * _INPUTS, (1 << 16) * 3 // (2 * _INPUTS), dtype=np.int32)
    value_weights = np.full((depth + 1) * _VALUE_INPUTS, (1 << 16) // _VALUE_INPUTS, dtype=np.int32)
    inputs = np.zeros(_INPUTS, dtype=np.int32)
    slots = np.zeros(_INPUTS, dtype=np.int64)
    in_column = np.zeros(columns, dtype=np.int64)
    in_row = np.zeros(rows, dtype=np.int64)
    last_in_column = np.zeros(columns, dtype=np.int64)
    half = (clusters + 1) // 2
    for r in range(rows):
        last = 0
        near = 0  # the latest positions of the row, a bit each
        for c in range(columns):
            own = _fullness(in_column[c], r)
            beside = in_column[c - 1] if c > 0 else 0
            beside += in_column[c + 1] if c + 1 < columns else 0
            far = 0
            row_before = in_row[r - 1] if r > 0 else 0
            shape = near & 3
            shape |= (levels[r - 1, c] != 0) << 2 if r > 0 else 0
            if across:
                far += in_column[c - across] if c >= across else 0
                far += in_column[c + across] if c + across < columns else 0
                if c >= across:
                    shape |= (levels[r, c - across] != 0) << 3
                    shape |= (levels[r, c - across + 1] != 0) << 4
            if down and r >= down:
                shape |= (levels[r - down, c] != 0) << 3
                row_before += in_row[r - down]
            shape |= (levels[r - 1, c + 1] != 0) << 5 if r > 0 and c + 1 < columns else 0
            shape |= (levels[r - 1, c - 1] != 0) << 6 if r > 0 and c > 0 else 0
            row = _fullness(in_row[r], c)
            around = _fullness(row_before, columns * (2 if down and r >= down else 1))
            slots[0] = 0
            slots[1] = c
            slots[2] = own * 24 + row
            sides = _fullness(beside, 2 * r) >> 1
            fars = _fullness(far, 2 * r) >> 1 if across else around >> 1
            slots[3] = (min(7, own >> 1) * 8 + min(7, sides)) * 8 + min(7, fars)
            slots[4] = row * 16 + min(15, _log(c))
            slots[5] = shape | ((near >> 2) & 1) << 7
            slots[6] = around * 24 + row
            period = max(across, down, 1)
            slots[7] = ((c if across or not down else r) % period) * 2 + (near & 1)
            slots[8] = own * 16 + min(15, _log(r))
            slots[9] = (own * 24 + _fullness(beside + far, (4 if across else 2) * r)) * 4 + (
                near & 3
            )
            for i in range(_INPUTS):
                slots[i] += first[i]
            level: Any = np.int64(levels[r, c])
            chosen = min(_SETS - 1, own + 24 * (row > 8))
            kept = mixed(
                1 if level else 0, slots, _INPUTS, chosen * _INPUTS, rate, chances, counts,
                weights, inputs, state, buffer, decoding,
            )  # fmt: skip
            near = (near << 1 | kept) & 0xFF
            if not kept:
                continue
            node = 1
            index = level - 1
            before = 0 if last == 0 else (1 if last <= half else 2)
            above = 0 if last_in_column[c] == 0 else (1 if last_in_column[c] <= half else 2)
            for d in range(depth):
                slots[0] = node
                slots[1] = node * 4 + before
                slots[2] = node * 4 + above
                slots[3] = node * 24 + row
                slots[4] = node * 16 + (near >> 1 & 15)
                for i in range(_VALUE_INPUTS):
                    slots[i] += value_first[i]
                bit = mixed(
                    (index >> (depth - 1 - d)) & 1, slots, _VALUE_INPUTS, d * _VALUE_INPUTS, rate,
                    chances, counts, value_weights, inputs, state, buffer, decoding,
                )  # fmt: skip
                node = node << 1 | bit
            level = node - nodes + 1
            levels[r, c] = level
            last = level
            last_in_column[c] = level
            in_column[c] += 1
            in_row[r] += 1


@numba.njit(cache=True, inline="always")
def _log(n: int) -> int:
    width = 0
    while n >> width:
        width += 1
    return width


@numba.njit(cache=True)
def _plain(levels: Any, clusters: int, depth: int, state: Any, buffer: Any, decoding: bool) -> None:
    """One context for each decision: for layers of many millions of positions."""
    rows, columns = levels.shape
    nodes = 1 << depth
    chances = np.full(24 * 24 * 4 + nodes, 1 << 21, dtype=np.int32)
    counts = np.zeros(24 * 24 * 4 + nodes, dtype=np.int16)
    in_column = np.zeros(columns, dtype=np.int32)
    columns_class = np.zeros(columns, dtype=np.int32)
    for r in range(rows):
        in_row = 0
        near = 0
        row = 0
        if r & 15 == 0:
            for c in range(columns):
                columns_class[c] = _fullness(in_column[c], r) * 24
        for c in range(columns):
            if c & 15 == 0:
                row = _fullness(in_row, c)
            slot = (columns_class[c] + row) * 4 + near
            one = min(65536 - FLOOR, max(FLOOR, chances[slot] >> 6))
            level: Any = np.int64(levels[r, c])
            kept = code(1 if level else 0, one, state, buffer, decoding)
            learn(slot, kept, chances, counts)
            near = (near << 1 | kept) & 3
            if not kept:
                continue
            in_row += 1
            in_column[c] += 1
            node = 1
            index = level - 1
            for d in range(depth):
                slot = 24 * 24 * 4 + node
                one = min(65536 - FLOOR, max(FLOOR, chances[slot] >> 6))
                bit = code((index >> (depth - 1 - d)) & 1, one, state, buffer, decoding)
                learn(slot, bit, chances, counts)
                node = node << 1 | bit
            levels[r, c] = node - nodes + 1
