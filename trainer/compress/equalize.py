"""Cross-layer equalization: weights of similar size in all channels between two layers.

Where only operations such as ReLU, pooling and flattening lie between two layers, a channel of the
first can be divided by a positive factor and the inputs of the second multiplied by it, without a
change of the outputs. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
Correction, ICCV 2019, arXiv:1906.04721, section 4.1.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from trainer.compress.dependencies import Unit, output_tensors, removable_units
from trainer.compress.layer_inputs import evaluation
from trainer.data.tree import first_samples, map_tensors, tensors

_SAMPLES = 4  # with which channels are found and tried
_PROBE = 2.0**8  # factor with which a pair is tried: an operation that saturates shows at once
_TOLERANCE = 1e-4  # of the largest output, between the model and one whose channels were scaled
_SWEEPS = 20  # over all pairs: the factors of one pair depend on those of its neighbours
_CONVERGED = 1e-3  # largest logarithm of a factor in the last sweep


@dataclass(frozen=True)
class _Slices:
    """A dimension of a parameter whose positions belong to channels."""

    parameter: nn.Parameter
    dim: int
    channels: Tensor  # of each position [size], int64; the number of channels: none

    def multiply(self, factors: Tensor) -> None:
        """Args: factors: of each channel, float32."""
        own = torch.cat((factors, factors.new_ones(1)))[self.channels]
        shape = [1] * self.parameter.ndim
        shape[self.dim] = -1
        self.parameter.mul_(own.view(shape))

    def sizes(self, count: int) -> Tensor:
        """The largest absolute value of each of `count` channels, float32."""
        largest = self.parameter.movedim(self.dim, 0).flatten(1).abs().amax(1).float()
        return largest.new_zeros(count + 1).scatter_reduce(0, self.channels, largest, "amax")[:-1]


@dataclass(frozen=True)
class _Pair:
    """What the channels between two layers are multiplied with."""

    count: int  # channels
    weight: _Slices  # of the first layer
    bias: _Slices | None
    following: tuple[_Slices, ...]  # weights of the layers that read the channels

    def scale(self, factors: Tensor) -> None:
        """Args: factors: of each channel, by which the first layer is divided."""
        for slices in (self.weight, self.bias):
            if slices is not None:
                slices.multiply(1 / factors)
        for slices in self.following:
            slices.multiply(factors)

    def equalizing(self) -> Tensor:
        """The factors after which both layers have the same size in each channel."""
        before = self.weight.sizes(self.count)
        after = torch.stack([slices.sizes(self.count) for slices in self.following]).amax(0)
        return torch.where((before > 0) & (after > 0), (before / after).sqrt(), 1.0)


@torch.no_grad()
def equalize(model: nn.Module, inputs: Any, names: Container[str]) -> int:
    """Equalize all pairs of layers where that leaves the outputs as they are, in place.

    The layers are Linear and convolutions, depthwise ones included. Pairs are found as for
    structured pruning (trainer.compress.dependencies), and each is tried with large and small
    factors.

    Args:
        model: With plain weights; its mode is restored afterwards.
        inputs: A batch [n, ...] of the model's inputs, on its device; several in a tuple or
            mapping.
        names: Weights that may be changed.

    Returns:
        The number of pairs.
    """
    inputs = first_samples(inputs, _SAMPLES)
    if all(tensor.shape[:1] == (1,) for tensor in tensors(inputs)):
        inputs = map_tensors(lambda x: torch.cat((x, x)), inputs)
    layers: dict[frozenset[tuple[str, int]], list[Unit]] = {}
    for unit in removable_units(model, inputs):
        layers.setdefault(unit.dimensions, []).append(unit)
    with evaluation(model):
        order = _call_order(model, inputs)
        expected = output_tensors(model, inputs)
        pairs = [
            pair
            for units in layers.values()
            for pair in _pairs(model, units, order, names)
            if _harmless(model, pair, inputs, expected)
        ]
    for _ in range(_SWEEPS):
        largest = 0.0
        for pair in pairs:
            factors = pair.equalizing()
            pair.scale(factors)
            largest = max(largest, float(factors.log().abs().amax()))
        if largest < _CONVERGED:
            break
    return len(pairs)


def _pairs(
    model: nn.Module, units: Sequence[Unit], order: Sequence[str], names: Container[str]
) -> list[_Pair]:
    """The pairs of layers between which the channels `units` lie, if it is clear which these are.

    One layer computes the channels, depthwise convolutions may follow, and others read them.
    """
    slices: dict[tuple[str, int], _Slices] = {}
    for place, part in enumerate(units[0].parts):
        module, _, kind = part.name.rpartition(".")
        if not _is_layer(model.get_submodule(module)) or (
            kind == "weight" and part.name not in names
        ):
            return []
        parameter = model.get_parameter(part.name)
        channels = torch.full((parameter.shape[part.dim],), len(units))
        for channel, unit in enumerate(units):
            channels[list(unit.parts[place].positions)] = channel
        slices[part.name, part.dim] = _Slices(parameter, part.dim, channels.to(parameter.device))
    following = tuple(found for (name, dim), found in slices.items() if dim == 1)
    makers = [name for name in order if (f"{name}.weight", 0) in slices]
    depthwise = [_is_depthwise(model.get_submodule(name)) for name in makers]
    if not following or not makers or depthwise != [False] + [True] * (len(makers) - 1):
        return []
    pairs = []
    for number, name in enumerate(makers):
        after = makers[number + 1 : number + 2]
        readers = tuple(slices[f"{name}.weight", 0] for name in after) or following
        weight, bias = slices[f"{name}.weight", 0], slices.get((f"{name}.bias", 0))
        pairs.append(_Pair(len(units), weight, bias, readers))
    return pairs


def _harmless(model: nn.Module, pair: _Pair, inputs: Any, expected: Sequence[Tensor]) -> bool:
    """Whether the outputs do not change if any channel of a pair is made larger or smaller."""
    factors = torch.full((pair.count,), _PROBE, device=pair.weight.parameter.device)
    factors[::2] = 1 / _PROBE  # powers of two, which can be undone exactly
    return bool(expected) and all(
        _unchanged(model, pair, trial, inputs, expected) for trial in (factors, 1 / factors)
    )


def _unchanged(
    model: nn.Module, pair: _Pair, factors: Tensor, inputs: Any, expected: Sequence[Tensor]
) -> bool:
    """Whether the outputs are as expected while a pair is scaled."""
    pair.scale(factors)
    found = output_tensors(model, inputs)
    pair.scale(1 / factors)
    return all(
        torch.allclose(one, other, rtol=0, atol=_TOLERANCE * float(other.abs().amax()))
        for one, other in zip(found, expected, strict=True)
    )


def _call_order(model: nn.Module, inputs: Any) -> list[str]:
    """The names of the layers in the order of their first call."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if _is_layer(module)
    ]
    try:
        output_tensors(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(called))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and module.weight.shape[1] == 1
