"""How quantization changes the structure of a model, and how a fresh model gets that structure.

Batch norm is folded into the layer before it, recurrent networks and attention are rebuilt from
Linear layers (trainer.compress.layers), and layers get quantizers. The names in the state_dict say
which changes were made, so that `apply_structure` needs nothing else.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.compress.layers import rebuild_as
from trainer.compress.quantize import (
    BITS,
    INPUT,
    OUTPUT,
    ActivationQuantizer,
    WeightQuantizer,
    attach,
    broadcast_scale,
)
from trainer.compress.state import load_state
from trainer.errors import ConfigError, first_line
from trainer.models.copying import copy_model
from trainer.models.wrappers import unwrapped

# Which batch norm can be folded into which layer. A subclass may compute something else.
_FOLDABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}

# What gives as many dimensions as it takes.
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
_LAYERS_OF_ONE_SHAPE = (nn.Linear, nn.BatchNorm1d, nn.Identity, nn.Dropout, *_ACTIVATIONS)
# torch.fx changes torch.nn.Module for the whole process while it traces, and ranks may be threads.
_TRACING = threading.Lock()

_QUANTIZER = "_quantizer"  # the last part of a quantizer's name

_FUNCTIONS_OF_ONE_SHAPE = ("relu", torch.relu, F.relu, "tanh", torch.tanh, F.gelu, F.dropout)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give `model` the structure and the values that it had when `state` was taken from it.

        model = restore(LeNet5(), trainer.artifact.load("model.dcz"))

    Args:
        model: of the same class and settings, as it was built; changed in place and returned. The
            state is that of the module in it if it is `torch.compile(module)`.
        state: a state_dict, or what `trainer.compress.state.model_state` made of one.

    Raises:
        RuntimeError: the state is that of another model, or damaged.
    """
    plain = unwrapped(model)
    apply_structure(plain, state)
    load_state(plain, state)
    return model


