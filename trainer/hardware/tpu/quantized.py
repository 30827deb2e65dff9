"""The integers of quantized layers and tensors, from the quantizers of a model."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from trainer.compress.quantize import ActivationQuantizer, WeightQuantizer, broadcast_scale
from trainer.compress.recurrent import LinearLSTM
from trainer.errors import ConfigError
from trainer.hardware.tpu.arithmetic import Floats, Grid, Ints
from trainer.hardware.tpu.graph import Trace


@dataclass(frozen=True)
class QuantizedLayer:
    """A Linear or a convolution as integers."""

    weights: NDArray[np.int8]
    """In the shape of the layer's weight."""
    scales: Floats
    """[outputs]: what an integer of the weight stands for."""
    bias: Floats
    """[outputs]."""
    input_grid: Grid

    def sum_scales(self, source: Grid) -> Floats:
        """[outputs]: the value of 1 in a sum of products, with an input on the grid `source`."""
        return self.scales * source.scale

    def zero_sums(self, source: Grid) -> Ints:
        """[outputs]: what the input's zero point adds to each sum."""
        weights = self.weights.reshape(len(self.weights), -1)
        sums: Ints = source.zero_point * weights.sum(axis=1, dtype=np.int64)
        return sums


def quantized_layer(name: str, layer: nn.Linear | nn.Conv2d) -> QuantizedLayer:
    """The integers of a layer.

    Args:
        name: Of the layer, for messages.

    Raises:
        ConfigError: The weight or the input of the layer is not quantized.
    """
    quantizer = getattr(layer, "weight_quantizer", None)
    if not isinstance(quantizer, WeightQuantizer):
        raise ConfigError(f"{name} is not quantized: the TPU multiplies 8-bit integers")
    weight = layer.weight.detach()
    steps = weight / broadcast_scale(quantizer.scale, weight.ndim)
    integers = steps.round()
    on_grid = (steps - integers).abs().max() < 1e-3
    if not on_grid or integers.abs().max() > quantizer.max_integer:
        raise ConfigError(f"{name}: something changed its weight after the quantize phase")
    outputs = len(weight)
    bias = layer.bias
    return QuantizedLayer(
        weights=integers.cpu().numpy().astype(np.int8),
        scales=_doubles(quantizer.scale.expand(outputs)),
        bias=np.zeros(outputs) if bias is None else _doubles(bias),
        input_grid=input_grid(name, layer),
    )


def input_grid(name: str, layer: nn.Module) -> Grid:
    """The grid of a layer's input. Raises ConfigError if it is not quantized."""
    quantizer = getattr(layer, "input_quantizer", None)
    if not isinstance(quantizer, ActivationQuantizer) or not quantizer.ready:
        raise ConfigError(
            f"the input of {name} is not quantized: quantize with activations=8 (an input that is "
            "always zero gets no range)"
        )
    scale, zero_point = quantizer.grid()
    return Grid(float(scale), int(zero_point), quantizer.max_integer)


def reading_grid(trace: Trace, node: fx.Node) -> Grid:
    """The grid of the first layer that reads a result, or else one for the result's range.

    A layer behind a ReLU or a maximum has a grid without the small values that these remove: it
    counts only if nothing else reads them.

    Raises:
        ConfigError: The input of the layer is not quantized.
    """
    waiting = list(node.users)
    alone = len(waiting) == 1
    while waiting:
        user = waiting.pop(0)
        kind = trace.kind(user)
        if kind in ("linear", "convolution"):
            return input_grid(str(user.target), trace.module(user))
        if kind == "lstm":
            first: Any = cast(LinearLSTM, trace.module(user)).layers[0]
            return input_grid(f"{user.target}.layers.0.ih", first.ih)
        if kind == "flatten" or (alone and kind in ("relu", "max_pool")):
            alone = alone and len(user.users) == 1
            waiting += user.users
    result = trace.results[node]
    return Grid.spanning(result.low, result.high)


def _doubles(tensor: Tensor) -> Floats:
    return cast(Floats, tensor.detach().cpu().double().numpy())
