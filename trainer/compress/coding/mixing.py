"""Adaptive probabilities and their mixture in the logistic domain (Mahoney, 2005; lpaq).

A counter is a 22-bit probability and the number of bits seen; it moves by 1 / (n + prior + 1.5) of
the error, so it is a mean at first and never slower than its limit. A mixture is the stretched
probability of a base counter plus a weighted sum of how far the counters of the active contexts
stand from it: a context that says nothing new adds nothing. Weights are 16.16 fixed point and
follow the gradient of the coding cost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import rangecoder as rc
from trainer.compress.coding.rangecoder import FLOOR, ONE
from trainer.compress.coding.tables import LIMIT, RATE, SQUASH, STRETCH
from trainer.compress.jit import jit

Int64 = NDArray[np.int64]
INPUTS = 16  # room for one decision
HALF = 1 << 21


class Decisions(NamedTuple):
    """All that is learnt about one kind of binary decision."""

    start: Int64  # where each context's counters start; context 0 is the base
    chance: Int64  # of a 1, in 2^-22
    seen: Int64  # bits
    prior: Int64  # of each context: how many bits its first probability counts for
    weight: Int64  # sets of INPUTS weights
    slot: Int64  # the counter that each context uses for the current decision
    inputs: Int64  # what is weighted in the current decision
    ready: int  # how many of the inputs, after those of the counters, the caller sets
    limit: int  # of the bits that a counter remembers


def decisions(
    sizes: Sequence[int],
    prior: Sequence[int],
    chance: int,
    sets: int,
    weight: int,
    ready: int = 0,
    limit: int = 255,
) -> Decisions:
    """The initial state: contexts of `sizes` counters, each at `chance` / 2^22."""
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Decisions(
        start,
        np.full(start[-1], chance, np.int64),
        np.zeros(start[-1], np.int64),
        np.array(prior, np.int64),
        np.full(sets * INPUTS, weight, np.int64),
        np.zeros(INPUTS, np.int64),
        np.zeros(INPUTS, np.int64),
        ready,
        limit,
    )


@jit
def count(chance: Int64, seen: Int64, at: int, bit: int, prior: int, limit: int) -> None:
    """Move one counter towards the bit."""
    target = (1 << 22) - 1 if bit else 0
    chance[at] += (target - chance[at]) * RATE[seen[at] + prior] >> 16
    if seen[at] < limit:
        seen[at] += 1


@jit
def decide(
    kind: Decisions,
    which: int,
    speed: int,
    state: Int64,
    blob: NDArray[np.uint8],
    bit: int,
    decode: bool,
) -> int:
    """Write or read one bit by the mixture of the counters in `slot`, and learn from it.

    Args:
        which: the set of weights.
        speed: of the weights.
    """
    _, chance, seen, prior, weight, slot, inputs, ready, limit = kind
    counters = prior.size - 1
    used = counters + ready
    first = which * INPUTS
    base = STRETCH[chance[slot[0]] >> 6]
    x = 0
    for i in range(counters):
        inputs[i] = STRETCH[chance[slot[i + 1]] >> 6] - base
    for i in range(used):
        x += inputs[i] * weight[first + i]
    x = min(max(base + (x >> 16), -LIMIT), LIMIT)
    one = min(max(SQUASH[x + LIMIT], FLOOR), ONE - FLOOR)
    bit = rc.code(state, blob, one, bit, decode)
    error = ((bit << 16) - one) * speed
    for i in range(used):
        weight[first + i] += inputs[i] * error + (1 << 17) >> 18
    for i in range(counters + 1):
        count(chance, seen, slot[i], bit, prior[i], limit)
    return bit
