"""From a quantized model to an integer network.

The model comes from a quantize phase with `activations`: its layers hold the grids of their weights
and inputs. A tensor in the unified buffer takes the grid of the first layer that reads it. One that
no quantized layer reads, before an average or in a residual connection, takes the range that it has
for the samples that the model is compiled with.
"""

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from trainer.compress.recurrent import LinearLSTM
from trainer.errors import ConfigError
from trainer.hardware.tpu.arithmetic import (
    Epilogue,
    Floats,
    raw_sums,
    requantize,
)
from trainer.hardware.tpu.graph import Trace, trace
from trainer.hardware.tpu.lstm import lower_lstm
from trainer.hardware.tpu.network import Layer, Network, Pool, Product, Rows, Value, Window
from trainer.hardware.tpu.quantized import QuantizedLayer, quantized_layer, reading_grid
from trainer.hardware.tpu.sums import (
    Sums,
    add_zero_channels,
    convolution_sums,
    linear_sums,
    select_pixels,
)
from trainer.hardware.tpu.windows import pair, pooling_window

_BYTE = np.dtype(np.uint8)


def lower(model: nn.Module, samples: Tensor) -> Network:
    """The integer network of a quantized model.

    Args:
        model: Made of Linear, Conv2d, ReLU, sigmoid, tanh, pooling, flatten, residual additions,
            and LSTMs that the quantize phase rebuilt from Linears; an embedding is looked up by the
            host. It stays as it is.
        samples: A batch as the model takes it. The network is for batches of this shape.

    Raises:
        ConfigError: The model contains something else, or a layer is not quantized.
    """
    return _Lowering(trace(model, samples)).network()


