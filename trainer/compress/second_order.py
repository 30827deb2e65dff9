"""Rounding and pruning that take into account which inputs a layer gets.

One column of a matrix after the other gets its final value, and the columns that are still to come
are changed to compensate for the error as far as the inputs are correlated (optimal brain
surgeon). Frantar et al., GPTQ, ICLR 2023, arXiv:2210.17323; Frantar & Alistarh, SparseGPT, ICML
2023, arXiv:2301.00774. A weight that is zero stays zero.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from trainer.compress.masks import largest, largest_in_groups
from trainer.compress.rate import cheapest, magnitude_bits, round_alone
from trainer.compress.trellis import cheapest_path, level_bits
from trainer.errors import Diverged

_BLOCK = 128  # columns whose errors are passed on at once
_DAMPING = 0.01  # of the mean of the diagonal, added to it


@torch.no_grad()
def round_second_order(weight: Tensor, gram: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Round a matrix so that its products with typical inputs change least.

    Columns with the largest inputs come first; each is rounded to the nearest value of its grid.

    Args:
        weight: [rows, columns], float32.
        gram: Sum of x x^T over the inputs x, [columns, columns], float64.
        scale: Step of the grid of each row, [rows, 1], or of all, [].
        limit: Largest integer of the grid, which is symmetric.

    Returns:
        Values on the grid, [rows, columns], float32.
    """

    def nearest(left: Tensor, column: int, spread: Tensor) -> Tensor:
        value = left[:, column : column + 1]
        return (value / scale).round_().clamp_(-limit, limit).mul_(scale)

    order = gram.diagonal().argsort(descending=True, stable=True)
    return _replace_columns(weight, gram, order, _BLOCK, nearest)


@torch.no_grad()
def round_by_rate(
    weight: Tensor, gram: Tensor, step: Tensor, rate: float, trellis: bool = False
) -> Tensor:
    """Round a matrix to a grid so that its products with typical inputs change least for its bits.

    As `round_second_order`, but each weight becomes the integer with the smallest sum of the error
    that it causes in the products and of `rate` times its bits (trainer.compress.rate). Conzelmann
    & Bamler, CERWU, arXiv:2505.18758.

    Args:
        weight: [rows, columns], float32.
        gram: As for `round_second_order`.
        step: Of the grid, [].
        rate: What a bit costs: this times the mean error of a weight that is wrong by a step.
        trellis: Whether each column is a path of a trellis (trainer.compress.trellis), and its
            weights are multiples of half a step.

    Returns:
        Values on the grid, [rows, columns], float32.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    alive = (weight != 0)[:, order]
    scaled = weight / step
    bits = level_bits(scaled, rate) if trellis else magnitude_bits(round_alone(scaled, rate))

    def by_rate(left: Tensor, column: int, spread: Tensor) -> Tensor:
        mean = spread.pow(-2).mean()  # of the errors in the products by an error of 1 in a weight
        price = rate * mean * spread[column].square()
        value = left[:, column : column + 1] / step
        if trellis:
            return cheapest_path(value, alive[:, column : column + 1], bits, price) * step
        return cheapest(value, bits, price) * step

    return _replace_columns(weight, gram, order, _BLOCK, by_rate)


@torch.no_grad()
def prune_second_order(
    weight: Tensor, gram: Tensor, keep: int, pattern: tuple[int, int] | None, kernel: int = 1
) -> Tensor:
    """Set weights to zero and change the others so that products with typical inputs change least.

    Each block of columns loses the weights whose removal costs least, w^2 / d^2, where 1 / d^2 is
    the curvature that remains when the columns before are done (SparseGPT, section 3.2).

    Args:
        weight: [rows, columns], float32.
        gram: As for `round_second_order`.
        keep: Number of weights that stay.
        pattern: (n, m): instead, n of each m consecutive inputs of an output stay.
        kernel: Number of positions in the kernel of a convolution, the last part of a column.

    Returns:
        [rows, columns], float32.
    """
    columns = weight.shape[1]
    size = _BLOCK if pattern is None else pattern[1]  # columns that are decided on at once
    order = torch.arange(columns, device=weight.device)
    if pattern is not None:
        order = order.view(-1, kernel).t().flatten()  # inputs of one position side by side
    alive = (weight != 0)[:, order]
    mask = torch.empty(0)

    def zero_or_same(left: Tensor, column: int, spread: Tensor) -> Tensor:
        nonlocal mask
        if column % size == 0:
            now = slice(column, column + size)
            costs = (left[:, now] / spread[now]).square() * alive[:, now]
            if pattern is None:
                end = min(column + size, columns)
                mask = largest(costs, keep * end // columns - keep * column // columns)
            else:
                mask = largest_in_groups(costs, *pattern)
        place = column % size
        return left[:, column : column + 1] * mask[:, place : place + 1]

    return _replace_columns(weight, gram, order, size * max(1, _BLOCK // size), zero_or_same)


def inverse_factor(matrix: Tensor) -> Tensor:
    """The upper triangular U, with a positive diagonal, for which U^T U is the inverse of a matrix.

    With rows and columns in reverse order, the matrix is L L^T (Cholesky), and U is L^-1. This
    takes 0.6 of the time of a factorization of the inverse.

    Args:
        matrix: Symmetric and positive definite, [n, n].
    """
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    return _inverse_of_lower(lower).flip(0, 1)


def _inverse_of_lower(matrix: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, [n, n], mostly by products of its blocks."""
    size = len(matrix)
    if size <= 2 * _BLOCK:
        one = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return cast(Tensor, torch.linalg.solve_triangular(matrix, one, upper=False))
    half = size // 2
    result = torch.zeros_like(matrix)
    first = _inverse_of_lower(matrix[:half, :half])
    last = _inverse_of_lower(matrix[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ matrix[half:, :half]) @ first
    return result


def _replace_columns(
    weight: Tensor,
    gram: Tensor,
    order: Tensor,
    block: int,
    replace: Callable[[Tensor, int, Tensor], Tensor],
) -> Tensor:
    """Give one column after the other its final value, and change those that follow.

    Args:
        weight: [rows, columns].
        gram: [columns, columns].
        order: Of the columns.
        block: Number of columns whose errors are passed on at once.
        replace: Called with the matrix in this order, in which this column and the rest of its
            block are up to date; the column; and d of each column (see `prune_second_order`),
            [columns]. Returns the column's final values, [rows, 1].

    Raises:
        Diverged: The products of the inputs are Inf or NaN.
    """
    matrix = gram[order][:, order]  # a copy
    if not bool(matrix.isfinite().all()):
        raise Diverged(
            "the inputs of a layer, or their squares, are Inf or NaN: the training before "
            "diverged, or the data contain such values"
        )
    diagonal = matrix.diagonal()
    diagonal.clamp_min_(0)  # an input that is always the same is correlated with nothing
    diagonal += _DAMPING * diagonal.mean() if diagonal.any() else 1.0
    factor = inverse_factor(matrix).float()
    left = weight[:, order].clone()
    final = torch.empty_like(left)
    alive = left != 0
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            value = left[:, column : column + 1]
            new = replace(left, column, factor.diagonal())
            new *= alive[:, column : column + 1]
            final[:, column : column + 1] = new
            error = (value - new) / factor[column, column]
            left[:, column + 1 : end] -= error * factor[column, column + 1 : end]
            errors[:, column - start : column - start + 1] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    result = torch.empty_like(final)
    result[:, order] = final
    return result
