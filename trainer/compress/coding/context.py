"""The context-adaptive coder of a layer's levels.

For each position, it codes whether the level is zero and, if not, which cluster it is. Each binary
decision is predicted from what has been coded before: the densities of this row, of this column
and of the columns around it, and the neighbours (in the image, in the kernel, in the rows above)
with their signs and magnitudes. A mixture of such contexts (mixing.py) gives a probability, with
which a range coder writes the decision. All arithmetic is on integers, so that every machine
decodes the same levels. Encoder and decoder are one function; docs/artifact.md, "Context coder",
specifies it.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import rangecoder as rc
from trainer.compress.coding import varint
from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.mixing import HALF, Decisions, decide, decisions
from trainer.compress.coding.rangecoder import ONE
from trainer.compress.coding.tables import LIMIT, LOG, SQUASH
from trainer.compress.jit import jit

Int64 = NDArray[np.int64]
Levels = NDArray[np.uint16]

SPEEDS = (4, 8, 16, 32)  # of the mixers, the encoder chooses
_STEPS = 16  # magnitudes that have a step of their own; wider and wider buckets follow
_PLACES = 1 << 16  # rows or columns with counters of their own; further ones share them
_SIZED = 1 << 12  # the same for rows and magnitudes
_UNIT = 22  # of the base probability in the head, in the logistic domain
_FINE = 1 << 16  # fractions of a survivor in the ratios
_SLACK = 1024  # bytes, more than one position can take
_CORRUPT, _FULL = -1, -2


@jit
def _log(x: int) -> int:
    """About 8 log2 x, for x >= 1."""
    shift = 0
    while x > 4096:
        x >>= 4
        shift += 32
    return int(LOG[x]) + shift


@jit
def _clip(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


@jit
def _side(x: int) -> int:
    """0 for zero, 1 for a negative, 2 for a positive value."""
    return 0 if x == 0 else (1 if x < 0 else 2)


@jit
def _bits(bucket: int) -> int:
    """log2 of how many magnitudes share a bucket."""
    return 0 if bucket < _STEPS else 2 + (bucket - _STEPS) // 4


def _buckets(clusters: int, negatives: int) -> int:
    """How many buckets the magnitudes of a layer reach."""
    largest = max(negatives, clusters - negatives) - 1
    start, bucket = 0, 0
    while start + (1 << _bits(bucket)) <= largest:
        start += 1 << _bits(bucket)
        bucket += 1
    return bucket + 1


@jit
def _code_value(
    levels: Levels,
    r: int,
    c: int,
    clusters: int,
    negatives: int,
    around: Int64,
    signs: Decisions,
    steps: Decisions,
    offsets: Decisions,
    speed: int,
    state: Int64,
    blob: NDArray[np.uint8],
    decode: bool,
) -> int:
    """Write or read which cluster a survivor is in; its signed magnitude, 0 if that is none."""
    west, north, northwest, northeast = around[0], around[1], around[2], around[3]
    previous, before, above = around[4], around[5], around[6]
    fullness, touching, heavy = around[7], around[8], around[9]
    level = int(levels[r, c])
    zero = 0 * speed  # numba would compile a version of each function for the literal 0
    sign = 1 if negatives == 0 else 0
    if 0 < negatives < clusters:
        at, slot = signs.start, signs.slot
        slot[1] = at[1] + 27 * _side(west) + 9 * _side(north)
        slot[1] += 3 * _side(northwest) + _side(northeast)
        slot[2] = at[2] + _clip(2 * west + 2 * north + northwest + northeast + 32, 0, 63)
        slot[3] = at[3] + c % _PLACES
        slot[4] = at[4] + r % _PLACES
        slot[5] = at[5] + _side(previous) + 3 * _side(before) + 9 * _side(above)
        slot[5] += 27 * _side(north) + 81 * _side(west)
        sign = 1 if level > negatives else 0
        sign = decide(signs, zero, 2 * speed, state, blob, sign, decode)
    towards = 1 if sign else -1
    largest = clusters - negatives - 1 if sign else negatives - 1
    magnitude = level - negatives - 1 if sign else negatives - level
    pull = _clip((2 * west + 2 * north + northwest + northeast) * towards, -16, 15) + 16
    at, slot = steps.start, steps.slot
    buckets = at[1]
    start = 0
    bucket = zero
    while start + (1 << _bits(bucket)) <= largest:
        step = 1 << _bits(bucket)
        slot[0] = bucket
        slot[1] = at[1] + sign * buckets + bucket
        slot[2] = at[2] + (2 * pull + (touching > 0)) * buckets + bucket
        slot[3] = at[3] + min(63, abs(previous)) * buckets + bucket
        slot[4] = at[4] + r % _SIZED * buckets + bucket
        slot[5] = at[5] + (fullness * 4 + min(3, touching)) * buckets + bucket
        slot[6] = at[6] + heavy * buckets + bucket
        more = 1 if magnitude >= start + step else 0
        if not decide(steps, bucket, 2 * speed, state, blob, more, decode):
            break
        start += step
        bucket += 1
    place = 0
    node = 1
    for i in range(_bits(bucket)):
        bit = (magnitude - start) >> (_bits(bucket) - 1 - i) & 1
        if i < 3:
            offsets.slot[0] = bucket * 8 + node
            bit = decide(offsets, zero, zero, state, blob, bit, decode)
            node = 2 * node + bit
        else:
            bit = rc.code(state, blob, ONE // 2, bit, decode)
        place = 2 * place + bit
    if decode:
        magnitude = start + place
        if magnitude > largest:
            return 0
        levels[r, c] = negatives + 1 + magnitude if sign else negatives - magnitude
    return (magnitude + 1) * towards


@jit
def _code(
    levels: Levels,
    clusters: int,
    negatives: int,
    dense: bool,
    near: int,
    far: int,
    speed: int,
    places: Decisions,
    signs: Decisions,
    steps: Decisions,
    offsets: Decisions,
    window: Int64,
    filled: Int64,
    group: Int64,
    last: Int64,
    around: Int64,
    state: Int64,
    blob: NDArray[np.uint8],
    decode: bool,
) -> int:
    """Encode `levels` [rows, columns], or decode into it; return the bytes, _CORRUPT or _FULL."""
    rows, columns = levels.shape
    rc.start(state, blob, decode)
    at, slot, inputs = places.start, places.slot, places.inputs
    margin = 2 * max(near, far) + 2
    offset = near + 1
    total = 0
    done = 0
    for r in range(rows):
        here, up1, up2, up3 = r & 3, r + 3 & 3, r + 2 & 3, r + 1 & 3
        for x in range(window.shape[1]):
            window[here, x] = 0
        height = _log(r + 1)
        kept = 0
        size = 0
        previous = 0
        before = 0
        since = 0
        inside = 0
        for c in range(columns):
            if not decode and state[rc.POS] + _SLACK > blob.size:
                return _FULL
            x = c + margin
            west, west2 = window[here, x - 1], window[here, x - 2]
            north = window[here, x - near] if near else 0
            northwest = window[here, x - near - 1] if near else 0
            northeast = window[here, x - near + 1] if near > 1 else 0
            north2 = window[here, x - 2 * near] if near else 0
            far1 = window[here, x - far] if far else 0
            far2 = window[here, x - 2 * far] if far else 0
            full = filled[c + offset]
            near_by = 2 * full + filled[c + offset - 1] + filled[c + offset + 1]
            if near:
                near_by += filled[c + offset - near] + filled[c + offset + near]
            else:
                near_by += 2 * full
            fullness = _clip((_log(4 * near_by + 4) - height + 48) >> 1, 0, 63)
            touching = (west != 0) + (north != 0) + (northwest != 0) + (northeast != 0)
            touching += (west2 != 0) + (north2 != 0)
            bit = 1
            if not dense:
                crowd = _clip((_log(16 * kept + 8) - _log(c + 8) + 48) >> 2, 0, 31)
                deep = min(31, height >> 2 if height < 64 else 16 + ((height - 64) >> 3))
                many = min(63, full if full < 24 else 24 + ((_log(full) - 36) >> 1))
                share = 0
                if far:
                    if c % far == 0:
                        inside = 0
                    share = _log(16 * group[c // far] + 8) - _log(r * far + c % far + 1)
                    share = _clip((share + 48) >> 1, 0, 63)
                slot[1] = at[1] + c % _PLACES
                slot[2] = at[2] + crowd * 32 + min(31, _log(c + 1) >> 3)
                slot[3] = at[3] + many * 32 + deep
                slot[4] = at[4] + (west != 0) + 2 * (west2 != 0) + 4 * (north != 0)
                slot[4] += 8 * (northwest != 0) + 16 * (northeast != 0) + 32 * (north2 != 0)
                slot[4] += 64 * (far1 != 0) + 128 * (far2 != 0)
                slot[5] = at[5] + (window[up1, x] != 0) + 2 * (window[up2, x] != 0)
                slot[5] += 4 * (window[up3, x] != 0) + 8 * (west != 0) + 16 * (north != 0)
                slot[5] += 32 * (far1 != 0) + 64 * (northeast != 0)
                slot[5] += 128 * (window[up1, x - 1] != 0) + 256 * (window[up1, x + 1] != 0)
                slot[6] = at[6] + r % _PLACES
                slot[7] = at[7] + share * 64 + min(7, inside) * 8 + min(7, since)
                slot[8] = at[8] + share * 64 + fullness
                # How much fuller than the layer the columns around and this row are: logarithms,
                # drawn to 0 while little was seen (as if 30 average positions had been).
                average = _log(_FINE * (total + 1)) - _log(done + 1)
                plus = max(1, _FINE * (total + 1) * 30 // (done + 30))
                inputs[8] = (_log(_FINE * near_by // 6 + plus) - _log(r + 30) - average) * 22
                inputs[9] = (_log(_FINE * kept + plus) - _log(c + 30) - average) * 22
                bit = 1 if levels[r, c] else 0
                bit = decide(places, min(height >> 3, 15), speed, state, blob, bit, decode)
                done += 1
                total += bit
                since += 1
            if bit:
                since = 0
                inside += 1
                signed = 1
                if clusters > 1:
                    heavy = 0
                    if kept:
                        heavy = _clip(_log(4 * size + 2) - _log(4 * kept + 2) + 32, 0, 63)
                    around[0], around[1], around[2], around[3] = west, north, northwest, northeast
                    around[4], around[5], around[6] = previous, before, last[c]
                    around[7], around[8], around[9] = fullness, touching, heavy
                    signed = _code_value(
                        levels,
                        r,
                        c,
                        clusters,
                        negatives,
                        around,
                        signs,
                        steps,
                        offsets,
                        speed,
                        state,
                        blob,
                        decode,
                    )
                    if signed == 0:
                        return _CORRUPT
                elif decode:
                    levels[r, c] = 1
                window[here, x] = signed
                before, previous = previous, signed
                last[c] = signed
                size += abs(signed)
                kept += 1
                filled[c + offset] += 1
                if far:
                    group[c // far] += 1
            if decode and state[rc.POS] > blob.size + 4:
                return _CORRUPT
    if decode:
        return blob.size if rc.ended(state, blob) else _CORRUPT
    return rc.finish(state, blob)


def _run(
    levels: Levels,
    clusters: int,
    negatives: int,
    dense: bool,
    strides: tuple[int, int],
    base: int,
    speed: int,
    blob: NDArray[np.uint8],
    decode: bool,
) -> int:
    """Call `_code` with all adaptive state in its initial state."""
    rows, columns = levels.shape
    near, far = strides
    wide, high = min(columns, _PLACES), min(rows, _PLACES)
    buckets = _buckets(clusters, negatives)
    return int(
        _code(
            levels,
            clusters,
            negatives,
            dense,
            near,
            far,
            SPEEDS[speed],
            decisions(
                [1, wide, 1024, 2048, 256, 512, high, 4096, 4096],
                [8, 16, 4, 2, 4, 4, 16, 4, 4],
                int(SQUASH[(base - 128) * _UNIT + LIMIT]) << 6,
                16,
                8192,
                2,
                1000,
            ),
            decisions([1, 81, 64, wide, high, 243], [2, 2, 2, 4, 4, 2], HALF, 1, 9830),
            decisions(
                [n * buckets for n in (1, 2, 64, 64, min(rows, _SIZED), 256, 64)],
                [2, 2, 2, 2, 4, 2, 2],
                HALF,
                buckets,
                6554,
            ),
            decisions([8 * buckets], [2], HALF, 1, 0),
            # Signed magnitudes of this row and the three above, in turn, zeros left and right;
            # survivors of each column, and of `far` columns together; each column's last survivor.
            np.zeros((4, columns + 4 * max(near, far) + 4), np.int32),
            np.zeros(columns + 2 * near + 2, np.int64),
            np.zeros(columns // max(far, 1) + 1, np.int64),
            np.zeros(columns, np.int64),
            np.zeros(10, np.int64),
            np.zeros(rc.STATE, np.int64),
            blob,
            decode,
        )
    )


def encode(levels: Levels, clusters: int, negatives: int, near: int, far: int, speed: int) -> bytes:
    """Encode a matrix of levels.

    Args:
        levels: [rows, columns], from 0 to `clusters`.
        clusters: Number of clusters.
        negatives: Clusters 1 to `negatives` have values below zero, the others above.
        near: Distance in columns to the neighbour in the next row of the image or kernel; 0:
            there is no second dimension.
        far: Distance in columns to the same place in the next channel; 0: there are no channels.
        speed: How fast probabilities adapt, as an index into SPEEDS.
    """
    kept = np.count_nonzero(levels) / levels.size
    odds = np.log(max(kept, 1e-5) / max(1 - kept, 1e-5))
    base = int(np.clip(round(odds * 256 / _UNIT), -127, 127)) + 128
    dense = clusters > 1 and kept == 1.0
    # Enough for indices without structure; memory that stays untouched costs nothing.
    size, room = _FULL, levels.size * (clusters.bit_length() + 2) // 16
    while size == _FULL:
        room = 2 * room + 2 * _SLACK
        buffer = np.zeros(room, np.uint8)
        size = _run(
            levels, clusters, negatives, dense, (near, far), base, speed, buffer, decode=False
        )
    flags = dense | speed << 1 | (near > 0 or far > 0) << 3
    shifts = varint.encode(near) + varint.encode(far) if flags & 8 else b""
    return bytes([flags, base]) + shifts + buffer[:size].tobytes()


@functools.cache
def prepare() -> None:
    """Compile the coder, which takes seconds where numba has not kept it on disk."""
    encode(np.ones((1, 1), np.uint16), 1, 0, 0, 0, 0)


def decode(blob: bytes, rows: int, columns: int, clusters: int, negatives: int) -> Levels:
    """The levels that `encode` wrote.

    Raises:
        CorruptError: no encoder wrote these bytes for such a layer.
    """
    if len(blob) < 2 or blob[0] > 15 or blob[1] == 0:
        raise CorruptError("the head of a context-coded layer is damaged")
    flags, base, at, near, far = blob[0], blob[1], 2, 0, 0
    if flags & 8:
        near, at = varint.decode(blob, at)
        far, at = varint.decode(blob, at)
    dense = bool(flags & 1)
    if 2 * max(near, far) > columns or (dense and clusters < 2) or (flags & 8 and near == far == 0):
        raise CorruptError("the head of a context-coded layer does not fit its shape")
    levels = np.zeros((rows, columns), np.uint16)
    data = np.frombuffer(blob, np.uint8, offset=at).copy()
    speed = flags >> 1 & 3
    size = _run(levels, clusters, negatives, dense, (near, far), base, speed, data, decode=True)
    if size < 0:
        raise CorruptError("a context-coded layer is damaged")
    return levels
