"""Integers that represent real numbers, and the TPU's conversion of sums to 8 bits.

An activation q stands for scale * (q - zero_point), as in Jacob et al., CVPR 2018,
arXiv:1712.05877. Sums are brought to the grid of the next layer by a multiplication with a 30-bit
integer and a shift. The TPU's paper does not describe that step; it is an assumption here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MULTIPLIER_BITS = 30
_MAX_SHIFT = 52  # so that the largest addend, shifted, is beyond every 8-bit grid
_MAX_ADDEND = 1 << 60

FIXED_POINT = 2.0**-10
"""Step of the 16-bit numbers that tables of functions take: they reach from -32 to 32."""

UNIT = 2.0**-15
"""Step of the 16-bit numbers between -1 and 1 that the gates of an LSTM are."""


@dataclass(frozen=True)
class Grid:
    """An affine grid of unsigned integers: q represents scale * (q - zero_point)."""

    scale: float
    zero_point: int
    max_integer: int = 255

    @classmethod
    def spanning(cls, low: float, high: float) -> "Grid":
        """The 8-bit grid over a range, which is extended to include 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-12)
        return cls(scale, min(max(round(-low / scale), 0), 255))

    def quantize(self, values: Tensor) -> NDArray[np.uint8]:
        """The integers of float32 values, rounded as torch.fake_quantize_per_tensor_affine does."""
        inverse = torch.tensor(1.0) / torch.tensor(self.scale)
        integers = (values.float() * inverse).round() + self.zero_point
        quantized: NDArray[np.uint8] = (
            integers.clamp(0, self.max_integer).to(torch.uint8).cpu().numpy()
        )
        return quantized

    def dequantize(self, integers: NDArray[np.integer]) -> Tensor:
        """The float32 numbers that integers represent."""
        return torch.from_numpy(integers.astype(np.float32) - self.zero_point) * self.scale


PLAIN = Grid(1.0, 0)
"""The grid of integers that stand for themselves."""


@dataclass(frozen=True)
class Epilogue:
    """From sums of products to results.

        clip((sum * multiplier + operand * operand_multiplier + addend) >> shift, low, high)

    The addend contains the bias, the zero points and one half for rounding. If there are tables,
    the result is a 16-bit index into the table of its channel.
    """

    multiplier: Ints  # [channels]
    addend: Ints  # [channels]
    shift: int
    low: int
    high: int
    operand_multiplier: int = 0
    tables: NDArray[np.integer] | None = None  # [tables, 2^16], indexed by the result + 2^15
    table_of: Ints | None = None  # [channels]: the table of each channel

    def apply(self, sums: Ints, operand: Ints | None, channels: slice) -> NDArray[np.integer]:
        """Results of sums [rows, channels] and of an operand of the same shape, if one is added."""
        results: NDArray[np.integer] = sums * self.multiplier[channels] + self.addend[channels]
        if operand is not None:
            results += operand * self.operand_multiplier
        results = np.clip(results >> self.shift, self.low, self.high)
        if self.tables is None or self.table_of is None:
            return results
        looked_up: NDArray[np.integer] = self.tables[self.table_of[channels], results + (1 << 15)]
        return looked_up


def requantize(
    scales: Floats,
    bias: Floats,
    zero_sums: Ints,
    output: Grid,
    relu: bool = False,
    operand: Grid | None = None,
) -> Epilogue:
    """The epilogue that brings sums of products to a grid.

    Args:
        scales: [channels], what a sum of 1 stands for.
        bias: [channels], added to the real value.
        zero_sums: [channels], what sums contain because zero is not the integer 0: the input's zero
            point times the sum of the weights.
        output: The grid of the results.
        relu: Whether negative results become zero.
        operand: The grid of the 8-bit value that is added; None if none is.
    """
    low = output.zero_point if relu else 0
    return _epilogue(scales, bias, zero_sums, output, low, output.max_integer, operand)


def to_fixed_point(
    scales: Floats, bias: Floats, zero_sums: Ints, operand: Grid | None = None
) -> Epilogue:
    """The epilogue that brings sums to 16-bit fixed point. Arguments as for `requantize`."""
    grid = Grid(FIXED_POINT, 0)
    return _epilogue(scales, bias, zero_sums, grid, -(1 << 15), (1 << 15) - 1, operand)


def raw_sums(zero_sums: Ints) -> Epilogue:
    """The epilogue that leaves sums as 32-bit integers, without what zero points add."""
    ones = np.ones_like(zero_sums)
    return Epilogue(ones, -zero_sums, 0, -(1 << 31), (1 << 31) - 1)


def _epilogue(
    scales: Floats,
    bias: Floats,
    zero_sums: Ints,
    output: Grid,
    low: int,
    high: int,
    operand: Grid | None,
) -> Epilogue:
    ratios = scales / output.scale
    operand_ratio = operand.scale / output.scale if operand else 0.0
    largest = max(float(ratios.max()), operand_ratio)
    shift = min(max(_MULTIPLIER_BITS - 1 - math.floor(math.log2(largest)), 0), _MAX_SHIFT)
    multiplier = np.rint(ratios * 2.0**shift).astype(np.int64)
    operand_multiplier = round(operand_ratio * 2.0**shift)
    constant = np.rint((bias / output.scale + output.zero_point) * 2.0**shift)
    addend = np.clip(constant, -_MAX_ADDEND, _MAX_ADDEND).astype(np.int64)
    addend += ((1 << shift) >> 1) - multiplier * zero_sums
    if operand:
        addend -= operand_multiplier * operand.zero_point
    return Epilogue(multiplier, addend, shift, low, high, operand_multiplier)


def function_table(
    function: Callable[[Floats], Floats], output: Grid, low: int, high: int
) -> NDArray[np.int32]:
    """[2^16]: a function of each 16-bit fixed-point number, as an integer of a grid.

    Args:
        function: Of an array, element by element.
        output: The grid of the results.
        low, high: Limits of the integers.
    """
    inputs = np.arange(-(1 << 15), 1 << 15).astype(np.float64) * FIXED_POINT
    integers = np.rint(function(inputs) / output.scale) + output.zero_point
    table: NDArray[np.int32] = np.clip(integers, low, high).astype(np.int32)
    return table


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    result: Floats = 1 / (1 + np.exp(-x))
    return result
