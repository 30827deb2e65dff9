"""Trellis-coded quantization: two coarse grids take turns, at the error of a finer one.

The even multiples of half a step are the first grid; zero and the odd multiples are the second. A
state machine, driven by the parities of the integers before, says which grid a weight is on, so
that the file holds no more than an integer of the coarse grid for each weight, and the path of
least total error and price is found by dynamic programming (Viterbi). Marcellin & Fischer, Trellis
coded quantization, 1990; Haase et al., Dependent scalar quantization for neural network
compression, ICIP 2020, which has 8 states. The machine is Ungerboeck's code of 64 states for one
dimension, with the parity-check polynomials 103 and 024 (octal): Channel coding with
multilevel/phase signals, 1982.

Each column of a layer's matrix is a path that begins in state 0, from the first row to the last: so
second-order rounding can take the columns one by one in any order.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.compress.jit import jit
from trainer.compress.rate import magnitude_bits

Ints = NDArray[np.int32]
Floats = NDArray[np.floating[Any]]

_STATES = 64
_FEEDBACK, _INPUT = 33, 10  # bits of the next state that an odd state, and an odd level, invert
_PASSES = 3  # in which the bits of levels are counted again after rounding by them
_SAMPLE = 1 << 18  # weights by which they are counted


def _after(state: int, level: int) -> int:
    """The state after a level. Odd states are those of the second grid."""
    return (state >> 1) ^ (_FEEDBACK * (state & 1)) ^ (_INPUT * (level & 1))


_next = jit(_after)

# The state before each state, if the level between them is even, and if it is odd: [2, states].
# Both are of one grid.
_BEFORE = np.empty((2, _STATES), np.int64)
for _state in range(_STATES):
    for _parity in range(2):
        _BEFORE[_parity, _after(_state, _parity)] = _state


@jit
def _decode(levels: Ints, states: Ints) -> None:
    """Replace levels [rows, columns] by multiples of half a step; states [columns] start as 0."""
    for row in range(levels.shape[0]):
        for column in range(levels.shape[1]):
            level, state = levels[row, column], states[column]
            states[column] = _next(state, level)
            odd = state & 1
            levels[row, column] = 2 * level - odd * (level > 0) + odd * (level < 0)


@jit
def _encode(multiples: Ints, states: Ints) -> bool:
    """The inverse of `_decode`; False, with some replaced, if a multiple is not on its grid."""
    for row in range(multiples.shape[0]):
        for column in range(multiples.shape[1]):
            value, state = multiples[row, column], states[column]
            if value and (value ^ state) & 1:
                return False
            level = (value + (value > 0)) >> 1  # rounded away from zero
            states[column] = _next(state, level)
            multiples[row, column] = level
    return True


@jit
def _cheapest(
    weights: Floats, alive: NDArray[np.bool_], bits: Floats, price: float, multiples: Ints
) -> None:
    """Find the path of least cost over each column; see `cheapest_path`.

    Args:
        weights: In steps, [rows, columns].
        alive: Likewise.
        price: In squares of half a step.
        multiples: Filled with the paths, likewise.
    """
    count, largest = len(weights), bits.size - 1
    costs, new = np.empty(_STATES), np.empty(_STATES)
    choices = np.empty((count, 4), np.int32)  # the multiple for each grid and parity of the level
    taken = np.empty((count, _STATES), np.bool_)  # whether the level that led to a state was odd
    added = np.empty(4)
    for column in range(weights.shape[1]):
        costs[:] = np.inf
        costs[0] = 0.0
        for row in range(count):
            there = alive[row, column]
            weight = 2 * np.float64(weights[row, column]) if there else 0.0
            for grid in range(2):
                for parity in range(2):
                    found, best = 0, np.inf
                    if parity == 0:
                        best = weight * weight + price * bits[0]
                    if there:
                        # The multiples of one grid and parity are 4 apart on each side of zero.
                        first = (2 if parity else 4) - grid
                        last = 2 * (largest - ((largest - parity) & 1)) - grid
                        nearest = first + 4 * max(0, int(np.rint((abs(weight) - first) / 4)))
                        nearest = min(nearest, last)
                        for size in range(max(first, nearest - 4), nearest + 1, 4):
                            cost = (abs(weight) - size) ** 2 + price * bits[(size + grid) // 2]
                            if cost < best:
                                best, found = cost, (size if weight > 0 else -size)
                    choices[row, 2 * grid + parity] = found
                    added[2 * grid + parity] = best
            for state in range(_STATES):
                grid = _BEFORE[0, state] & 1
                cost = costs[_BEFORE[0, state]] + added[2 * grid]
                other = costs[_BEFORE[1, state]] + added[2 * grid + 1]
                taken[row, state] = other < cost
                new[state] = min(cost, other)
            costs, new = new, costs
        state = int(np.argmin(costs))
        for row in range(count - 1, -1, -1):
            parity = int(taken[row, state])
            state = _BEFORE[parity, state]
            multiples[row, column] = choices[row, 2 * (state & 1) + parity]


def multiples_of(levels: Ints) -> Ints:
    """The multiples of half a step that levels stand for; int32 [out, in, ...], in place."""
    matrix = _matrix(levels)
    _decode(matrix, np.zeros(matrix.shape[1], np.int32))
    return levels


def levels_of(multiples: Ints) -> Ints | None:
    """The levels of multiples of half a step; None if they are no paths of the trellis.

    Args:
        multiples: int32 [out, in, ...]; changed in any case.
    """
    matrix = _matrix(multiples)
    found = _encode(matrix, np.zeros(matrix.shape[1], np.int32))
    return multiples if found else None


def _matrix(weight: Ints) -> Ints:
    """A view, [rows, columns]."""
    return weight.reshape(len(weight) if weight.ndim else 1, -1)


def level_bits(scaled: Tensor, rate: float) -> Tensor:
    """The bits of each magnitude of a level with its sign, by how often it occurs.

    The coders do not know the grid of a weight, so the bits are those on both.

    Args:
        scaled: Weights in steps, [rows, columns], that do not depend on one another.
        rate: Squared error in steps that a bit is worth.

    Returns:
        float32 [1 + the largest magnitude], of weights other than zero.
    """
    largest = int(scaled.abs().max().round()) + 1 if scaled.numel() else 1
    bits = torch.zeros(1 + largest)
    sample = scaled[:, :: max(1, scaled.numel() // _SAMPLE)]
    for _ in range(_PASSES if rate else 0):
        paths = cheapest_path(sample, sample != 0, bits, rate)
        levels = levels_of((2 * paths).int().cpu().numpy())
        bits = magnitude_bits(torch.as_tensor(levels), largest)
    return bits


def cheapest_path(scaled: Tensor, alive: Tensor, bits: Tensor, price: Any) -> Tensor:
    """The path of each column with the smallest sum of squared error and price of its bits.

    Args:
        scaled: Weights in steps, [rows, columns].
        alive: Which of them may be other than zero, bool [rows, columns].
        bits: Of the magnitudes of levels (`level_bits`); larger ones are not used.
        price: Squared error in steps that a bit is worth.

    Returns:
        Multiples of 1/2, [rows, columns].
    """
    multiples = np.empty(scaled.shape, np.int32)
    weights, there = scaled.cpu().numpy(), alive.cpu().numpy()
    _cheapest(weights, there, bits.double().numpy(), 4 * float(price), multiples)
    return (torch.from_numpy(multiples) / 2).to(scaled)


def round_paths(scaled: Tensor, rate: float) -> Tensor:
    """The paths with few bits near weights that do not depend on one another.

    Args:
        scaled: Weights in steps, [out, in, ...]; zeros stay.
        rate: Squared error in steps that a bit is worth.

    Returns:
        Multiples of 1/2, in the same shape.
    """
    matrix = scaled.reshape(len(scaled), -1)
    paths = cheapest_path(matrix, matrix != 0, level_bits(matrix, rate), rate)
    return paths.reshape(scaled.shape)
