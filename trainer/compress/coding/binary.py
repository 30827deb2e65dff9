"""An adaptive binary range coder with logistic mixing: integers only, the same on every machine.

Every decision is one bit with a probability that several contexts predict together. What has been
seen in each context is a counter; the predictions are mixed by weights that learn which contexts
are right (Mahoney, Adaptive weighing of context models for lossless data compression, Florida
Tech. CS-2005-16, 2005; the arithmetic follows its lpaq). docs/artifact.md specifies every step.
"""

from decimal import Decimal
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOOR = 16  # least probability of a bit in 1/65536: no decision costs less than 0.00035 bits
LIMIT = 1023  # a counter's memory: its rate never falls below 1 / (LIMIT + 1.5)

_LOW, _RANGE, _CACHE, _PENDING, _PLACE, _CODE, _LENGTH = range(7)  # of a coder's state


def _squash() -> Array:
    """65536 / (1 + e^-x) rounded, for x = (i - 2048) / 256; decimal, so that no libm matters."""
    steps = (Decimal(2048 - i) / 256 for i in range(4096))
    return np.array([int((65536 / (1 + step.exp())).to_integral_value()) for step in steps])


SQUASH = _squash().astype(np.int32)
# The x whose squash comes nearest below the middle of each sixteenth of a 4096th.
STRETCH = (np.searchsorted(SQUASH, np.arange(4096) * 16 + 8).clip(1, 4095) - 2048).astype(np.int32)
# The rate of a counter that has seen n bits: 65536 / (n + 1.5).
RATE = ((2 << 16) // (2 * np.arange(LIMIT + 1) + 3)).astype(np.int32)


def encoder(bits: int) -> tuple[Array, Array]:
    """State and buffer to encode at most so many binary decisions."""
    state = np.zeros(7, dtype=np.int64)
    state[_RANGE] = 0xFFFFFFFF
    return state, np.empty(16 + bits * 3 // 2, dtype=np.uint8)


def decoder(blob: bytes) -> tuple[Array, Array]:
    """State and buffer to decode what `finish` returned."""
    buffer = np.frombuffer(blob, dtype=np.uint8).copy()  # compiled for writable arrays
    state = np.zeros(7, dtype=np.int64)
    state[_RANGE] = 0xFFFFFFFF
    state[_LENGTH] = len(buffer)
    for place in range(4):
        state[_CODE] = state[_CODE] << 8 | (int(buffer[place]) if place < len(buffer) else 0)
    state[_PLACE] = 4
    return state, buffer


def finish(state: Array, buffer: Array) -> bytes:
    """The bytes of an encoder: as few as decode to the same, none of them zero at the end."""
    low, top = int(state[_LOW]), int(state[_LOW]) + int(state[_RANGE]) - 1
    free = (top >> kept << kept for kept in (32, 24, 16, 8, 0))  # with so many lowest bits zero
    state[_LOW] = next(value for value in free if value >= low)
    for _ in range(5):
        _shift(state, buffer)
    # The first byte is the carry out of the first four, which cannot be.
    return bytes(buffer[1 : state[_PLACE]]).rstrip(b"\0")


def ended(state: Array, blob: bytes) -> bool:
    """Whether a decoder has used all of its bytes, and has not gone further than `finish` does."""
    return len(blob) <= int(state[_PLACE]) and not blob.endswith(b"\0")


@numba.njit(cache=True)
def _shift(state: Array, buffer: Array) -> None:
    low = state[_LOW]
    if low < 0xFF000000 or low > 0xFFFFFFFF:
        carry = low >> 32
        place = state[_PLACE]
        buffer[place] = (state[_CACHE] + carry) & 0xFF
        place += 1
        for _ in range(state[_PENDING]):
            buffer[place] = (0xFF + carry) & 0xFF
            place += 1
        state[_PLACE] = place
        state[_PENDING] = 0
        state[_CACHE] = (low >> 24) & 0xFF
    else:
        state[_PENDING] += 1
    state[_LOW] = (low & 0x00FFFFFF) << 8


@numba.njit(cache=True, inline="always")
def code(bit: int, one: int, state: Array, buffer: Array, decoding: bool) -> int:
    """Encode `bit`, or decode and return one; `one` is the probability of a 1 in 1/65536."""
    bound = (state[_RANGE] * one) >> 16
    if decoding:
        bit = 1 if state[_CODE] < bound else 0
        if bit:
            state[_RANGE] = bound
        else:
            state[_CODE] -= bound
            state[_RANGE] -= bound
        while state[_RANGE] < 1 << 24:
            place = state[_PLACE]
            byte = np.int64(buffer[place]) if place < state[_LENGTH] else np.int64(0)
            state[_CODE] = state[_CODE] << 8 | byte
            state[_RANGE] <<= 8
            state[_PLACE] = place + 1
    else:
        if bit:
            state[_RANGE] = bound
        else:
            state[_LOW] += bound
            state[_RANGE] -= bound
        while state[_RANGE] < 1 << 24:
            state[_RANGE] <<= 8
            _shift(state, buffer)
    return bit


@numba.njit(cache=True, inline="always")
def learn(slot: int, bit: int, chances: Array, counts: Array) -> None:
    """Move a counter (22 bits) towards a bit: fast at first, then by the mean of all it saw."""
    n = counts[slot]
    target = 4194303 if bit else 0
    chances[slot] += ((target - np.int64(chances[slot])) * RATE[n]) >> 16
    if n < LIMIT:
        counts[slot] = n + 1


@numba.njit(cache=True)
def mixed(
    bit: int,
    slots: Array,
    n: int,
    first: int,
    rate: int,
    chances: Array,
    counts: Array,
    weights: Array,
    inputs: Array,
    state: Array,
    buffer: Array,
    decoding: bool,
) -> int:
    """Code one bit with the mixed prediction of `n` contexts, and learn from it.

    Args:
        slots: the counter of each context; one that saw nothing yet predicts as the first does.
        first: index of the first weight of the set that mixes.
        rate: at which the weights learn.
    """
    total: Any = np.int64(0)
    for i in range(n):
        slot = slots[i]
        if counts[slot] == 0:
            chances[slot] = chances[slots[0]]
        inputs[i] = STRETCH[chances[slot] >> 10]
        total += np.int64(inputs[i]) * weights[first + i]
    x = min(2047, max(-2047, total >> 16))
    one = min(65536 - FLOOR, max(FLOOR, SQUASH[x + 2048]))
    bit = code(bit, one, state, buffer, decoding)
    error = ((bit << 16) - SQUASH[x + 2048]) * rate
    for i in range(n):
        weights[first + i] += (inputs[i] * error + (1 << 19)) >> 20
        learn(slots[i], bit, chances, counts)
    return bit
