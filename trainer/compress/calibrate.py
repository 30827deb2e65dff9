"""Quantization without training: ranges, rounding and biases from a few inputs without labels.

The layers are rounded in the order in which the model calls them. Each is looked at with the inputs
that it gets when all layers before it are rounded already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.layer_inputs import LayerStatistics, evaluation, observe_layers, with_inputs
from trainer.compress.quantize import (
    INPUT,
    OUTPUT,
    ActivationQuantizer,
    WeightQuantizer,
    broadcast_scale,
)
from trainer.compress.second_order import round_second_order
from trainer.compress.select import ParameterRef

RANGES = ("minmax", "mse", "percentile")
PERCENTILE = 99.99  # of the values on each side of zero that the range "percentile" covers

_VALUES = 1 << 17  # that are kept of all inputs of a layer to find its range


@torch.no_grad()
def calibrate(
    model: nn.Module,
    places: Mapping[str, Sequence[ParameterRef]],
    quantizers: Mapping[str, WeightQuantizer],
    inputs: Sequence[Any],
    ranges: str = "minmax",
    second_order: bool = True,
    correct_bias: bool = True,
) -> None:
    """Set ranges, scales, weights and biases of a model with quantizers, in place.

    Weights of Linear and convolutions are rounded by `round_second_order`, or to the nearest value
    of their grid; all others stay as they are. Then the mean of each output over all inputs is made
    that of the original layer by a change of its bias, if it has one (Nagel et al., ICCV 2019,
    arXiv:1906.04721, section 4.2).

    Args:
        model: With plain weights; its mode is restored afterwards.
        places: Where the model uses each weight to be quantized.
        quantizers: Of these weights, whose scales are set here.
        inputs: Batches [n, ...] of the model's inputs, on its device; several in a tuple or
            mapping.
        ranges: How the range of a layer's input is found, one of `RANGES`: by the smallest and
            largest value, by the smallest mean squared error of the values, or by percentile.
        second_order: Whether rounding takes the inputs into account.
        correct_bias: Whether biases are corrected. With neither of the two, the model is called
            once with each batch, to find the ranges; else once more for each layer.
    """
    with evaluation(model):
        with _sampled(model, -(-_VALUES // len(inputs)), ranges):
            observed = observe_layers(model, places, inputs)
        for name, quantizer in quantizers.items():
            quantizer.calibrate(places[name][0].value)
        if not (second_order or correct_bias):
            for name in observed:
                weight = places[name][0].value
                weight.copy_(quantizers[name](weight))
            return
        # Rounding a layer and correcting its bias depend on the inputs that it gets from the layers
        # before it as they are rounded already, so the model is called again for each layer.
        for layers in with_inputs(model, observed, inputs, products=second_order):
            for name, layer in layers.items():
                weight = places[name][0].value
                quantizer = quantizers[name]
                with layer.rounding(correct_bias) as statistics:
                    if second_order:
                        # It needs the products of these inputs; they are not kept for all layers,
                        # as each matrix has the size [columns, columns].
                        _round_second_order(weight, quantizer, statistics)
                    weight.copy_(quantizer(weight))


def _round_second_order(
    weight: Tensor, quantizer: WeightQuantizer, statistics: LayerStatistics
) -> None:
    """Round the weight of a layer to the grid, in place."""
    groups = len(statistics.sums)
    scales = broadcast_scale(quantizer.scale, 2).expand(len(weight), 1).reshape(groups, -1, 1)
    statistics.replace(
        weight,
        lambda block, gram, group: round_second_order(
            block, gram, scales[group], quantizer.max_integer
        ),
    )


@contextmanager
def _sampled(model: nn.Module, size: int, ranges: str) -> Iterator[None]:
    """Context in which activations are looked at, after which their ranges are set.

    Args:
        size: Number of values of each call that are kept.
        ranges: One of `RANGES`.
    """
    handles, seen = [], []
    for module in model.modules():
        for kind in (INPUT, OUTPUT):
            quantizer = getattr(module, f"{kind}_quantizer", None)
            if isinstance(quantizer, ActivationQuantizer):
                sample = _Sample(quantizer, size)
                seen.append(sample)
                handles.append(quantizer.register_forward_pre_hook(sample.add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for sample in seen:
        sample.set_range(ranges)


class _Sample:
    """Some values of those that a quantizer is called with, and their extremes."""

    def __init__(self, quantizer: ActivationQuantizer, size: int) -> None:
        self._quantizer = quantizer
        self._size = size
        self._values: list[Tensor] = []
        self._extremes: list[Tensor] = []

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        flat = args[0].detach().float().flatten()
        flat = flat[flat.isfinite()]
        if len(flat):
            self._extremes.append(torch.stack(torch.aminmax(flat)))
            self._values.append(flat[:: -(-len(flat) // self._size)].clone())

    def set_range(self, kind: str) -> None:
        if not self._values:
            return
        values, extremes = torch.cat(self._values), torch.stack(self._extremes)
        low, high = extremes[:, 0].amin().clamp_max(0), extremes[:, 1].amax().clamp_min(0)
        if kind == "percentile":
            values = values.double().sort().values
            rest = int(len(values) * (1 - PERCENTILE / 100))
            low = low.maximum(values[rest].float().clamp_max(0))
            high = high.minimum(values[len(values) - 1 - rest].float().clamp_min(0))
        if kind == "mse":
            low, high = self._least_error(values, low, high)
        self._quantizer.set_range(low, high)

    def _least_error(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the range [low, high] with the smallest mean squared error of `values`."""
        found = (torch.inf, low, high)
        for part in torch.linspace(1, 0.05, 48).tolist():
            self._quantizer.set_range(low * part, high * part)
            if not self._quantizer.ready:
                break
            error = float((self._quantizer(values) - values).square().mean())
            if error < found[0]:
                found = (error, low * part, high * part)
        return found[1:]
