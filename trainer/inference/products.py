"""Ways to compute the product of a layer: compressed, dense, or with 8-bit integers.

A product is an object without state between calls, which can be pickled. It is called with the
layer's inputs and its bias, and returns the layer's outputs.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trainer.compress.quantize import ActivationQuantizer
from trainer.inference.codes import CodeMatrix
from trainer.inference.kernels.llvm import LANES
from trainer.inference.kernels.multiply import (
    convolve,
    multiply_planes,
    to_grid,
)
from trainer.inference.matrix import CompressedMatrix
from trainer.inference.threads import run_parts

_FEW = 4  # samples from which the order of rows computes them together


class Product(Protocol):
    """One way to compute a layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""

    def dense(self) -> Tensor:
        """The weight in float32, in torch's shape."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for its input, both float32."""


@dataclass(frozen=True)
class CompressedLinear:
    """A compressed weight times vectors: [..., inputs] -> [..., outputs]."""

    matrix: CompressedMatrix | CodeMatrix
    threads: int = 1
    scale: Tensor | None = None
    """[outputs], if the codebook has integers."""

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def dense(self) -> Tensor:
        weight = self.matrix.dense()
        return weight if self.scale is None else weight * self.scale[:, None]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        inputs = self.matrix.shape[1]
        if x.shape[-1:] != (inputs,):  # kernels do not check it
            raise RuntimeError(f"an input of {list(x.shape)}: its last dimension must be {inputs}")
        flat = x if x.ndim == 2 else x.reshape(-1, inputs)
        own = None if self.scale is not None else bias
        if (
            isinstance(self.matrix, CompressedMatrix)
            and self.matrix.order == "rows"
            and len(flat) >= _FEW
        ):
            out = self._planes(self.matrix, flat)
            out = out if own is None else out + own
        else:
            out = self._one_by_one(flat, own)
        if self.scale is not None:
            out = out * self.scale if bias is None else torch.addcmul(bias, out, self.scale)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.matrix.shape[0])

    def _one_by_one(self, x: Tensor, bias: Tensor | None) -> Tensor:
        start = self._zeros if bias is None else bias.numpy()
        return torch.from_numpy(self.matrix.multiply(x.contiguous().numpy(), start, self.threads))

    @cached_property
    def _zeros(self) -> NDArray[np.float32]:
        return np.zeros(self.matrix.shape[0], np.float32)

    def _planes(self, m: CompressedMatrix, x: Tensor) -> Tensor:
        """All samples together: a plane holds one input of all samples."""
        samples = _round_up(len(x))
        planes = x.new_zeros(x.shape[1], samples)
        planes[:, : len(x)] = x.t()
        offsets = np.arange(x.shape[1], dtype=np.int32) * np.int32(samples)
        out = x.new_zeros(m.shape[0], samples)
        inputs, outputs = planes.view(-1).numpy(), out.numpy()

        def part(first: int, last: int) -> None:
            multiply_planes(
                m.entries,
                m.pointers,
                m.starts,
                m.bits,
                m.table,
                offsets,
                inputs,
                outputs,
                first,
                last,
            )

        run_parts(part, m.shape[0], self.threads)
        return out[:, : len(x)].t().contiguous()


@dataclass(frozen=True)
class _Plan:
    """Parameters of the convolution kernel for images of one size."""

    size: tuple[int, int]  # of the result
    geometry: tuple[int, ...]
    offsets: NDArray[np.int32]


