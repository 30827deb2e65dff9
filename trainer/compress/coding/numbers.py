"""Floating-point numbers of biases, norms and codebooks, coded bit by bit.

Signs, exponents and the first bits of the fractions of such numbers are alike, and are predicted by
what the numbers before had; the last bits are noise and are stored as they are.
"""

from typing import Any

import numba
import numpy as np

from trainer.compress.coding.binary import FLOOR, code, decoder, encoder, ended, finish, learn
from trainer.compress.coding.errors import CorruptError

_TREE = 8  # highest bits that are predicted from the bits above them
_MODELLED = 10  # highest bits that are predicted at all
_MOST = 1 << 20  # bytes that are worth it

_RAW, _CODED = 0, 1


def encode_numbers(raw: bytes, width: int) -> bytes:
    """Code little-endian numbers of `width` bytes each, or store them where that is shorter."""
    made = b""
    if width in (2, 4) and 0 < len(raw) <= _MOST:
        values = np.frombuffer(raw, f"<u{width}").astype(np.int64)
        state, buffer = encoder(8 * len(raw))
        _code(values, 8 * width, state, buffer, False)
        made = finish(state, buffer)
    if made and len(made) < len(raw):
        return bytes([_CODED]) + made
    return bytes([_RAW]) + raw


def decode_numbers(blob: bytes, count: int, width: int) -> bytes:
    """What `encode_numbers` was given: `count` numbers.

    Raises:
        CorruptError: the bytes cannot be its result.
    """
    kind, body = blob[:1], blob[1:]
    if kind == bytes([_RAW]) and len(body) == count * width:
        return body
    if kind != bytes([_CODED]) or width not in (2, 4) or count * width > _MOST:
        raise CorruptError(f"{len(body)} bytes cannot be {count} numbers of {width} bytes")
    values = np.zeros(count, dtype=np.int64)
    state, buffer = decoder(body)
    _code(values, 8 * width, state, buffer, True)
    if not ended(state, body):
        raise CorruptError("the coded numbers do not end where they should")
    return values.astype(f"<u{width}").tobytes()


@numba.njit(cache=True)
def _code(values: Any, bits: int, state: Any, buffer: Any, decoding: bool) -> None:
    slots = (1 << _TREE) + 4 * _MODELLED
    chances = np.full(slots, 1 << 21, dtype=np.int32)
    counts = np.zeros(slots, dtype=np.int16)
    for i in range(len(values)):
        value: Any = np.int64(0)
        for d in range(bits):
            bit = (values[i] >> (bits - 1 - d)) & 1
            if d < _MODELLED:
                slot = (np.int64(1) << d) + value
                if d >= _TREE:
                    slot = (1 << _TREE) + 4 * d + (value & 1)
                one = min(65536 - FLOOR, max(FLOOR, chances[slot] >> 6))
                bit = code(bit, one, state, buffer, decoding)
                learn(slot, bit, chances, counts)
            else:
                bit = code(bit, 1 << 15, state, buffer, decoding)
            value = value << 1 | bit
        values[i] = value
