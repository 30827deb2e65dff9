"""What a coder of layers is, and the coders of this package."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import gaps, groups, search
from trainer.compress.coding.gaps import SymbolCoder

Levels = NDArray[np.uint16]


class Coder(Protocol):
    """Turns the levels of a layer into bytes and back; docs/own-coder.md shows how to write one.

    A coder keeps no state between calls: each layer is decoded without the others.
    """

    def encode(self, levels: Levels, clusters: int, negatives: int) -> bytes:
        """Encode one layer.

        Args:
            levels: uint16 in the shape of the weight, not empty: 0 for a weight that is zero, else
                1 to `clusters` for its cluster, in ascending order of the clusters' values. Must
                not be changed.
            clusters: Number of clusters, 1 to 65535.
            negatives: How many of them have a value below zero: clusters 1 to `negatives`.
        """

    def decode(self, blob: bytes, shape: Sequence[int], clusters: int, negatives: int) -> Levels:
        """Decode the bytes of `encode`.

        Args:
            blob: The bytes, and nothing else.
            shape: Shape of the levels.
            clusters, negatives: As they were passed to `encode`.

        Returns:
            The levels, integers in `shape`.

        Raises:
            Exception: `encode` wrote no such bytes. Any exception will do.
        """


@dataclass(frozen=True)
class ContextCoder:
    """The context-adaptive coder, by rows of the layer's matrix or by columns."""

    transposed: bool

    def encode(self, levels: Levels, clusters: int, negatives: int) -> bytes:
        return search.encode(levels, clusters, negatives, self.transposed)

    def decode(self, blob: bytes, shape: Sequence[int], clusters: int, negatives: int) -> Levels:
        rows, columns = search.matrix_shape(shape)
        if self.transposed:
            matrix = search.decode(blob, columns, rows, clusters, negatives).T
        else:
            matrix = search.decode(blob, rows, columns, clusters, negatives)
        return matrix.reshape(tuple(shape))


@dataclass(frozen=True)
class GapCoder:
    """Gaps between survivors and their clusters, as two streams of symbols."""

    symbols: SymbolCoder

    def encode(self, levels: Levels, clusters: int, negatives: int) -> bytes:
        return gaps.encode(levels.ravel(), clusters, self.symbols)

    def decode(self, blob: bytes, shape: Sequence[int], clusters: int, negatives: int) -> Levels:
        flat = gaps.decode(blob, math.prod(shape), clusters, self.symbols)
        return flat.reshape(tuple(shape))


@dataclass(frozen=True)
class GroupCoder:
    """Which of a few consecutive inputs survive, and their clusters, as two streams of symbols."""

    def encode(self, levels: Levels, clusters: int, negatives: int) -> bytes:
        return groups.encode(levels, clusters)

    def decode(self, blob: bytes, shape: Sequence[int], clusters: int, negatives: int) -> Levels:
        return groups.decode(blob, shape, clusters)
