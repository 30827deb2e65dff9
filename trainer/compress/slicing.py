"""Removes slices of parameters from a model, so that its layers become smaller."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from trainer.compress.dependencies import Unit, output_tensors, removable_units
from trainer.compress.layers import is_transposed, rebuild_attention
from trainer.errors import ConfigError, Diverged, first_line
from trainer.models.copying import copy_model

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
"""Attributes that count the heads of an attention, whose projections are layers in it."""

_WIDTHS = ("attn_dim", "all_head_size", "split_size")
"""Attributes, beside those, that count the values of all heads together."""

_TOLERANCE = 1e-3  # of the largest output, between zeroed and removed units


def to_change(model: nn.Module, removed: Sequence[Unit], units: Sequence[Unit]) -> dict[str, Any]:
    """What `remove` needs to remove units: plain values that JSON keeps.

    Args:
        model: The model, with attention rebuilt as `find_units` returned it.
        removed: The units to remove.
        units: All units of the model.
    """
    masks: dict[tuple[str, int], set[int]] = {}
    for unit in removed:
        for part in unit.parts:
            masks.setdefault((part.name, part.dim), set()).update(part.positions)
    tensors = _tensors(model)
    slices: dict[str, list[str]] = {}  # places by mask, since many have the same one
    for (name, dim), positions in masks.items():
        bits = np.zeros(tensors[name].shape[dim], bool)
        bits[list(positions)] = True
        slices.setdefault(np.packbits(bits).tobytes().hex(), []).append(f"{name}:{dim}")
    return {
        "removed": [[mask, places] for mask, places in slices.items()],
        "attributes": _heads(model, removed, units),
    }


def remove(model: nn.Module, change: Mapping[str, Any]) -> None:
    """Make a change of `to_change`, in place.

    Attention whose heads are removed is rebuilt from Linear layers first. Parameters are replaced,
    tied ones stay tied.

    Args:
        model: Of the same structure as the one that the change was planned for; its values may be
            others.
        change: What `to_change` returned.

    Raises:
        ConfigError: The change is damaged, or of another model.
    """
    slices = _parsed(change)
    layers = {name.rpartition(".")[0] for name, _ in slices}
    rebuild_attention(model, {layer.rpartition(".")[0] for layer in layers})
    tensors = _tensors(model)
    smaller: dict[str, Tensor] = {}
    for (name, dim), mask in slices.items():
        tensor = tensors.get(name)
        if tensor is None or dim >= tensor.ndim or len(mask) != -(-tensor.shape[dim] // 8):
            raise ConfigError(
                f"the change of the structure does not fit {type(model).__name__}: {name}, "
                f"dimension {dim}; build the model as for the run"
            )
        bits = np.unpackbits(np.frombuffer(mask, np.uint8))[: tensor.shape[dim]]
        kept = torch.from_numpy(np.flatnonzero(bits == 0)).to(tensor.device)
        smaller[name] = _select(smaller.get(name, tensor).detach(), dim, kept)
    _replace(model, {id(tensors[name]): new for name, new in smaller.items()})
    for name, attribute, value in change["attributes"]:
        setattr(model.get_submodule(name), attribute, value)


def _parsed(change: Mapping[str, Any]) -> dict[tuple[str, int], bytes]:
    """The masks of a change by name and dimension. Raises ConfigError for a damaged one."""
    found = {}
    try:
        for mask, places in change["removed"]:
            for place in places:
                name, _, dim = place.rpartition(":")
                found[name, int(dim)] = bytes.fromhex(mask)
        for _, attribute, value in change["attributes"]:
            if attribute not in (*_HEADS, *_WIDTHS) or not isinstance(value, int):
                raise ValueError(attribute)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the change of the structure is damaged: {type(error).__name__}: {first_line(error)}"
        ) from error
    return found


def find_units(model: nn.Module, inputs: Any) -> tuple[nn.Module, list[Unit], list[str]]:
    """The units of a model whose removal was tried and leaves a model that works.

    One unit of each layer is removed from a copy. Its outputs must be those of the model with these
    units set to zero.

    Args:
        model: With plain weights; it stays as it is.
        inputs: A batch of at least two samples, on the model's device; several inputs in a tuple
            or mapping.

    Returns:
        A copy of the model in which attention is rebuilt from Linear layers; its units; and for
        each layer that is left out, its weights and the reason.

    Raises:
        ConfigError: The model cannot be copied.
        Diverged: A weight is Inf or NaN.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise Diverged("weights are Inf or NaN: the training before the phase diverged")
    try:
        rebuilt = copy_model(model)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}"
        ) from error
    rebuild_attention(rebuilt)
    layers: dict[frozenset[tuple[str, int]], list[Unit]] = {}
    for unit in removable_units(rebuilt, inputs):
        layers.setdefault(unit.dimensions, []).append(unit)
    several = {key: found for key, found in layers.items() if len(found) > 1}
    units = [unit for found in several.values() for unit in found]
    trains = _trains(rebuilt, inputs)
    last = [found[-1] for found in several.values()]
    if not units or _problem(rebuilt, last, units, inputs, trains) is None:
        return rebuilt, units, []
    refused = {}
    for key, found in several.items():
        if (problem := _problem(rebuilt, found[-1:], units, inputs, trains)) is not None:
            refused[key] = f"{', '.join(sorted({name for name, _ in key}))} ({problem})"
    return rebuilt, [unit for unit in units if unit.dimensions not in refused], [*refused.values()]


