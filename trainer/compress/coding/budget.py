"""How much CPU time the search for the smallest coding may take, estimated without a clock."""

import math

import numpy as np
from numpy.typing import NDArray

# Nanoseconds of the context coder on an AMD EPYC: per position, and per binary decision about the
# cluster of a survivor.
_POSITION_NS, _DECISION_NS = 130, 90


class Budget:
    """Estimated CPU time that may still be spent, shared by several tensors.

    Costs are estimated from numbers of positions and decisions and not measured, so that the same
    tensors become the same bytes on every machine.
    """

    def __init__(self, seconds: float | None = None, elements: int = 0) -> None:
        """
        Args:
            seconds: The whole budget; None: no limit.
            elements: Number of elements of all tensors together.
        """
        self._seconds = math.inf if seconds is None else seconds
        self._elements = elements  # of the tensors to come
        self._reserved = 0.0  # seconds for the tensors to come

    def next_tensor(self, elements: int) -> None:
        """Give the next tensor its share, in proportion to its number of elements.

        What a tensor does not spend is left for those after it.
        """
        if self._seconds < math.inf:
            later = self._elements - elements
            self._reserved = self._seconds * later / max(1, self._elements)
            self._elements = later

    def affords(self, seconds: float) -> bool:
        """Whether the current tensor may spend so much."""
        return seconds <= self._seconds - self._reserved

    def spend(self, seconds: float) -> None:
        """Subtract what a tensor spends."""
        self._seconds -= seconds


def context_seconds(levels: NDArray[np.uint16], clusters: int, negatives: int) -> float:
    """Estimate the CPU time in which the context coder encodes `levels` once.

    Args:
        levels: Integers from 0 to `clusters`, of any shape.
        clusters: Number of clusters.
        negatives: How many of them are below zero.
    """
    survivors = np.bincount(levels.ravel(), minlength=clusters + 1)[1:]
    decisions: NDArray[np.float64] = np.zeros(clusters)
    if clusters > 1:
        cluster = np.arange(1, clusters + 1)
        magnitude = np.where(cluster > negatives, cluster - negatives, negatives + 1 - cluster)
        # The sign, one decision for each magnitude up to 16, then four for each doubling.
        decisions = 2 + np.minimum(magnitude, 16) + 4 * np.log2(np.maximum(magnitude / 16, 1))
    return float(levels.size * _POSITION_NS + survivors @ decisions * _DECISION_NS) / 1e9
