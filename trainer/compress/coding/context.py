"""The context-adaptive coder of a layer's levels: position by position, zero or not, then which.

What is decoded already predicts what comes: how full this row, this column and the columns around
it are, which neighbours (in the image, in the kernel, in the rows above) survive, and their signs
and sizes. Each decision is binary, predicted by a mixture of such contexts (mixing.py) and written by
a range coder. Integers only: every machine decodes the same.
docs/artifact.md, "Context coder", is the specification; encoder and decoder are one function.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from trainer.compress.coding import rangecoder as rc
from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.mixing import HALF, INPUTS, count, learn, mix
from trainer.compress.coding.rangecoder import FLOOR, ONE
from trainer.compress.coding.tables import LIMIT, LOG, SQUASH
from trainer.compress.coding.varint import put, take

Int64 = NDArray[np.int64]
Levels = NDArray[np.uint16]

SPEEDS = (4, 8, 16, 32)  # of the mixers, the encoder chooses
_STEPS = 16  # magnitudes that have a step of their own; wider and wider buckets follow
_BUCKETS = 80
_UNIT = 22  # of the base probability in the head, in the logistic domain
_SLACK = 1024  # bytes, more than one position can take


@njit(cache=True)
def _log(x: int) -> int:
    """About 8 log2 x, for x >= 1."""
    shift = 0
    while x > 4096:
        x >>= 1
        shift += 8
    return LOG[x] + shift


@njit(cache=True)
def _clip(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


@njit(cache=True)
def _side(x: int) -> int:
    """0 for zero, 1 for a negative, 2 for a positive value."""
    return 0 if x == 0 else (1 if x < 0 else 2)


@njit(cache=True)
def _bits(bucket: int) -> int:
    """log2 of how many magnitudes share a bucket."""
    return 0 if bucket < _STEPS else 2 + (bucket - _STEPS) // 4


@njit(cache=True)
def _starts(sizes: Int64) -> Int64:
    """Where each context's counters start; the last entry is the number of all."""
    out = np.zeros(sizes.size + 1, np.int64)
    for i in range(sizes.size):
        out[i + 1] = out[i] + sizes[i]
    return out


