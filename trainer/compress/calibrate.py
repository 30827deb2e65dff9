"""Quantization without training: ranges, rounding and biases from a few inputs without labels.

The layers are rounded in the order in which the model calls them. Each is looked at with the inputs
that it gets when all layers before it are rounded already.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from trainer.compress.quantize import (
    INPUT,
    OUTPUT,
    ActivationQuantizer,
    WeightQuantizer,
    broadcast_scale,
)
from trainer.compress.rounding import round_second_order
from trainer.compress.select import ParameterRef
from trainer.data.tree import call_with

RANGES = ("minmax", "mse", "percentile")
PERCENTILE = 99.99  # of the values on each side of zero that the range "percentile" covers

_MATRIX_CODE = ("torch.nn.", "trainer.compress.")  # modules whose layers compute as they say
_VALUES = 1 << 17  # that are kept of all inputs of a layer to find its range
_MAX_COLUMNS = 4096  # inputs of a layer whose correlations are taken into account at a time
_CHUNK = 1 << 24  # values of unfolded images at a time


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
        correct_bias: Whether biases are corrected.
    """
    with _evaluation(model):
        observed = _observe(model, places, inputs, ranges)
        for name, quantizer in quantizers.items():
            quantizer.calibrate(places[name][0].value)
        for group in _with_one_input(observed):
            for name in group:
                group[name].statistics = _Statistics(places[name][0].module, second_order)
            _run(model, inputs, [*group.values()])
            for name, layer in group.items():
                mean = layer.mean if correct_bias else None
                _round_layer(layer, places[name][0].value, quantizers[name], mean, second_order)
                layer.statistics = None  # its matrices may be large


def _round_layer(
    observed: "_Observed",
    weight: Tensor,
    quantizer: WeightQuantizer,
    expected: Tensor | None,
    second_order: bool,
) -> None:
    """Round the weight of a layer that `_is_matrix`, and give its outputs the expected mean."""
    statistics = observed.statistics
    assert statistics is not None
    bias = observed.layer.bias
    corrected = expected is not None and isinstance(bias, Tensor)
    if corrected:
        statistics.center()
    groups = len(statistics.sums)
    rows = weight.reshape(groups, -1, weight[0].numel())
    if second_order:
        scales = broadcast_scale(quantizer.scale, 2).expand(len(weight), 1).reshape(groups, -1, 1)
        rounded = [
            torch.cat(
                [
                    round_second_order(part, gram, scales[group], quantizer.max_integer)
                    for part, gram in zip(rows[group].split(_MAX_COLUMNS, 1), grams, strict=True)
                ],
                1,
            )
            for group, grams in enumerate(statistics.grams)
        ]
        weight.copy_(torch.cat(rounded).reshape(weight.shape))
    made = quantizer(weight)
    weight.copy_(made)
    if corrected:
        mean = statistics.sums / max(1, statistics.count)  # [groups, columns]
        outputs = made.double().reshape(rows.shape) @ mean.unsqueeze(2)
        cast(Tensor, bias).copy_(cast(Tensor, expected) - outputs.flatten())


@dataclass
class _Observed:
    """A layer that can be rounded by its inputs, and its calls by the original model."""

    layer: nn.Module
    outputs: int
    total: Tensor  # sum of the outputs [channels], float64
    count: int = 0
    partial: bool = False  # a call computed some of the outputs
    calls: list[int] = field(default_factory=list)  # by batch
    source: Tensor | None = None  # its first input
    statistics: "_Statistics | None" = None

    @property
    def mean(self) -> Tensor | None:
        """The mean output [channels]; None if it is not known."""
        return None if self.partial else self.total / max(1, self.count)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook, before the one that quantizes the input."""
        if self.source is None:
            self.source = _first(args, kwargs)
        self.calls[-1] += 1

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook."""
        flat = output.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)
        if len(flat) != self.outputs:
            self.partial = True
        else:
            self.total = self.total + flat.double().sum(1)
            self.count += flat.shape[1]


