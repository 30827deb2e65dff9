"""Which layers can be quantized, and which are rebuilt from layers that can.

A quantizable layer has its weights as parameters and reads them at each call; its inputs can be
quantized where it is called, as the first argument. Recurrent networks and attention compute with
their weights elsewhere, so they are rebuilt from Linear layers first.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.compress.attention import LinearAttention, disable_nested_tensors
from trainer.compress.recurrent import LinearGRU, LinearLSTM, LinearRNN

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
"""Layers whose parameter `weight` can be quantized."""

REBUILT = (LinearLSTM, LinearGRU, LinearRNN, LinearAttention)
"""Modules of Linear layers; each replaces modules of torch.nn."""

SUPPORTED = (
    "Linear, Conv, ConvTranspose, Embedding, transformers' Conv1D, MultiheadAttention and "
    "unidirectional LSTM, GRU and RNN layers"
)
"""Quantizable layers in words, for messages."""


def rebuild(model: nn.Module) -> None:
    """Replace recurrent networks and attention in `model` by modules of Linear layers, in place."""
    for places in _by_module(model).values():
        made = _rebuilt(model.get_submodule(places[0]))
        if made is not None:
            _replace(model, places, made)
    disable_nested_tensors(model)


def rebuild_attention(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Replace attention alone, in place.

    Args:
        model: The model.
        names: Names of modules; others stay. None: all attention is replaced.
    """
    for places in _by_module(model).values():
        module = model.get_submodule(places[0])
        if LinearAttention.accepts(module) and (names is None or not set(places).isdisjoint(names)):
            _replace(model, places, LinearAttention(cast(nn.MultiheadAttention, module)))
    disable_nested_tensors(model)


def rebuild_as(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`rebuild`, but only modules that were rebuilt when `state` was taken.

    Args:
        model: Freshly built.
        state: A state_dict of it after `rebuild` and `transpose`.
    """
    for places in _by_module(model).values():
        name, module = places[0], model.get_submodule(places[0])
        made = _rebuilt(module)
        if made is not None and all(f"{name}.{key}" in state for key in made.state_dict()):
            _replace(model, places, made)
        elif is_transposed(module) and f"{name}.weight_quantizer.width" in state:
            _replace(model, places, transposed(module))
    disable_nested_tensors(model)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of the package transformers.

    It is a Linear whose weight [inputs, outputs] is transposed.
    """
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def transposed(module: nn.Module) -> nn.Linear:
    """The Linear that computes what a Conv1D of transformers computes."""
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter, module.bias)
    with torch.device("meta"):
        made = nn.Linear(*weight.shape)
    made.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    made.bias = bias
    return made


def transpose(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the Conv1D modules of transformers of these names by Linear layers, in place."""
    places = _by_module(model)
    for name in names:
        module = model.get_submodule(name)
        _replace(model, places[id(module)], transposed(module))


def _rebuilt(module: nn.Module) -> nn.Module | None:
    """The module of Linear layers that computes what `module` computes, if there is one."""
    for kind in REBUILT:
        if kind.accepts(module):
            return kind(cast(Any, module))
    return None


def _by_module(model: nn.Module) -> dict[int, list[str]]:
    """All names of each submodule, by its id, in the order of the modules."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(id(module), []).append(name)
    return names


def _replace(model: nn.Module, places: list[str], made: nn.Module) -> None:
    made.train(model.get_submodule(places[0]).training)
    for name in places:
        model.set_submodule(name, made)