@torch.no_grad()
def _trains(model: nn.Module, inputs: Any) -> bool:
    """Whether a model can be called with its inputs alone in training mode."""
    try:
        output_tensors(copy_model(model).train(), inputs)
    except Exception:  # of the user's own code, which may need the targets
        return False
    return True


@torch.no_grad()
def _problem(
    model: nn.Module, removed: Sequence[Unit], units: Sequence[Unit], inputs: Any, trains: bool
) -> str | None:
    """Why units cannot be removed; None: they can.

    Args:
        trains: Whether the model is also called in training mode.
    """
    zeroed, smaller = copy_model(model).eval(), copy_model(model).eval()
    tensors = _tensors(zeroed)
    for unit in removed:
        for part in unit.parts:
            if not part.name.endswith("running_var"):
                where = torch.tensor(part.positions, device=tensors[part.name].device)
                tensors[part.name].index_fill_(part.dim, where, 0)
    try:
        remove(smaller, to_change(model, removed, units))
        found = output_tensors(smaller, inputs)
        if trains:
            output_tensors(smaller.train(), inputs)  # other parts may be used
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    expected = output_tensors(zeroed, inputs)
    shapes = [[*output.shape] for output in found]
    if shapes != [[*output.shape] for output in expected]:
        return f"the output has the shape {', '.join(map(str, shapes))}"
    for one, other in zip(found, expected, strict=True):
        largest = float(other.abs().amax())
        if not math.isfinite(largest):
            return "the output is Inf or NaN"
        if not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * largest):
            return "without one of its units the model computes something else"
    return None


def _select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Some positions of a dimension, in the memory format of `tensor`."""
    found = tensor.index_select(dim, kept)
    for ndim, memory in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=memory):
            return found.contiguous(memory_format=memory)
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _heads(
    model: nn.Module, removed: Sequence[Unit], units: Sequence[Unit]
) -> list[tuple[str, str, int]]:
    """New values of attributes that state sizes of attention: modules, attributes, and values.

    A number of heads belongs to a projection in the same module, if that has as many units.
    """
    lost = {unit.parts for unit in removed}
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for unit in units:
        for part in unit.parts:
            if not part.name.endswith(".weight"):
                continue
            layer = model.get_submodule(part.name.removesuffix(".weight"))
            if part.dim == is_transposed(layer):  # the outputs
                before[part.name] = before.get(part.name, 0) + 1
                after[part.name] = after.get(part.name, 0) + (unit.parts not in lost)
    found: dict[tuple[str, str], int] = {}
    for name, count in before.items():
        owner = name.removesuffix(".weight").rpartition(".")[0]
        module = model.get_submodule(owner)
        if after[name] == count or all(getattr(module, key, None) != count for key in _HEADS):
            continue
        for key in (*_HEADS, *_WIDTHS):
            value = getattr(module, key, None)
            if value == count or (key in _WIDTHS and isinstance(value, int)):
                found[owner, key] = cast(int, value) * after[name] // count
    return [(owner, attribute, value) for (owner, attribute), value in found.items()]


def _replace(model: nn.Module, replaced: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers wherever they are used, and the sizes that layers state."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        before = dict(module._parameters)
        for name, parameter in before.items():
            if parameter is not None and id(parameter) in replaced:
                new = nn.Parameter(replaced[id(parameter)], parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), new)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in replaced:
                module._buffers[name] = replaced[id(buffer)]
        _update_sizes(module, before.get("weight"))


def _update_sizes(module: nn.Module, before: Tensor | None) -> None:
    """Set the attributes in which a layer of torch.nn states its sizes.

    Args:
        module: Any module, with its new parameters.
        before: Its weight until now.
    """
    layer = cast(Any, module)
    weight = layer._parameters.get("weight")
    if isinstance(module, _BatchNorm):
        vector = weight if weight is not None else layer.running_mean
        layer.num_features = layer.num_features if vector is None else len(vector)
    if isinstance(module, nn.RNNBase):
        layer.input_size = layer.weight_ih_l0.shape[1]
        layer._init_flat_weights()
    if weight is None or before is None or weight is before:
        return
    if isinstance(module, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif is_transposed(module):
        layer.nx, layer.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        layer.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        layer.num_parameters = len(weight)
    elif isinstance(module, _ConvTransposeNd):
        layer.in_channels = len(weight)
        layer.out_channels = weight.shape[1] * layer.groups
    elif isinstance(module, _ConvNd):
        if before.shape[1] == 1 and layer.groups > 1:  # depthwise: a channel is a group
            layer.groups = len(weight) * layer.groups // len(before)
        layer.in_channels = weight.shape[1] * layer.groups
        layer.out_channels = len(weight)
