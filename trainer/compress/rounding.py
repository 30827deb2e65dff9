"""Rounding to a grid that takes into account which inputs a layer gets."""

import torch
from torch import Tensor

_BLOCK = 128  # columns whose errors are passed on at once
_DAMPING = 0.01  # of the mean of the diagonal, added to it


@torch.no_grad()
def round_second_order(weight: Tensor, gram: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Round a matrix so that its products with typical inputs change least.

    One column after the other is rounded to the nearest value of its grid, and the columns that are
    still to come are changed so as to make up for the error as far as the inputs are correlated.
    Columns with the largest inputs come first. A weight that is zero stays zero. Frantar et al.,
    GPTQ, ICLR 2023, arXiv:2210.17323; with the zeros of a pruned matrix: Frantar & Alistarh,
    SparseGPT, ICML 2023, arXiv:2301.00774.

    Args:
        weight: [rows, columns], float32.
        gram: Sum of x x^T over the inputs x, [columns, columns], float64.
        scale: Step of the grid of each row, [rows, 1], or of all, [].
        limit: Largest integer of the grid, which is symmetric.

    Returns:
        Values on the grid, [rows, columns], float32.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    matrix = gram[order][:, order].clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal <= 0] = 1.0  # an input that is always the same is correlated with nothing
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight[:, order].clone()
    rounded = torch.empty_like(left)
    alive = left != 0
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            value = left[:, column : column + 1]
            nearest = (value / scale).round_().clamp_(-limit, limit).mul_(scale)
            nearest *= alive[:, column : column + 1]
            rounded[:, column : column + 1] = nearest
            error = (value - nearest) / factor[column, column]
            left[:, column + 1 : end] -= error * factor[column, column + 1 : end]
            errors[:, column - start : column - start + 1] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result
