"""Gradients as products of two narrow matrices.

PowerSGD: Vogels et al., Practical Low-Rank Gradient Compression for Distributed Optimization,
NeurIPS 2019 (arXiv:1905.13727). torch.distributed has it as a hook of DDP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.engine.lossy.base import Part

MIN_GAIN = 2  # a matrix is sent whole unless its two factors have so many times fewer values


@dataclass
class _Matrix:
    """A gradient [rows, columns] within the flat tensor."""

    start: int
    rows: int
    columns: int
    right: Tensor  # the factor [columns, rank] of the last step, from which the next one starts

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, values: Tensor) -> Tensor:
        """This part of a flat tensor, as a matrix."""
        return values[self.start : self.stop].view(self.rows, self.columns)


class PowerSGD:
    """See `Lossy`. A matrix M [n, m] is replaced by P Q^T, with P [n, rank] and Q [m, rank].

    One step of power iteration, from the Q of the last step ("warm start"): P is the mean of M Q,
    made orthonormal, and Q then is the mean of M^T P. Of a tensor with more dimensions, the rows
    are its first one. Vectors, and matrices too small to gain, are sent whole: a step takes two
    all-reduces. All ranks compute the same factors, so the error of a rank is M - P Q^T.

    Args:
        part: What is averaged.
        rank: Columns of the factors.
    """

    def __init__(self, part: Part, rank: int) -> None:
        self._all_reduce = part.all_reduce
        self._matrices: list[_Matrix] = []
        self._whole: list[slice] = []  # the rest of the flat tensor
        start = 0
        for shape in part.shapes:
            count = shape.numel()
            rows = shape[0] if len(shape) > 1 else 1
            columns = count // max(1, rows)
            if (rows + columns) * rank * MIN_GAIN < count:
                generator = torch.Generator().manual_seed(len(self._matrices))  # as on all ranks
                right = torch.randn(columns, rank, generator=generator)
                self._matrices.append(_Matrix(start, rows, columns, right))
            else:
                self._whole.append(slice(start, start + count))
            start += count

    @property
    def sent_bytes(self) -> int:
        return self._all_reduce.sent_bytes

    def mean_(self, values: Tensor, error: Tensor | None) -> None:
        matrices = self._matrices
        for matrix in matrices:
            matrix.right = matrix.right.to(values.device)
        lefts = [matrix.of(values) @ matrix.right for matrix in matrices]
        whole = [values[part] for part in self._whole]
        self._average([*lefts, *whole])
        lefts = [torch.linalg.qr(left).Q for left in lefts]
        rights = [m.of(values).T @ left for m, left in zip(matrices, lefts, strict=True)]
        self._average(rights)
        if error is not None:
            error.copy_(values)
            for part in self._whole:
                error[part] = 0
        for matrix, left, right in zip(matrices, lefts, rights, strict=True):
            torch.mm(left, right.T, out=matrix.of(values))
            if error is not None:
                matrix.of(error).sub_(matrix.of(values))
            # A factor that is not finite would make all later steps so.
            matrix.right = torch.where(right.isfinite().all(), right, matrix.right)

    def state_dict(self) -> dict[str, Any]:
        return {"rights": [matrix.right for matrix in self._matrices]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for matrix, right in zip(self._matrices, state["rights"], strict=True):
            matrix.right = right

    def _average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over the ranks."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._all_reduce.mean_(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, parts, strict=True):
            tensor.copy_(mean.view(tensor.shape))
