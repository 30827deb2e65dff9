"""How many bits the coded file takes for a weight on a uniform grid, as training sees it.

The context coder (trainer.compress.coding.context) learns how full each row, column and kernel of a
layer is, and how large its integers are. Here the same is counted over the whole layer: the
probability that a weight is not zero is that of the layer times how much fuller than the layer its
row, its column and its kernel are. So a weight alone in its row costs many bits, and one in a full
row few, which empties rows and columns.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import Diverged

# Survivors of average fullness that are assumed besides those counted: in a row or column; in a
# kernel, which is too small to tell chance from structure; and among magnitudes.
_PRIOR, _KERNEL_PRIOR = 0.5, 2.0
_PASSES = 3  # in which the bits of integers are counted again after rounding by them
_MIN_BITS, _MAX_BITS = 0.25, 24.0  # of a survivor


@dataclass(frozen=True)
class Rate:
    """What integers cost: a survivor of magnitude m takes `survivor` + (m - 1) `magnitude` bits."""

    survivor: Tensor  # bits that a magnitude of 1 takes more than a zero, in the weight's shape
    magnitude: Tensor  # bits of each further unit of magnitude, 0-dim
    total: Tensor  # bits of all integers that were counted, 0-dim


@torch.no_grad()
def rate_of(integers: Tensor) -> Rate:
    """The rate of a layer whose integers are distributed like these.

    Magnitudes are taken to be geometric, signs to be even.

    Args:
        integers: The weight in steps of its grid, whole numbers in any floating type, [out, in,
            ...]; one dimension is a column.
    """
    there = (integers != 0).float()
    rows = there.reshape(len(there), -1) if there.ndim > 1 else there.reshape(-1, 1)
    density = (rows.mean() + _PRIOR / rows.numel()).clamp_max(0.999)
    # One logarithm for each row and each column, and not for each weight.
    odds = _fullness(rows, 1, density).log2() + _fullness(rows, 0, density).log2()
    odds += (density / (1 - density)).log2()
    if there.ndim > 2:
        expected = (odds.exp2() / (1 + odds.exp2())).reshape(len(there), there.shape[1], -1)
        kernels = there.reshape(expected.shape).sum(2, keepdim=True) + _KERNEL_PRIOR
        fuller = (kernels / (expected.sum(2, keepdim=True) + _KERNEL_PRIOR)).log2()
        odds = (odds.reshape(expected.shape) + fuller).reshape(rows.shape)
    count = rows.sum()
    excess = integers.abs().float().sum() - count
    more = (excess + _PRIOR) / (excess + count + 2 * _PRIOR)  # that a magnitude is not the last
    # 1 bit for the sign.
    survivor = (1 - (1 - more).log2() - odds).clamp_(_MIN_BITS, _MAX_BITS)
    magnitude = -more.log2()
    zeros = odds.exp2().log1p().sum() / math.log(2)  # bits of all positions, if they were zeros
    total = (rows * survivor).sum() + zeros + excess * magnitude
    return Rate(survivor.reshape(integers.shape), magnitude, total)


def _fullness(there: Tensor, dim: int, density: Tensor) -> Tensor:
    """How many times fuller than the layer each row (dim=1) or column (dim=0) is; broadcastable."""
    expected = there.shape[dim] * density
    return (there.sum(dim, keepdim=True) + _PRIOR) / (expected + _PRIOR)


_LARGEST_STEP = 65504.0  # that fp16 holds


@torch.no_grad()
def spread_of(weight: Tensor, ratio: float) -> Tensor:
    """The root mean square of the values that are not zero, float64, 0-dim; 1 if there are none.

    Args:
        weight: Any shape.
        ratio: Step of a grid for the weight, in root mean squares.

    Raises:
        Diverged: A value is Inf or NaN, or the step is larger than fp16 holds, in which the file
            stores it.
    """
    there = weight[weight != 0]
    if not bool(there.isfinite().all()):
        raise Diverged("weights are Inf or NaN: the training before the phase diverged")
    # In fp32, squares of weights below 1e-23 would be zero.
    spread = there.double().square().mean().sqrt() if len(there) else there.double().new_ones(())
    if not ratio * float(spread) <= _LARGEST_STEP:
        raise Diverged(
            f"weights reach {float(there.abs().max()):.2g}, and a file holds steps of a grid up to "
            f"{_LARGEST_STEP:,.0f}: the training before the phase diverged"
        )
    return spread


def magnitude_bits(integers: Tensor, largest: int = 0) -> Tensor:
    """The bits of each magnitude with its sign, by how often it occurs.

    Args:
        integers: Whole numbers in any type and shape.
        largest: Magnitude up to which there are bits, if these integers are smaller.

    Returns:
        float32 [1 + the largest magnitude].
    """
    sizes = integers.abs().long().flatten()
    counts = torch.bincount(sizes, minlength=1 + largest).double() + _PRIOR
    bits = -(counts / counts.sum()).log2()
    bits[1:] += 1
    return bits.float()


def round_alone(scaled: Tensor, rate: Tensor | float) -> Tensor:
    """The integers with few bits near some weights that do not depend on one another.

    Args:
        scaled: Weights in steps of their grid, any shape.
        rate: Squared error in steps that a bit is worth.
    """
    integers = scaled.round()
    for _ in range(_PASSES):
        integers = cheapest(scaled, magnitude_bits(integers), rate)
    return integers


def cheapest(scaled: Tensor, bits: Tensor, price: Tensor | float) -> Tensor:
    """The integers with the smallest sum of squared error and price of their bits.

    The nearest integer, the next one towards zero and zero are compared.

    Args:
        scaled: Weights in steps of their grid, any shape.
        bits: Of each magnitude (`magnitude_bits`); larger ones are not used.
        price: Squared error in steps that a bit is worth, broadcast to `scaled`.
    """
    best = scaled.round().clamp_(1 - len(bits), len(bits) - 1)
    cost = (scaled - best).square_() + price * bits[best.abs().long()]
    for other in (best - best.sign(), torch.zeros_like(best)):
        less = (scaled - other).square_() + price * bits[other.abs().long()]
        best = torch.where(less < cost, other, best)
        cost = torch.minimum(less, cost)
    return best
