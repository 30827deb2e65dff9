"""Matrix products that are not stored yet, because what follows may become part of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.hardware.tpu.arithmetic import (
    Epilogue,
    Floats,
    Grid,
    Ints,
    function_table,
    requantize,
    sigmoid,
    to_fixed_point,
)
from trainer.hardware.tpu.network import Rows, Value, Window
from trainer.hardware.tpu.quantized import QuantizedLayer

_TABLES: dict[str, Callable[[Floats], Floats]] = {"sigmoid": sigmoid, "tanh": np.tanh}


@dataclass(frozen=True)
class Sums:
    """The 32-bit sums of a matrix product, and what is done to them before they are stored."""

    name: str
    source: Rows
    shape: tuple[int, ...]
    """Of the result, channels last."""
    weights: NDArray[np.int8]
    """[groups, outputs of a group, kernel positions, inputs of a group]."""
    scales: Floats
    """[channels]: what a sum of 1 stands for."""
    bias: Floats
    """[channels]: real values."""
    zero_sums: Ints
    """[channels]: what the input's zero point adds to the sums."""
    window: Window | None = None
    operand: Value | None = None
    """What is added to the result."""
    function: str = ""
    """relu, sigmoid or tanh; empty for none."""
    grid: Grid | None = None
    """Of the result, if it is known already."""

    @property
    def plain(self) -> bool:
        """Whether nothing but the bias is added."""
        return self.operand is None and not self.function

    def epilogue(self, grid: Grid) -> Epilogue:
        """How sums are converted to results on a grid."""
        operand = None if self.operand is None else self.operand.grid
        if self.function not in _TABLES:
            relu = self.function == "relu"
            return requantize(self.scales, self.bias, self.zero_sums, grid, relu, operand)
        table = function_table(_TABLES[self.function], grid, 0, grid.max_integer)
        return replace(
            to_fixed_point(self.scales, self.bias, self.zero_sums, operand),
            tables=table[None],
            table_of=np.zeros(len(self.scales), np.int64),
        )


def linear_sums(name: str, layer: QuantizedLayer, source: Value) -> Sums:
    """The sums of a Linear, whose input may be flattened images [N, H, W, C]."""
    outputs = len(layer.weights)
    weights = layer.weights
    if len(source.shape) == 4:
        # The model flattens [N, C, H, W].
        samples, height, width, channels = source.shape
        ordered = weights.reshape(outputs, channels, height, width).transpose(0, 2, 3, 1)
        weights = ordered.reshape(outputs, -1)
        source = replace(source, shape=(samples, height * width * channels))
    shape = (*source.shape[:-1], outputs)
    return _sums(name, layer, source, shape, weights[None, :, None])


def convolution_sums(
    name: str, layer: QuantizedLayer, source: Value, window: Window, groups: int
) -> Sums:
    """The sums of a convolution of images [N, H, W, C]."""
    outputs, inputs = layer.weights.shape[:2]
    grouped = layer.weights.reshape(groups, outputs // groups, inputs, -1)
    shape = (source.shape[0], *window.output_size(*source.shape[1:3]), outputs)
    sums = _sums(name, layer, source, shape, grouped.transpose(0, 1, 3, 2))
    return replace(sums, window=window)


def _sums(
    name: str,
    layer: QuantizedLayer,
    source: Value,
    shape: tuple[int, ...],
    weights: NDArray[np.int8],
) -> Sums:
    return Sums(
        name=name,
        source=Rows(source),
        shape=shape,
        weights=np.ascontiguousarray(weights),
        scales=layer.sum_scales(source.grid),
        bias=layer.bias,
        zero_sums=layer.zero_sums(source.grid),
    )


def select_pixels(name: str, images: Value, step: tuple[int, int]) -> Sums:
    """Every few rows and columns of images, by a convolution with the identity matrix."""
    channels, grid = images.channels, images.grid
    window = Window((1, 1), step, (0, 0), grid.zero_point)
    return Sums(
        name=name,
        source=Rows(images),
        shape=(images.shape[0], *window.output_size(*images.shape[1:3]), channels),
        weights=np.eye(channels, dtype=np.int8)[None, :, None],
        scales=np.full(channels, grid.scale),
        bias=np.zeros(channels),
        zero_sums=np.full(channels, grid.zero_point),
        window=window,
        grid=grid,
    )


def add_zero_channels(sums: Sums, before: int, after: int) -> Sums:
    """The same sums between channels of zeros, which are outputs without weights.

    Args:
        sums: Of one group, without an operand or a function.
        before, after: The number of channels.
    """
    around = (before, after)
    return replace(
        sums,
        shape=(*sums.shape[:-1], sums.shape[-1] + before + after),
        weights=np.pad(sums.weights, ((0, 0), around, (0, 0), (0, 0))),
        scales=np.pad(sums.scales, around, mode="edge"),
        bias=np.pad(sums.bias, around),
        zero_sums=np.pad(sums.zero_sums, around),
    )
