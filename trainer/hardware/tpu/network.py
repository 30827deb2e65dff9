"""An integer network: what the TPU executes, as layers on 8-bit tensors.

Tensors have their channels last, as the unified buffer holds them: images are [N, H, W, C]. A row
is all channels at one position of one sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.hardware.tpu.arithmetic import PLAIN, Epilogue, Grid, Ints


@dataclass(frozen=True)
class Value:
    """A tensor in the unified buffer."""

    name: str
    shape: tuple[int, ...]  # channels last
    dtype: np.dtype[np.generic]
    grid: Grid = PLAIN  # what its integers stand for

    @property
    def channels(self) -> int:
        """Values of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Positions of all samples."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.channels * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Rows:
    """Rows of a value: every `step`-th one, beginning with `first`."""

    value: Value
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class Window:
    """How the kernel of a convolution or a pooling moves over images [N, H, W, C]."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    padding_value: int  # the integer that stands for what lies outside of the image
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = zip(
            (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        first, second = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in sizes
        )
        return first, second

    def patches(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[N, output height, output width, kernel height, kernel width, C]: a view."""
        (top, left), (step_y, step_x) = self.padding, self.dilation
        padded = np.pad(
            images,
            ((0, 0), (top, top), (left, left), (0, 0)),
            constant_values=self.padding_value,
        )
        height, width = self.output_size(*images.shape[1:3])
        n, y, x, c = padded.strides
        return np.lib.stride_tricks.as_strided(
            padded,
            (len(images), height, width, *self.kernel, images.shape[3]),
            (n, y * self.stride[0], x * self.stride[1], y * step_y, x * step_x, c),
            writeable=False,
        )


@dataclass(frozen=True)
class Product:
    """A linear layer or a convolution, and what the activation unit applies to its results."""

    name: str
    source: Rows
    destination: Rows
    rows: int
    """Rows of the result."""
    weights: NDArray[np.int8]
    """[groups, outputs of a group, kernel positions, inputs of a group]."""
    epilogue: Epilogue
    operand: Rows | None = None
    """What is added to the result, in a residual connection for instance."""
    window: Window | None = None
    """Of a convolution; None: a row of the source makes a row of the result."""
    activation_bytes: int = 1
    """Of the operands of the matrix unit: with 2, it computes at half its speed."""

    @property
    def groups(self) -> int:
        """Independent matrices."""
        return int(self.weights.shape[0])

    @property
    def outputs(self) -> int:
        """Columns of each group's matrix."""
        return int(self.weights.shape[1])

    @property
    def depth(self) -> int:
        """Rows of each group's matrix: kernel positions times inputs."""
        return int(self.weights.shape[2] * self.weights.shape[3])

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.rows * self.weights.size


@dataclass(frozen=True)
class Pool:
    """Maximum or average over windows, from the unified buffer to the unified buffer."""

    name: str
    source: Value
    destination: Value
    window: Window
    low: int
    """Smaller results become this: the zero point after a ReLU, else 0."""
    average: Epilogue | None
    """For the sum over a window, with one channel; None: the maximum is taken."""


@dataclass(frozen=True)
class CellUpdate:
    """One step of an LSTM's cell: c = f c + i g and h = o tanh(c), on [N, hidden]."""

    name: str
    gates: Value  # [N, 4 hidden], i f g o, 16 bits, in steps of arithmetic.UNIT
    cell: Value  # [N, hidden], 32 bits, in steps of 2^-16
    destination: Rows  # h
    tanh: NDArray[np.int32]  # [2^16], of 16-bit fixed-point numbers, in steps of arithmetic.UNIT
    epilogue: Epilogue  # from o tanh(c), in steps of arithmetic.UNIT^2, to the grid of h


Layer = Product | Pool | CellUpdate


@dataclass(frozen=True)
class Network:
    """Layers in the order of execution, and the operations of the host before and after them."""

    layers: Sequence[Layer]
    input: Value
    output: Value
    quantize: Callable[[Tensor], NDArray[np.uint8]]
    """From samples to the integers of `input`."""
    dequantize: Callable[[NDArray[np.integer]], Tensor]
    """From the integers of `output` to what the model returns."""
    initial: dict[str, int] = field(default_factory=dict)
    """Values that are filled with an integer before the layers are executed."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the matrix products."""
        return sum(layer.macs for layer in self.layers if isinstance(layer, Product))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, without padding."""
        sizes = {id(x.weights): x.weights.size for x in self.layers if isinstance(x, Product)}
        return sum(sizes.values())


def update_cell(
    layer: CellUpdate, gates: Ints, cell: Ints
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The new cell [N, hidden] and the new h of a step, from the gates [N, 4 hidden]."""
    i, f, g, o = np.split(gates, 4, axis=1)
    # Steps of 2^-15 * 2^-16 and 2^-30 both become 2^-16, rounded.
    new = ((f * cell + (1 << 14)) >> 15) + ((i * g + (1 << 13)) >> 14)
    new = np.clip(new, -(1 << 31), (1 << 31) - 1)
    index = np.clip((new + (1 << 5)) >> 6, -(1 << 15), (1 << 15) - 1)  # steps of 2^-10
    hidden = o * layer.tanh[index + (1 << 15)].astype(np.int64)
    return new, layer.epilogue.apply(hidden, None, slice(None))
