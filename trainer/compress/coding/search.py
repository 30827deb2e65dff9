"""The options under which the context coder makes a layer smallest: orientation, strides, speed.

Options are compared by encoding the first rows of the layer with each. A budget bounds how many
are compared.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import ans, context, gaps
from trainer.compress.coding.budget import Budget, context_seconds
from trainer.compress.coding.errors import CorruptError

Levels = NDArray[np.uint16]

MAX_POSITIONS = 1 << 23  # of a layer; the context coder takes minutes for larger ones
MAX_COLUMNS = 1 << 16  # of its matrix, since the memory of the context coder grows with them
_SAMPLE = 1 << 16  # positions on which the context coder is compared with the others
_TRIAL = 1 << 18  # positions on which its options are compared
_GAIN = 0.97  # size, relative to the other coders, at which it is worth its time
_MIDDLE = 1  # index of the speed with which strides are compared


class Options(NamedTuple):
    """Of `context.encode`."""

    near: int
    far: int
    speed: int


def smallest(
    levels: Levels, clusters: int, negatives: int, budget: Budget
) -> list[tuple[bool, bytes]]:
    """Encode a layer by rows and by columns of its matrix, each with the best options.

    Args:
        levels: uint16 in the shape of the weight.
        clusters, negatives: See `context.encode`.
        budget: Reduced by the estimated CPU time.

    Returns:
        Whether the matrix was transposed, and the bytes. Empty if the context coder does not save
        enough to be worth its time, or if the budget does not suffice; without the less promising
        orientation if it does not suffice for both.
    """
    matrix = levels.reshape(matrix_shape(levels.shape))
    if not _is_worthwhile(matrix, clusters, negatives, budget):
        return []
    found = [
        _Orientation(matrix, levels.shape, clusters, negatives, budget, transposed)
        for transposed in (False, True)
    ]
    for orientation in found:
        orientation.choose_strides()
    encoded = []
    for orientation in sorted(found, key=lambda orientation: orientation.rate):
        orientation.choose_speed()
        if orientation.is_affordable:
            encoded.append((orientation.transposed, orientation.encode()))
    return sorted(encoded)


def encode(levels: Levels, clusters: int, negatives: int, transposed: bool) -> bytes:
    """Encode a layer in one orientation with the best options; arguments as of `smallest`."""
    matrix = levels.reshape(matrix_shape(levels.shape))
    chosen = _Orientation(matrix, levels.shape, clusters, negatives, Budget(), transposed)
    chosen.choose_strides()
    chosen.choose_speed()
    return chosen.encode()


def decode(data: bytes, rows: int, columns: int, clusters: int, negatives: int) -> Levels:
    """Decode a matrix [rows, columns]. Raises CorruptError as `context.decode`."""
    if columns <= MAX_COLUMNS:
        return context.decode(data, rows, columns, clusters, negatives)
    size = rows * columns
    flat = context.decode(data, -(-size // MAX_COLUMNS), MAX_COLUMNS, clusters, negatives).ravel()
    if flat[size:].any():
        raise CorruptError("survivors beyond the layer")
    return flat[:size].reshape(rows, columns)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight's matrix: outputs, and all weights that lead to one."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def _is_worthwhile(matrix: Levels, clusters: int, negatives: int, budget: Budget) -> bool:
    """Whether to use the context coder at all; it gains little on dense 8-bit weights, say."""
    cost = context_seconds(matrix, clusters, negatives)
    if matrix.size > MAX_POSITIONS or not budget.affords(cost):
        return False
    columns = matrix.shape[1]
    if matrix.size <= _SAMPLE or columns > _SAMPLE:  # small, or a row alone is more than a sample
        return True
    sample = matrix[: _SAMPLE // columns]
    sample_cost = context_seconds(sample, clusters, negatives)
    if not budget.affords(sample_cost + cost):
        return False
    budget.spend(sample_cost)
    mixed = context.encode(sample, clusters, negatives, 0, 0, _MIDDLE)
    return len(mixed) < _GAIN * len(gaps.encode(sample.ravel(), clusters, ans))


class _Orientation:
    """A layer's matrix, or its transpose, and the sizes of its first rows with some options.

    Attributes:
        rate: Bytes per position of the first rows with the best options tried so far; infinite
            without any.
    """

    def __init__(
        self,
        matrix: Levels,
        shape: Sequence[int],
        clusters: int,
        negatives: int,
        budget: Budget,
        transposed: bool,
    ) -> None:
        self.transposed = transposed
        self._is_plain = transposed or matrix.shape[1] > MAX_COLUMNS
        if transposed:
            matrix = np.ascontiguousarray(matrix.T)
        self._matrix = matrix if matrix.shape[1] <= MAX_COLUMNS else _folded(matrix)
        self._sample = self._matrix[: max(1, _TRIAL // self._matrix.shape[1])]
        self._shape, self._clusters, self._negatives = shape, clusters, negatives
        self._budget = budget
        self._trial_cost = context_seconds(self._sample, clusters, negatives)
        # The cost of the final encoding; a trial on all rows is the final encoding itself.
        self._rest = 0.0
        if len(self._sample) < len(self._matrix):
            self._rest = context_seconds(self._matrix, clusters, negatives)
        self._tried: dict[Options, bytes] = {}
        self._best = Options(0, 0, _MIDDLE)

    @property
    def rate(self) -> float:
        return len(self._tried[self._best]) / self._sample.size if self._tried else math.inf

    def choose_strides(self) -> None:
        """Try the strides that the shape suggests."""
        columns = self._matrix.shape[1]
        candidates = [(0, 0)] if self._is_plain else list(_strides(self._shape, columns))
        self._choose([Options(near, far, _MIDDLE) for near, far in candidates])

    def choose_speed(self) -> None:
        """Try all speeds with the chosen strides."""
        speeds = range(len(context.SPEEDS))
        self._choose([self._best._replace(speed=speed) for speed in speeds])

    def _choose(self, candidates: Sequence[Options]) -> None:
        """Set the best options; the first of those of equal size."""
        for options in candidates:
            if options not in self._tried and self._budget.affords(self._trial_cost + self._rest):
                self._budget.spend(self._trial_cost)
                self._tried[options] = self._encode(self._sample, options)
        tried = [options for options in candidates if options in self._tried]
        if tried:
            self._best = min(tried, key=lambda options: len(self._tried[options]))

    @property
    def is_affordable(self) -> bool:
        """Whether the budget suffices for `encode`; of a large layer also without any trial."""
        return bool(self._tried or self._rest) and self._budget.affords(self._rest)

    def encode(self) -> bytes:
        """Encode all rows with the best options."""
        if not self._rest:
            return self._tried[self._best]
        self._budget.spend(self._rest)
        return self._encode(self._matrix, self._best)

    def _encode(self, matrix: Levels, options: Options) -> bytes:
        return context.encode(matrix, self._clusters, self._negatives, *options)


def _folded(matrix: Levels) -> Levels:
    """All positions in rows of MAX_COLUMNS, the last one filled up with zeros."""
    flat = np.zeros((-(-matrix.size // MAX_COLUMNS), MAX_COLUMNS), np.uint16)
    flat.ravel()[: matrix.size] = matrix.ravel()
    return flat


def _strides(shape: Sequence[int], columns: int) -> Iterator[tuple[int, int]]:
    """Distances, in columns, to the neighbour below in a kernel or image and to the next channel.

    Yields (0, 0) first: no second dimension.
    """
    yield 0, 0
    if len(shape) > 2:
        kernel = math.prod(shape[2:])
        if 2 * kernel <= columns:
            yield 0, kernel
            if kernel > shape[-1]:
                yield shape[-1], kernel
        elif 2 * shape[-1] <= columns:
            yield shape[-1], 0
        return
    for channels in (1, 3):  # the input may be an image, or flattened square feature maps
        side = math.isqrt(columns // channels)
        if side > 2 and channels * side * side == columns:
            yield side, side * side if channels > 1 else 0
    for side in range(2, 9):
        if columns % (side * side) == 0 and columns > side * side:
            yield side, side * side