def _observe(
    model: nn.Module,
    places: Mapping[str, Sequence[ParameterRef]],
    inputs: Sequence[Any],
    ranges: str,
) -> dict[str, _Observed]:
    """Set the ranges of activations from the model as it is.

    Returns:
        The layers that can be rounded by their inputs, by the name of the weight, in the order of
        their first call.
    """
    handles, seen = [], []
    order: list[str] = []
    found: dict[str, _Observed] = {}
    for module in model.modules():
        for kind in (INPUT, OUTPUT):
            quantizer = getattr(module, f"{kind}_quantizer", None)
            if isinstance(quantizer, ActivationQuantizer):
                sample = _Sample(quantizer, -(-_VALUES // len(inputs)))
                seen.append(sample)
                handles.append(quantizer.register_forward_pre_hook(sample.add))
    for name, refs in places.items():
        if _is_matrix(refs):
            layer, weight = refs[0].module, refs[0].value
            one = _Observed(layer, len(weight), weight.new_zeros((), dtype=torch.float64))
            found[name] = one
            handles.append(
                layer.register_forward_pre_hook(one.before, with_kwargs=True, prepend=True)
            )
            handles.append(layer.register_forward_hook(one.after))
            handles.append(layer.register_forward_hook(lambda *_, name=name: order.append(name)))
    try:
        for batch in inputs:
            for one in found.values():
                one.calls.append(0)
            call_with(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for sample in seen:
        sample.set_range(ranges)
    return {name: found[name] for name in dict.fromkeys(order)}


def _with_one_input(observed: Mapping[str, _Observed]) -> list[dict[str, _Observed]]:
    """Layers in their order; those that follow one another and get the same input together."""
    groups: list[dict[str, _Observed]] = []
    for name, layer in observed.items():
        last = next(reversed(groups[-1].values())) if groups else None
        if last is not None and last.source is layer.source and last.calls == layer.calls:
            groups[-1][name] = layer
        else:
            groups.append({name: layer})
    for layer in observed.values():
        layer.source = None
    return groups


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


class _Statistics:
    """Sums over the inputs of a layer: of each column of its matrix, and of their products."""

    def __init__(self, layer: nn.Module, products: bool) -> None:
        self._layer = layer
        self._groups = getattr(layer, "groups", 1)
        weight = cast(Tensor, layer.weight)
        columns = weight[0].numel()
        self.count = 0
        self.sums = torch.zeros(self._groups, columns, dtype=torch.float64, device=weight.device)
        self.grams: list[list[Tensor]] = []  # of each group, of each part of its columns
        if products:
            sizes = [len(part) for part in torch.arange(columns).split(_MAX_COLUMNS)]
            self.grams = [
                [self.sums.new_zeros(size, size) for size in sizes] for _ in range(self._groups)
            ]

    def add(self, x: Tensor) -> None:
        """Args: x: An input of the layer."""
        for rows in _columns(self._layer, x):  # [inputs, groups, columns]
            self.count += len(rows)
            self.sums += rows.double().sum(0)
            for group, parts in enumerate(self.grams):
                for gram, part in zip(parts, rows[:, group].split(_MAX_COLUMNS, 1), strict=True):
                    gram += (part.t() @ part).double()

    def center(self) -> None:
        """Turn the products into those of the inputs without their mean, which a bias restores."""
        for sums, parts in zip(self.sums, self.grams, strict=False):
            for gram, part in zip(parts, sums.split(_MAX_COLUMNS), strict=True):
                gram -= torch.outer(part, part) / max(1, self.count)


def _columns(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The vectors that the matrix of a layer is multiplied with: [inputs, groups, columns] each."""
    x = x.float()
    if not isinstance(layer, _ConvNd):
        return [x.reshape(-1, 1, x.shape[-1])]
    space = len(layer.kernel_size)
    if x.ndim == space + 1:  # no dimension for samples
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, list(layer._reversed_padding_repeated_twice), mode)
    for place in range(space):
        kernel, step, gap = layer.kernel_size[place], layer.stride[place], layer.dilation[place]
        x = x.unfold(2 + place, (kernel - 1) * gap + 1, step)[..., ::gap]
    # [samples, channels, *positions, *kernel] -> [samples, *positions, channels, *kernel]
    x = x.movedim(1, 1 + space)
    each = max(1, _CHUNK // max(1, x[0].numel()))
    columns = x.shape[1 + space :].numel() // layer.groups
    return [part.reshape(-1, layer.groups, columns) for part in x.split(each)]


def _is_matrix(places: Sequence[ParameterRef]) -> bool:
    """Whether a weight is the matrix of one layer that multiplies its input with it.

    A subclass with a forward pass of its own may do something else first, such as padding its input
    or standardizing its weight.
    """
    layer = places[0].module
    if len(places) > 1 or places[0].name != "weight":
        return False
    code = [getattr(type(layer), name, None) for name in ("forward", "_conv_forward")]
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and all(
        method is None or method.__module__.startswith(_MATRIX_CODE) for method in code
    )


class _Reached(Exception):
    """Raised when all layers were called as often as needed, to end the forward pass early."""


def _run(model: nn.Module, inputs: Sequence[Any], layers: Sequence[_Observed]) -> None:
    """Let the statistics of layers take in their inputs."""
    left = 0

    def before(layer: _Observed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left
        assert layer.statistics is not None
        layer.statistics.add(_first(args, kwargs))
        left -= 1
        if left == 0:
            raise _Reached

    # After the hook that quantizes the input.
    handles = [
        layer.layer.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: before(layer, args, kwargs), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        for number, batch in enumerate(inputs):
            left = sum(layer.calls[number] for layer in layers)
            with suppress(_Reached):
                call_with(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def _evaluation(model: nn.Module) -> Any:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