class _Lowering:
    def __init__(self, traced: Trace) -> None:
        self._trace = traced
        self._layers: list[Layer] = []
        self._values: dict[fx.Node, Value] = {}
        self._sums: dict[fx.Node, Sums] = {}
        self._initial: dict[str, int] = {}
        self._input: Value | None = None
        self._on_host: nn.Module = nn.Identity()  # what the host does with the samples

    def network(self) -> Network:
        """Lower all calls."""
        for node in self._trace.nodes:
            if node.op == "output":
                return self._output(node)
            if node in self._trace.results or node.op == "call_module":
                self._lower(node)
        raise AssertionError("a graph has an output")

    def _lower(self, node: fx.Node) -> None:
        match self._trace.kind(node):
            case "input":
                self._start(node, node)
            case "embedding":
                self._embed(node)
            case "linear":
                self._sums[node] = self._linear(node)
            case "convolution":
                self._sums[node] = self._convolution(node)
            case "lstm":
                self._lstm(node)
            case "relu" | "sigmoid" | "tanh" as function:
                self._function(node, function)
            case "max_pool" | "average_pool" | "adaptive_pool" | "mean":
                self._pool(node)
            case "flatten":
                self._flatten(node)
            case "add":
                self._sums[node] = self._add(node)
            case "getitem":
                self._getitem(node)
            case "pad":
                self._sums[node] = self._pad(node)
            case _:
                raise self._trace.refusal(node)

    # The host's side.

    def _start(self, node: fx.Node, tensor: fx.Node) -> None:
        """Make `tensor` the input of the network: the samples, or their embedding."""
        if any(self._trace.kind(user) == "embedding" for user in node.users):
            return
        shape = _channels_last(self._trace.results[tensor].shape)
        value = Value("input", shape, _BYTE, reading_grid(self._trace, tensor))
        self._input = self._values[tensor] = value

    def _embed(self, node: fx.Node) -> None:
        if self._source(node).op != "placeholder" or self._input is not None:
            raise self._trace.refusal(node, "of something else than the samples")
        self._on_host = self._trace.module(node)
        self._start(node, node)

    def _output(self, node: fx.Node) -> Network:
        result = node.args[0]
        if not isinstance(result, fx.Node) or self._input is None:
            raise ConfigError("the model must take one tensor and return one tensor")
        sums = self._sums.get(result)
        if sums is not None and sums.plain:
            value = Value(result.name, sums.shape, np.dtype(np.int32))
            self._append(sums, value, raw_sums(sums.zero_sums))
            scales, bias = sums.scales, sums.bias
        else:
            value = self._value(result)
            grid = value.grid
            scales = np.full(value.channels, grid.scale)
            bias = np.full(value.channels, -grid.zero_point * grid.scale)
        shape = self._trace.results[result].shape
        grid, embed = self._input.grid, self._on_host
        return Network(
            layers=self._layers,
            input=self._input,
            output=value,
            quantize=lambda samples: _to_channels_last(grid.quantize(embed(samples).detach())),
            dequantize=lambda integers: _to_model(integers * scales + bias, shape),
            initial=self._initial,
        )

    # Calls that are matrix products.

    def _linear(self, node: fx.Node) -> Sums:
        source = self._value(self._source(node))
        if len(source.shape) == 4 and len(self._shape(node)) != 2:
            raise self._trace.refusal(node, "of images that are not flattened")
        return linear_sums(str(node.target), self._quantized(node), source)

    def _convolution(self, node: fx.Node) -> Sums:
        module = cast(nn.Conv2d, self._trace.module(node))
        left, right, top, bottom = module._reversed_padding_repeated_twice
        if (left, top) != (right, bottom) or module.padding_mode != "zeros":
            raise self._trace.refusal(node, "whose padding is uneven, or not zeros")
        source = self._value(self._source(node))
        window = Window(
            pair(module.kernel_size),
            pair(module.stride),
            (top, left),
            source.grid.zero_point,
            pair(module.dilation),
        )
        layer = self._quantized(node)
        return convolution_sums(str(node.target), layer, source, window, module.groups)

    def _lstm(self, node: fx.Node) -> None:
        if len(node.args) + len(node.kwargs) > 1:
            raise self._trace.refusal(node, "with a state from outside")
        source = self._value(self._source(node))
        module = cast(LinearLSTM, self._trace.module(node))
        layers, outputs, initial = lower_lstm(str(node.target), module, source)
        self._layers += layers
        self._values[node] = outputs
        self._initial |= initial

    # Calls that become part of a product, or copy.

    def _function(self, node: fx.Node, function: str) -> None:
        source = self._source(node)
        sums = self._open_sums(source)
        if sums is not None and not sums.function:
            self._sums[node] = replace(sums, function=function)
        elif function == "relu":
            value = self._value(source)
            zero = value.grid.zero_point
            # Where zero is the smallest integer, nothing is negative.
            self._values[node] = self._clamped(node, value, zero) if zero else value
        else:
            raise self._trace.refusal(node, "of what is not the result of a matrix product")

    def _clamped(self, node: fx.Node, value: Value, low: int) -> Value:
        """A copy of a value in which everything below `low` is `low`."""
        images = replace(value, shape=(value.rows, 1, 1, value.channels))
        result = replace(images, name=node.name)
        window = Window((1, 1), (1, 1), (0, 0), 0)
        self._layers.append(Pool(node.name, images, result, window, low, None))
        return replace(result, shape=value.shape)

    def _add(self, node: fx.Node) -> Sums:
        nodes = [x for x in node.args if isinstance(x, fx.Node)]
        if len(nodes) == 2 and nodes[0] is not nodes[1] and not node.kwargs:
            for product, other in (nodes, nodes[::-1]):
                sums = self._open_sums(product)
                if sums is not None and sums.plain and self._value(other).shape == sums.shape:
                    return replace(sums, operand=self._value(other))
        raise self._trace.refusal(node, "of anything but a product and a tensor of its shape")

    def _getitem(self, node: fx.Node) -> None:
        source, index = self._source(node), node.args[1]
        if self._trace.kind(source) == "lstm" and index == 0:
            self._values[node] = self._values[source]
            return
        match index:
            case (
                slice(start=None, stop=None, step=None),
                slice(start=None, stop=None, step=None),
                slice(start=None, stop=None, step=down),
                slice(start=None, stop=None, step=right),
            ):
                step = (int(down or 1), int(right or 1))
                self._sums[node] = select_pixels(node.name, self._value(source), step)
            case _:
                raise self._trace.refusal(node, f"with the index {index}")

    def _pad(self, node: fx.Node) -> Sums:
        sums = self._open_sums(self._source(node))
        mode = self._trace.argument(node, "mode", 2, "constant")
        value = self._trace.argument(node, "value", 3)
        match self._trace.argument(node, "pad", 1):
            case (0, 0, 0, 0, int(before), int(after)) if mode == "constant" and not value:
                if sums is not None and sums.plain and len(sums.weights) == 1:
                    return add_zero_channels(sums, before, after)
        raise self._trace.refusal(node, "of anything but the channels of a product, with zeros")

    # Calls that the activation unit executes by itself, or that change nothing.

    def _pool(self, node: fx.Node) -> None:
        source = self._value(self._source(node))
        window = pooling_window(self._trace, node, source)
        grid = source.grid
        shape = (source.shape[0], *window.output_size(*source.shape[1:3]), source.channels)
        average = None
        if self._trace.kind(node) != "max_pool":
            count = window.kernel[0] * window.kernel[1]
            zeros = np.array([count * grid.zero_point])
            scales = np.array([grid.scale / count])
            grid = reading_grid(self._trace, node)
            average = requantize(scales, np.zeros(1), zeros, grid)
        result = Value(node.name, shape, _BYTE, grid)
        self._layers.append(Pool(node.name, source, result, window, 0, average))
        self._values[node] = result

    def _flatten(self, node: fx.Node) -> None:
        value = self._value(self._source(node))
        before, after = self._shape(self._source(node)), self._shape(node)
        if after != (before[0], int(np.prod(before[1:]))) or len(before) == 3:
            raise self._trace.refusal(node, f"from {list(before)} to {list(after)}")
        self._values[node] = value  # a Linear reorders its weights instead

    # Values and their grids.

    def _source(self, node: fx.Node) -> fx.Node:
        """The first argument of a call."""
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        if not isinstance(source, fx.Node):
            raise self._trace.refusal(node, "of a value that is not a tensor")
        return source

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return self._trace.results[node].shape

    def _open_sums(self, node: fx.Node) -> Sums | None:
        """The product behind a result, if nothing else needs the result itself."""
        return self._sums.get(node) if len(node.users) == 1 else None

    def _value(self, node: fx.Node) -> Value:
        """A result in the unified buffer, stored there if it is not yet."""
        if node not in self._values:
            if node not in self._sums:
                raise self._trace.refusal(node)
            sums = self._sums.pop(node)
            grid = sums.grid or reading_grid(self._trace, node)
            value = Value(node.name, sums.shape, _BYTE, grid)
            self._append(sums, value, sums.epilogue(grid))
            self._values[node] = value
        return self._values[node]

    def _append(self, sums: Sums, value: Value, epilogue: Epilogue) -> None:
        self._layers.append(
            Product(
                name=sums.name,
                source=sums.source,
                destination=Rows(value),
                rows=value.rows,
                weights=sums.weights,
                epilogue=epilogue,
                operand=None if sums.operand is None else Rows(sums.operand),
                window=sums.window,
            )
        )

    def _quantized(self, node: fx.Node) -> QuantizedLayer:
        module = cast(nn.Linear | nn.Conv2d, self._trace.module(node))
        if hasattr(module, "output_quantizer"):
            raise self._trace.refusal(node, "with a quantized output: quantize with outputs=[]")
        return quantized_layer(str(node.target), module)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


def _to_channels_last(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(integers.transpose(0, 2, 3, 1)) if integers.ndim == 4 else integers


def _to_model(values: Floats, shape: tuple[int, ...]) -> Tensor:
    """A result with its channels last as the tensor that the model returns."""
    ordered = values.transpose(0, 3, 1, 2) if values.ndim == 4 else values
    return torch.from_numpy(ordered.reshape(shape)).float()
