"""A binary range coder: each bit shrinks a 32-bit range in proportion to its probability.

Carries are propagated into the bytes already written. At the end, the encoder writes the fewest
bytes that identify a number inside the range. A decoder reads zeros past the end; from its own
state it knows how many bytes there must be, and checks it. Derived from the coders of Subbotin and
of LZMA.

The state is an int64 array: LOW and RANGE of the encoder (modulo 2^32), POS (bytes written or
read) and, in a decoder, CODE (the number read minus LOW).
"""

import numpy as np
from numpy.typing import NDArray

from trainer.compress.jit import jit

Int64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]

LOW, RANGE, POS, CODE = 0, 1, 2, 3
STATE = 4
ONE = 1 << 16
FLOOR = 16  # no bit is less likely than this / ONE, so each costs something
_TOP = 1 << 24
_MASK = (1 << 32) - 1


@jit
def start(state: Int64, blob: Bytes, decode: bool) -> None:
    state[LOW] = 0
    state[RANGE] = _MASK
    state[POS] = 0
    state[CODE] = 0
    if decode:
        for _ in range(4):
            _read(state, blob)


@jit
def _read(state: Int64, blob: Bytes) -> None:
    byte = np.int64(blob[state[POS]]) if state[POS] < blob.size else np.int64(0)
    state[CODE] = state[CODE] << 8 | byte
    state[POS] += 1


@jit
def _carry(state: Int64, blob: Bytes) -> None:
    if state[LOW] > _MASK:
        state[LOW] &= _MASK
        at = state[POS] - 1
        while blob[at] == 255:
            blob[at] = 0
            at -= 1
        blob[at] += 1


@jit
def code(state: Int64, blob: Bytes, one: int, bit: int, decode: bool) -> int:
    """Write `bit` to `blob`, or read and return it; `one` / 65536 is the probability of a 1."""
    bound = state[RANGE] * one >> 16
    if decode:
        bit = 1 if state[CODE] < bound else 0
    if bit:
        state[RANGE] = bound
    else:
        state[RANGE] -= bound
        state[LOW] += bound
        if decode:
            state[CODE] -= bound
            state[LOW] &= _MASK
        else:
            _carry(state, blob)
    while state[RANGE] < _TOP:
        if decode:
            _read(state, blob)
        else:
            blob[state[POS]] = state[LOW] >> 24
            state[POS] += 1
        state[LOW] = state[LOW] << 8 & _MASK
        state[RANGE] <<= 8
    return bit


@jit
def _tail(state: Int64) -> tuple[int, int]:
    """The number in the range with the most trailing zero bytes, and how many of them it has."""
    for spare in range(4, 0, -1):
        unit = 1 << 8 * spare
        number = (state[LOW] + unit - 1) // unit * unit
        if number < state[LOW] + state[RANGE]:
            return number, spare
    return state[LOW], 0


@jit
def finish(state: Int64, blob: Bytes) -> int:
    """Write the end; returns the length of the whole in bytes."""
    number, spare = _tail(state)
    state[LOW] = number
    _carry(state, blob)
    for place in range(4 - spare):
        blob[state[POS]] = state[LOW] >> (24 - 8 * place) & 255
        state[POS] += 1
    return int(state[POS])


@jit
def ended(state: Int64, blob: Bytes) -> bool:
    """Whether the decoder has consumed exactly the bytes that `finish` wrote after these bits."""
    number, spare = _tail(state)
    return bool(state[POS] - spare == blob.size and state[CODE] == number - state[LOW])
