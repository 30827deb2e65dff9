"""Adaptive probabilities and their mixture in the logistic domain (Mahoney, 2005; lpaq).

A counter is a 22-bit probability and the number of bits seen; it moves by 1 / (n + prior + 1.5) of
the error, so it is a mean at first and never slower than its limit. A mixture is the stretched
probability of a base counter plus a weighted sum of how far the counters of the active contexts
stand from it: a context that says nothing new adds nothing. Weights are 16.16 fixed point and follow
the gradient of the coding cost.

The arrays of one kind of decision: `chance` and `seen` (counters), `weight` (sets of INPUTS
weights), `slot` and `input` (what the current decision uses; slot[0] is the base).
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from trainer.compress.coding.rangecoder import FLOOR, ONE
from trainer.compress.coding.tables import LIMIT, RATE, SQUASH, STRETCH

Int64 = NDArray[np.int64]
INPUTS = 16
HALF = 1 << 21


@njit(cache=True)
def mix(chance: Int64, weight: Int64, slot: Int64, inputs: Int64, n: int, m: int, w: int) -> int:
    """The probability of a 1, in 1/65536, from counters slot[1..n] and ready inputs[n..m-1]."""
    base = STRETCH[chance[slot[0]] >> 6]
    for i in range(n):
        inputs[i] = STRETCH[chance[slot[i + 1]] >> 6] - base
    total = np.int64(0)
    for i in range(m):
        total += inputs[i] * weight[w + i]
    x = min(max(base + (total >> 16), -LIMIT), LIMIT)
    return min(max(SQUASH[x + LIMIT], FLOOR), ONE - FLOOR)


@njit(cache=True)
def count(chance: Int64, seen: Int64, at: int, bit: int, prior: int, limit: int) -> None:
    """Move one counter towards the bit."""
    target = (1 << 22) - 1 if bit else 0
    chance[at] += (target - chance[at]) * RATE[seen[at] + prior] >> 16
    if seen[at] < limit:
        seen[at] += 1


@njit(cache=True)
def learn(
    chance: Int64,
    seen: Int64,
    weight: Int64,
    slot: Int64,
    inputs: Int64,
    n: int,
    m: int,
    w: int,
    bit: int,
    p: int,
    speed: int,
    prior: Int64,
    limit: int,
) -> None:
    """After the bit is known: weights follow the error, counters the bit."""
    error = ((bit << 16) - p) * speed
    for i in range(m):
        weight[w + i] += inputs[i] * error + (1 << 17) >> 18
    for i in range(n + 1):
        count(chance, seen, slot[i], bit, prior[i], limit)
