"""Labels of the positions along each dimension of the tensors of a forward pass.

Operators merge labels (`trainer.compress.dependencies.operators`): what has the same label in the
end is removed together, or not at all.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Labels = NDArray[np.int64]  # one per position of a dimension

FIXED = 0  # the label of what must stay
MIN_SIZE = 2  # of a dimension from which something can be removed


def fixed(size: int) -> Labels:
    """Labels of a dimension that must stay."""
    return np.full(size, FIXED, np.int64)


class LabelTable:
    """The labels of all tensors of a forward pass, and which of them were merged."""

    def __init__(self) -> None:
        self._parent = [FIXED]  # of each label: the forest of a union-find structure
        # Labels of each dimension by the id of a tensor, which is kept so that no other gets it.
        self._labels: dict[int, tuple[Tensor, list[Labels]]] = {}
        # By the id of a tensor that may remain unused, such as the weights of attention.
        self._if_used: dict[int, list[Labels]] = {}

    def new(self, size: int) -> Labels:
        """New labels for a dimension of a parameter."""
        if size < MIN_SIZE:
            return fixed(size)
        first = len(self._parent)
        self._parent.extend(range(first, first + size))
        return np.arange(first, first + size)

    def of(self, value: Any) -> list[Labels]:
        """Labels of each dimension; those of an unknown tensor are fixed."""
        if not isinstance(value, Tensor):
            return []
        known = self._labels.get(id(value))
        if known is not None and [len(labels) for labels in known[1]] == list(value.shape):
            return known[1]
        return [fixed(size) for size in value.shape]

    def set(self, value: Any, labels: Sequence[Labels]) -> None:
        """Store the labels of a tensor's dimensions."""
        if isinstance(value, Tensor):
            assert [len(found) for found in labels] == list(value.shape)
            self._labels[id(value)] = (value, list(labels))

    def merge(self, one: Labels, other: Labels) -> None:
        """The n-th positions of two dimensions are removed together, for each n.

        If their numbers differ, all positions must stay.
        """
        if len(one) != len(other):
            one, other = np.append(one, other), fixed(len(one) + len(other))
        if np.array_equal(one, other):
            return
        for left, right in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self._root(left), self._root(right)
            if a != b:
                self._parent[max(a, b)] = min(a, b)  # so that FIXED stays a root

    def fix(self, labels: Labels) -> None:
        """All positions of a dimension must stay."""
        self.merge(labels, fixed(len(labels)))

    def fix_tensor(self, value: Any) -> None:
        """All positions of all dimensions of a tensor must stay."""
        self.use(value)
        for labels in self.of(value):
            self.fix(labels)

    def fix_if_used(self, value: Tensor, labels: Sequence[Labels]) -> None:
        """If an operator reads `value`, the dimensions with these labels must stay."""
        self._if_used[id(value)] = list(labels)

    def use(self, value: Any) -> None:
        """An operator reads `value`."""
        for labels in self._if_used.pop(id(value), ()):
            self.fix(labels)

    def roots(self, labels: Labels) -> Labels:
        """For each label the one that represents all labels merged with it."""
        return np.array([self._root(label) for label in labels.tolist()], np.int64)

    def is_free(self, labels: Labels) -> bool:
        """Whether a dimension has a position that may be removed."""
        return bool(self.roots(labels).any())

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label
