"""The tables of the context coder, made by exact arithmetic so that all machines agree on them.

Probabilities have 16 bits. The logistic domain counts in 1/256: stretch(p) = 256 ln(p / (1 - p)),
cut off at +-LIMIT; squash is its inverse (Mahoney, "Adaptive weighing of context models for
lossless data compression", 2005). A float's exp may differ between libraries in its last bit, which
would break decoding; `decimal` is rounded correctly by its specification.
"""

from decimal import ROUND_FLOOR, Context, Decimal

import numpy as np
from numpy.typing import NDArray

LIMIT = 2816  # 11 in units of 1/256: the farthest that 16 bits reach
_EXACT = Context(prec=30)


def _squash() -> NDArray[np.int64]:
    """65536 / (1 + exp(-x / 256)), rounded down, at least 1, for x from -LIMIT to LIMIT."""
    one, scale = Decimal(1), Decimal(65536)
    values = []
    for x in range(-LIMIT, LIMIT + 1):
        power = _EXACT.exp(_EXACT.divide(Decimal(-x), Decimal(256)))
        share = _EXACT.divide(scale, _EXACT.add(one, power))
        values.append(max(1, int(share.to_integral_value(ROUND_FLOOR))))
    return np.array(values, np.int64)


def _log() -> NDArray[np.int64]:
    """floor(8 log2 x) for x from 1 to 4096; 0 at 0."""
    return np.array([0] + [(x**8).bit_length() - 1 for x in range(1, 4097)], np.int64)


SQUASH = _squash()
# The lowest x whose squash reaches p, for p from 0 to 65535.
STRETCH = (np.searchsorted(SQUASH, np.arange(65536)).clip(0, 2 * LIMIT) - LIMIT).astype(np.int64)
LOG = _log()
# 65536 / (n + 1.5): how far a counter moves that has seen n bits.
RATE = np.array([131072 // (2 * n + 3) for n in range(2048)], np.int64)