def apply_structure(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model` the structure alone; a state_dict without quantizers leaves it as it is.

    Raises:
        RuntimeError: An entry of a quantizer fits no layer, or is damaged.
    """
    if not any(name.endswith(f"{_QUANTIZER}.width") for name in state):
        return
    rebuild_as(model, state)
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            # A key with a dot belongs to the activation inside, which stays.
            own = [f"{name}.{key}" in state for key in module.state_dict() if "." not in key]
            if own and not any(own):
                model.set_submodule(name, _replacement(module))
    for name, module in model.named_modules():
        if type(module) in _FOLDABLE and module.bias is None and f"{name}.bias" in state:
            weight = cast(Tensor, module.weight)
            module.bias = nn.Parameter(weight.new_zeros(len(weight)))
    shared: dict[int, WeightQuantizer] = {}
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        weights = {
            kind: weight
            for kind, weight in module._parameters.items()
            if weight is not None and f"{prefix}{kind}{_QUANTIZER}.width" in state
        }
        for kind, weight in weights.items():
            entry = f"{prefix}{kind}{_QUANTIZER}"
            channels = _channels(f"{entry}.scale", state, weight)
            quantizer = WeightQuantizer(_bits(f"{entry}.width", state), channels)
            attach(module, kind, shared.setdefault(id(weight), quantizer))
        for kind in (INPUT, OUTPUT):
            entry = f"{prefix}{kind}{_QUANTIZER}"
            if f"{entry}.width" in state:
                if not weights:
                    raise RuntimeError(f"{entry}: this {type(module).__name__} has no quantizer")
                attach(module, kind, ActivationQuantizer(_bits(f"{entry}.width", state)))


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm into the convolution or Linear that alone feeds it, in place.

    y = gamma * (w x + b - mean) / sqrt(var + eps) + beta, with the running statistics; the batch
    norm becomes an Identity, or the activation that is a part of it (timm). A zero weight stays
    zero. Raises as `foldable`.
    """
    for norm_name, layer_name in foldable(model).items():
        norm = cast(_BatchNorm, model.get_submodule(norm_name))
        layer = cast(nn.Linear, model.get_submodule(layer_name))  # or a convolution
        factor = (cast(Tensor, norm.running_var).double() + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        bias = -cast(Tensor, norm.running_mean) * factor
        if layer.bias is not None:
            bias = bias + layer.bias * factor
        if norm.bias is not None:
            bias = bias + norm.bias
        weight = layer.weight
        weight.copy_(weight * broadcast_scale(factor, weight.ndim))
        layer.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
        model.set_submodule(norm_name, _replacement(norm))


def foldable(model: nn.Module) -> dict[str, str]:
    """The layer that each batch norm can be folded into, by the names of both.

    That is a convolution of the same number of dimensions, or a Linear whose inputs were flattened
    to [samples, features]; nothing else uses what it computes or its weight, which is an ordinary
    parameter.

    Raises:
        ConfigError: there are batch norms, and torch.fx cannot follow the model.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return {}
    try:
        with _TRACING:
            graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's code raises
        raise ConfigError(
            "fold=true: it cannot be found out which layer each batch norm follows, since torch.fx "
            f"cannot trace {type(model).__name__} ({first_line(error)}): set fold=false"
        ) from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = {}
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = str(node.target), str(before.target)
        norm, layer = map(model.get_submodule, names)
        if (
            isinstance(norm, _BatchNorm)
            and _matching(norm, layer)
            and (type(layer) is not nn.Linear or _flat(before, model))
            and all(calls[name] == 1 for name in names)
            and len(before.users) == 1
            and not read & {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
            and all(places[id(p)] == 1 for p in (*norm.parameters(), *layer.parameters()))
        ):
            found[names[0]] = names[1]
    return found


class _Tracer(fx.Tracer):
    """Traces a batch norm as one call, also one of another library, such as timm's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _has_activation(norm: nn.Module) -> bool:
    """Whether a module is the BatchNormAct2d of timm."""
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.partition(".")[0] == "timm"


def _replacement(norm: _BatchNorm) -> nn.Module:
    """The module in place of a folded batch norm: an Identity; dropout and activation of timm's."""
    if not _has_activation(norm):
        return nn.Identity()
    parts = {"drop": norm.drop, "act": norm.act}
    return nn.Sequential(OrderedDict(cast(dict[str, nn.Module], parts)))


def _matching(norm: _BatchNorm, layer: nn.Module) -> bool:
    """Whether the channels of `norm` are those of `layer`, whose weight is an ordinary one."""
    weight = layer._parameters.get("weight")
    return (
        (
            type(norm) is _FOLDABLE.get(type(layer))
            or (_has_activation(norm) and type(layer) is nn.Conv2d)
        )
        and norm.track_running_stats
        and weight is not None  # the old weight_norm has others
        and norm.num_features == len(weight)
        and not (layer._forward_pre_hooks or layer._forward_hooks)
    )


def _flat(value: object, model: nn.Module) -> bool:
    """Whether a traced value is sure to be [samples, features]: batch norm is along dimension 1,
    a Linear along the last one.
    """
    while isinstance(value, fx.Node) and value.args:
        rest = (*value.args[1:], *value.kwargs.values())
        if value.op == "call_module":
            module = model.get_submodule(str(value.target))
            if isinstance(module, nn.Flatten):
                return (module.start_dim, module.end_dim) == (1, -1)
            if not isinstance(module, _LAYERS_OF_ONE_SHAPE):
                return False
        elif value.target in ("flatten", torch.flatten):
            return rest in ((1,), (1, -1))
        elif value.target in ("view", "reshape"):
            return len(rest) == 2
        elif value.target not in _FUNCTIONS_OF_ONE_SHAPE:
            return False
        value = value.args[0]
    return False


def _bits(name: str, state: Mapping[str, Tensor]) -> int:
    width = state[name]
    if width.dtype != torch.uint8 or width.ndim or int(width) not in BITS:
        raise RuntimeError(f"{name} is damaged: it must be one number of type uint8, from 2 to 8")
    return int(width)


def _channels(name: str, state: Mapping[str, Tensor], weight: Tensor) -> int | None:
    shape = tuple(state[name].shape) if name in state else None
    if shape not in ((), tuple(weight.shape[:1])):
        raise RuntimeError(
            f"{name} is missing or damaged: a weight of shape {[*weight.shape]} has one scale, or "
            "one for each index of its first dimension"
        )
    return len(weight) if shape else None


def skeleton(model: nn.Module) -> nn.Module:
    """A copy without values: its parameters and buffers are on the meta device."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy_model(model, memo)
