"""Random numbers as a pure function of counters such as (seed, epoch, sample index).

They do not depend on the process or the order of calls, so they are the same for any number of
workers, resumed or not. The function is splitmix64 (Steele, Lea & Flood, OOPSLA 2014; constants of
Vigna's public-domain version).
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The next output of a splitmix64 generator in `state`, in [0, 2^64)."""
    z = (state + GAMMA) & MASK
    z = ((z ^ (z >> 30)) * MULTIPLIER_1) & MASK
    z = ((z ^ (z >> 27)) * MULTIPLIER_2) & MASK
    return z ^ (z >> 31)


def mix(*words: int) -> int:
    """One 64-bit number from several integers: state = splitmix64(state + word), from 0."""
    state = 0
    for word in words:
        state = splitmix64((state + word) & MASK)
    return state


def mix_indices(key: int, indices: Tensor) -> NDArray[np.uint64]:
    """`splitmix64(key + index)` for each of the int64 indices [n].

    With key = mix(a, b) that is mix(a, b, index). In numpy: torch cannot compute with uint64.
    """
    z = indices.numpy().view(np.uint64) + np.uint64((key + GAMMA) & MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