@njit(cache=True)
def _code(
    levels: Levels,
    clusters: int,
    negatives: int,
    dense: bool,
    near: int,
    far: int,
    base: int,
    speed: int,
    blob: NDArray[np.uint8],
    decode: bool,
) -> tuple[NDArray[np.uint8], int]:
    """Write or fill `levels`, [rows, columns]. Returns the buffer and its length, -1 if corrupt."""
    rows, columns = levels.shape
    state = np.zeros(rc.STATE, np.int64)
    rc.start(state, blob, decode)

    # Zero or not: contexts 1 to 8 have counters, inputs 8 and 9 are computed.
    at = _starts(np.array([1, columns, 1024, 2048, 256, 512, rows, 4096, 4096]))
    chance = np.full(at[9], SQUASH[base + LIMIT] << 6, np.int64)
    seen = np.zeros(at[9], np.int64)
    weight = np.full(16 * INPUTS, 8192, np.int64)
    prior = np.array([8, 16, 4, 2, 4, 4, 16, 4, 4])
    # The sign.
    sat = _starts(np.array([1, 81, 64, columns, rows, 243]))
    schance = np.full(sat[6], HALF, np.int64)
    sseen = np.zeros(sat[6], np.int64)
    sweight = np.full(INPUTS, 9830, np.int64)
    sprior = np.array([2, 2, 2, 4, 4, 2])
    # The magnitude: one step after the other, one counter for each step.
    mat = _starts(np.array([1, 2, 64, 64, rows, 256, 64]) * _BUCKETS)
    mchance = np.full(mat[7], HALF, np.int64)
    mseen = np.zeros(mat[7], np.int64)
    mweight = np.full(_BUCKETS * INPUTS, 6554, np.int64)
    mprior = np.array([2, 2, 2, 2, 4, 2, 2])
    # The place in a bucket: its first three bits.
    bchance = np.full(_BUCKETS * 8, HALF, np.int64)
    bseen = np.zeros(_BUCKETS * 8, np.int64)

    slot = np.zeros(INPUTS, np.int64)
    inputs = np.zeros(INPUTS, np.int64)
    # Signed magnitudes of this row and the three above, in turn; zeros left and right of them.
    margin = 2 * max(near, far) + 2
    window = np.zeros((4, columns + 2 * margin), np.int64)
    filled = np.zeros(columns + 2 * near + 2, np.int64)  # survivors per column so far
    offset = near + 1
    group = np.zeros(columns // max(far, 1) + 1, np.int64)  # the same per `far` columns
    last = np.zeros(columns, np.int64)  # the last survivor of each column
    total = np.int64(0)
    done = np.int64(0)

    for r in range(rows):
        here, up1, up2, up3 = window[r & 3], window[r + 3 & 3], window[r + 2 & 3], window[r + 1 & 3]
        here[:] = 0
        height = _log(r + 1)
        w = min(height >> 3, 15) * INPUTS
        kept = 0
        size = 0
        previous = 0
        before = 0
        since = 0
        inside = 0
        for c in range(columns):
            if not decode and state[rc.POS] + _SLACK > blob.size:
                blob = rc.grown(blob)
            x = c + margin
            west, west2 = here[x - 1], here[x - 2]
            north = here[x - near] if near else 0
            northwest = here[x - near - 1] if near else 0
            northeast = here[x - near + 1] if near > 1 else 0
            north2 = here[x - 2 * near] if near else 0
            far1 = here[x - far] if far else 0
            far2 = here[x - 2 * far] if far else 0
            full = filled[c + offset]
            around = 2 * full + filled[c + offset - 1] + filled[c + offset + 1]
            if near:
                around += filled[c + offset - near] + filled[c + offset + near]
            else:
                around += 2 * full
            fullness = _clip((_log(4 * around + 4) - height + 48) >> 1, 0, 63)
            touching = (
                (west != 0)
                + (north != 0)
                + (northwest != 0)
                + (northeast != 0)
                + (west2 != 0)
                + (north2 != 0)
            )
            bit = 1
            if not dense:
                crowd = _clip((_log(16 * kept + 8) - _log(c + 8) + 48) >> 2, 0, 31)
                deep = min(31, height >> 2 if height < 64 else 16 + ((height - 64) >> 3))
                many = min(63, full if full < 24 else 24 + ((_log(full) - 36) >> 1))
                share = 0
                if far:
                    if c % far == 0:
                        inside = 0
                    seen_there = r * far + c % far + 1
                    share = _log(16 * group[c // far] + 8) - _log(seen_there) + 48
                    share = _clip(share >> 1, 0, 63)
                slot[0] = 0
                slot[1] = at[1] + c
                slot[2] = at[2] + crowd * 32 + min(31, _log(c + 1) >> 3)
                slot[3] = at[3] + many * 32 + deep
                slot[4] = at[4] + (
                    (west != 0)
                    + 2 * (west2 != 0)
                    + 4 * (north != 0)
                    + 8 * (northwest != 0)
                    + 16 * (northeast != 0)
                    + 32 * (north2 != 0)
                    + 64 * (far1 != 0)
                    + 128 * (far2 != 0)
                )
                slot[5] = at[5] + (
                    (up1[x] != 0)
                    + 2 * (up2[x] != 0)
                    + 4 * (up3[x] != 0)
                    + 8 * (west != 0)
                    + 16 * (north != 0)
                    + 32 * (far1 != 0)
                    + 64 * (northeast != 0)
                    + 128 * (up1[x - 1] != 0)
                    + 256 * (up1[x + 1] != 0)
                )
                slot[6] = at[6] + r
                slot[7] = at[7] + share * 64 + min(7, inside) * 8 + min(7, since)
                slot[8] = at[8] + share * 64 + fullness
                # How much fuller than the layer the columns around and this row are: logarithms,
                # drawn to 0 while little was seen (as if 30 average positions had been).
                average = _log(total * 64 + 64) - _log(done + 1)
                plus = (total * 64 + 64) * 30 // (done + 30)
                inputs[8] = (_log(around * 64 // 6 + plus) - _log(r + 30) - average) * 22
                inputs[9] = (_log(kept * 64 + plus) - _log(c + 30) - average) * 22
                p = mix(chance, weight, slot, inputs, 8, 10, w)
                bit = rc.code(state, blob, p, 1 if levels[r, c] else 0, decode)
                learn(chance, seen, weight, slot, inputs, 8, 10, w, bit, p, speed, prior, 1000)
                done += 1
                total += bit
                since += 1
                if decode and state[rc.POS] > blob.size + 4:
                    return blob, -1
            if not bit:
                continue
            since = 0
            inside += 1
            if clusters > 1:
                level = np.int64(levels[r, c])
                sign = 1 if negatives == 0 else 0
                if 0 < negatives < clusters:
                    slot[0] = 0
                    slot[1] = sat[1] + (
                        27 * _side(west)
                        + 9 * _side(north)
                        + 3 * _side(northwest)
                        + _side(northeast)
                    )
                    slot[2] = sat[2] + _clip(
                        2 * west + 2 * north + northwest + northeast + 32, 0, 63
                    )
                    slot[3] = sat[3] + c
                    slot[4] = sat[4] + r
                    slot[5] = sat[5] + (
                        _side(previous)
                        + 3 * _side(before)
                        + 9 * _side(last[c])
                        + 27 * _side(north)
                        + 81 * _side(west)
                    )
                    p = mix(schance, sweight, slot, inputs, 5, 5, 0)
                    sign = rc.code(state, blob, p, 1 if level > negatives else 0, decode)
                    learn(
                        schance,
                        sseen,
                        sweight,
                        slot,
                        inputs,
                        5,
                        5,
                        0,
                        sign,
                        p,
                        2 * speed,
                        sprior,
                        255,
                    )
                towards = 1 if sign else -1
                most = clusters - negatives - 1 if sign else negatives - 1
                magnitude = level - negatives - 1 if sign else negatives - level
                pull = _clip((2 * west + 2 * north + northwest + northeast) * towards, -16, 15) + 16
                heavy = 0
                if kept:
                    heavy = _clip(_log(4 * size + 2) - _log(4 * kept + 2) + 32, 0, 63)
                start = np.int64(0)
                bucket = 0
                while start + (1 << _bits(bucket)) <= most:
                    step = 1 << _bits(bucket)
                    slot[0] = bucket
                    slot[1] = mat[1] + sign * _BUCKETS + bucket
                    slot[2] = mat[2] + (2 * pull + (touching > 0)) * _BUCKETS + bucket
                    slot[3] = mat[3] + min(63, abs(previous)) * _BUCKETS + bucket
                    slot[4] = mat[4] + r * _BUCKETS + bucket
                    slot[5] = mat[5] + (fullness * 4 + min(3, touching)) * _BUCKETS + bucket
                    slot[6] = mat[6] + heavy * _BUCKETS + bucket
                    w2 = bucket * INPUTS
                    p = mix(mchance, mweight, slot, inputs, 6, 6, w2)
                    more = rc.code(state, blob, p, 1 if magnitude >= start + step else 0, decode)
                    learn(
                        mchance,
                        mseen,
                        mweight,
                        slot,
                        inputs,
                        6,
                        6,
                        w2,
                        more,
                        p,
                        2 * speed,
                        mprior,
                        255,
                    )
                    if not more:
                        break
                    start += step
                    bucket += 1
                place = np.int64(0)
                node = 1
                for i in range(_bits(bucket)):
                    shift = _bits(bucket) - 1 - i
                    bit = (magnitude - start) >> shift & 1
                    if i < 3:
                        one = bchance[bucket * 8 + node] >> 6
                        one = _clip(one, FLOOR, ONE - FLOOR)
                        bit = rc.code(state, blob, one, bit, decode)
                        count(bchance, bseen, bucket * 8 + node, bit, 2, 255)
                        node = 2 * node + bit
                    else:
                        bit = rc.code(state, blob, ONE // 2, bit, decode)
                    place = 2 * place + bit
                if decode:
                    magnitude = start + place
                    if magnitude > most or state[rc.POS] > blob.size + 4:
                        return blob, -1
                    levels[r, c] = negatives + 1 + magnitude if sign else negatives - magnitude
                signed = (magnitude + 1) * towards
            else:
                if decode:
                    levels[r, c] = 1
                signed = 1
            here[x] = signed
            before, previous = previous, signed
            last[c] = signed
            size += abs(signed)
            kept += 1
            filled[c + offset] += 1
            if far:
                group[c // far] += 1
    if decode:
        return blob, blob.size if rc.ended(state, blob) else -1
    if state[rc.POS] + _SLACK > blob.size:
        blob = rc.grown(blob)
    return blob, rc.finish(state, blob)


def encode(levels: Levels, clusters: int, negatives: int, near: int, far: int, speed: int) -> bytes:
    """The levels [rows, columns], 0 to `clusters`, as bytes.

    Args:
        negatives: clusters 1 to `negatives` lie below zero, the others above.
        near: how many columns further the neighbour below lies (a row of the image or kernel); 0:
            no second dimension.
        far: how many columns further the next channel lies; 0: no channels.
        speed: of learning, an index into SPEEDS.
    """
    kept = np.count_nonzero(levels) / levels.size
    odds = np.log(max(kept, 1e-5) / max(1 - kept, 1e-5))
    base = int(np.clip(round(odds * 256 / _UNIT), -127, 127)) + 128
    dense = clusters > 1 and kept == 1.0
    room = np.zeros(_SLACK + levels.size // 16, np.uint8)
    blob, size = _code(
        levels,
        clusters,
        negatives,
        dense,
        near,
        far,
        (base - 128) * _UNIT,
        SPEEDS[speed],
        room,
        False,
    )
    flags = dense | speed << 1 | (near > 0 or far > 0) << 3
    shifts = put(near) + put(far) if flags & 8 else b""
    return bytes([flags, base]) + shifts + blob[:size].tobytes()


def decode(blob: bytes, rows: int, columns: int, clusters: int, negatives: int) -> Levels:
    """The levels that `encode` wrote.

    Raises:
        CorruptError: no encoder wrote these bytes for such a layer.
    """
    if len(blob) < 2 or blob[0] > 15 or blob[1] == 0:
        raise CorruptError("the head of a context-coded layer is damaged")
    flags, base, at, near, far = blob[0], blob[1], 2, 0, 0
    if flags & 8:
        near, at = take(blob, at)
        far, at = take(blob, at)
    dense = bool(flags & 1)
    if max(near, far) > columns or (dense and clusters < 2) or (flags & 8 and near == far == 0):
        raise CorruptError("the head of a context-coded layer does not fit its shape")
    levels = np.zeros((rows, columns), np.uint16)
    data = np.frombuffer(blob, np.uint8, offset=at).copy()
    speed = SPEEDS[flags >> 1 & 3]
    _, size = _code(
        levels, clusters, negatives, dense, near, far, (base - 128) * _UNIT, speed, data, True
    )
    if size < 0:
        raise CorruptError("a context-coded layer is damaged")
    return levels