@dataclass(frozen=True)
class ConvolutionShape:
    """The settings of a Conv1d or Conv2d; those of a Conv1d get a first dimension of 1."""

    channels: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes it
    dilation: tuple[int, int]

    def plan(self, height: int, width: int) -> _Plan:
        """The parameters for images of this size. Raises RuntimeError if the kernel is larger."""
        left, right, top, bottom = self.padding
        (sy, sx), (ky, kx), (dy, dx) = self.stride, self.kernel, self.dilation
        rows, columns = -(-(height + top + bottom) // sy), -(-(width + left + right) // sx)
        channel, y, x = np.ix_(*map(np.arange, (self.channels // self.groups, ky, kx)))
        y, x = y * dy, x * dx
        plane = (channel * sy + y % sy) * sx + x % sx
        offsets = (plane * rows + y // sy) * columns + x // sx
        geometry = (sy, sx, rows, columns, top, left, self.groups)
        flat = np.ascontiguousarray(offsets.reshape(-1), dtype=np.int32)
        return _Plan(self.output_size(height, width), geometry, flat)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Of the result. Raises RuntimeError if the kernel is larger than the images."""
        left, right, top, bottom = self.padding
        (sy, sx), (ky, kx), (dy, dx) = self.stride, self.kernel, self.dilation
        high = (height + top + bottom - dy * (ky - 1) - 1) // sy + 1
        wide = (width + left + right - dx * (kx - 1) - 1) // sx + 1
        if high < 1 or wide < 1:
            raise RuntimeError(f"{height} x {width} are smaller than the kernel, {ky} x {kx}")
        return high, wide


@dataclass(frozen=True)
class CompressedConvolution:
    """A compressed kernel over images [N, C, H, W] or sequences [N, C, L]."""

    matrix: CompressedMatrix  # [outputs, channels / groups * kernel height * kernel width]
    shape: ConvolutionShape
    weight_shape: tuple[int, ...]
    threads: int = 1
    scale: Tensor | None = None
    """[outputs], if the codebook has integers."""

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def dense(self) -> Tensor:
        weight = self.matrix.dense()
        weight = weight if self.scale is None else weight * self.scale[:, None]
        return weight.view(self.weight_shape)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        batched = x.ndim == len(self.weight_shape)
        images = x if batched else x.unsqueeze(0)
        channels = self.shape.channels
        if images.ndim != len(self.weight_shape) or images.shape[1] != channels:
            sizes = "length" if len(self.weight_shape) == 3 else "height, width"
            raise RuntimeError(
                f"an input of {list(x.shape)}: it must be [N, {channels}, {sizes}], or one sample "
                "without N"
            )
        flat = images.ndim == 3
        out = self._images(images.unsqueeze(2) if flat else images, bias)
        out = out.squeeze(2) if flat else out
        return out if batched else out.squeeze(0)

    def _images(self, x: Tensor, bias: Tensor | None) -> Tensor:
        m = self.matrix
        plan = self._plans.get(x.shape[2:])
        if plan is None:
            plan = self._plans[x.shape[2:]] = self.shape.plan(*x.shape[2:])
        inputs = x.contiguous().numpy()
        start = self._zeros if bias is None or self.scale is not None else bias.numpy()
        out = np.empty((len(inputs), m.shape[0], *plan.size), np.float32)

        def part(first: int, last: int) -> None:
            convolve(
                m.entries,
                m.pointers,
                m.starts,
                m.bits,
                m.table,
                plan.offsets,
                plan.geometry,
                inputs,
                start,
                out,
                first,
                last,
            )

        run_parts(part, m.shape[0], self.threads)
        result = torch.from_numpy(out)
        if self.scale is None:
            return result
        scale = self.scale[:, None, None]
        return result * scale if bias is None else torch.addcmul(bias[:, None, None], result, scale)

    @cached_property
    def _plans(self) -> dict[tuple[int, ...], _Plan]:
        """By height and width of the images."""
        return {}

    @cached_property
    def _zeros(self) -> NDArray[np.float32]:
        return np.zeros(self.matrix.shape[0], np.float32)


@dataclass(frozen=True)
class DenseLinear:
    """A dense weight times vectors, by torch."""

    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def dense(self) -> Tensor:
        return self.weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


@dataclass(frozen=True)
class DenseConvolution:
    """A dense kernel, by torch."""

    weight: Tensor
    shape: ConvolutionShape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def dense(self) -> Tensor:
        return self.weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        s, dimensions = self.shape, self.weight.ndim - 2
        left, right, top, bottom = s.padding
        padding = (top, left)[-dimensions:]
        if (left, top) != (right, bottom):
            x, padding = F.pad(x, s.padding[: 2 * dimensions]), (0, 0)[-dimensions:]
        convolve = F.conv1d if dimensions == 1 else F.conv2d
        stride, dilation = s.stride[-dimensions:], s.dilation[-dimensions:]
        out: Tensor = convolve(x, self.weight, bias, stride, padding, dilation, s.groups)
        return out


class Int8:
    """A weight of 8-bit integers times inputs of 8-bit integers, summed up exactly, by oneDNN.

    The computation that `quantize` simulates: weights are on a grid, inputs are rounded to one.
    """

    def __init__(
        self, integers: Tensor, scale: Tensor, quantizer: ActivationQuantizer, shape: Any = None
    ) -> None:
        """
        Args:
            integers: int8, in the shape of the weight.
            scale: Of the whole weight, or of each output.
            quantizer: Of the inputs; it has a range.
            shape: A `ConvolutionShape` for two dimensions without uneven padding; None for a
                Linear.
        """
        self.integers, self.shape = integers, shape
        self.scale = scale.reshape(-1).expand(len(integers)).float().contiguous()
        input_scale, zero = quantizer.grid()
        self.input_scale, self.input_zero = float(input_scale), int(zero)
        self.largest = quantizer.max_integer
        self._packed: Tensor | None = None
        self._zeros = torch.zeros(len(integers), dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        return self.integers.nbytes

    def dense(self) -> Tensor:
        return self.integers * self.scale.view(-1, *[1] * (self.integers.ndim - 1))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # it cannot be pickled

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        integers = np.empty(x.shape, np.uint8)
        step, inputs = np.float32(1 / self.input_scale), x.contiguous().numpy()
        to_grid(inputs.reshape(-1), step, self.input_zero, self.largest, integers.reshape(-1))
        grid = torch.from_numpy(integers)
        return self._linear(grid, bias) if self.shape is None else self._images(grid, bias)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.integers, None)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            flat,
            self.input_scale,
            self.input_zero,
            self._packed,
            self.scale,
            self._zeros,
            bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return out.view(*x.shape[:-1], len(self.integers))

    def _images(self, x: Tensor, bias: Tensor | None) -> Tensor:
        s = self.shape
        s.output_size(*x.shape[-2:])  # oneDNN does not check it
        batched = x if x.ndim == 4 else x.unsqueeze(0)
        geometry = [
            list(s.stride),
            [s.padding[2], s.padding[0]],
            list(s.dilation),
            s.groups,
        ]
        if self._packed is None:
            self._packed = torch.ops.onednn.qconv_prepack(
                self.integers, self.scale, self.input_scale, self.input_zero, *geometry, None
            )
        out: Tensor = torch.ops.onednn.qconv_pointwise(
            batched,
            self.input_scale,
            self.input_zero,
            self._packed,
            self.scale,
            self._zeros,
            bias,
            *geometry,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        out = out.contiguous()
        return out if x.ndim == 4 else out.squeeze(0)


def _round_up(count: int) -> int:
    return math.ceil(count / LANES) * LANES
