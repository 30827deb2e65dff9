"""What quantization changes in the structure of a model: batch norm is folded into the layer before
it, an LSTM is made of Linears, layers get quantizers.

Nothing needs to be recorded beside the weights: their names say which changes were made, and
`conform` makes them on a fresh model.
"""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.compress.lstm import LinearLSTM, convertible
from trainer.compress.quantize import ActivationQuantizer, WeightQuantizer, attach
from trainer.errors import ConfigError, first_line

_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give `model` the structure and the values that it had when `state` was taken from it.

        model = restore(LeNet5(), trainer.artifact.load("model.dcz"))

    Args:
        model: of the same class and settings, as it was built; changed in place and returned.
        state: a state_dict; of a model that was not quantized, `load_state_dict` does the same.

    Raises:
        RuntimeError: the state_dict is that of another model.
    """
    conform(model, state)
    model.load_state_dict(state)
    return model


def conform(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The structure alone; a state_dict without quantizers leaves it as it is."""
    if not any(name.endswith("_quantizer.width") for name in state):
        return
    for name, module in list(model.named_modules()):
        if convertible(module) and f"{name}.layers.0.ih.weight" in state:
            model.set_submodule(name, LinearLSTM(module))
        elif isinstance(module, _BatchNorm) and not any(
            f"{name}.{key}" in state for key in module.state_dict()
        ):
            model.set_submodule(name, nn.Identity())
    for name, module in model.named_modules():
        if isinstance(module, _FOLDABLE) and module.bias is None and f"{name}.bias" in state:
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
    shared: dict[int, WeightQuantizer] = {}
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if (width := state.get(f"{name}.weight_quantizer.width")) is not None:
            scale = state[f"{name}.weight_quantizer.scale"]
            quantizer = WeightQuantizer(int(width), len(scale) if scale.ndim else None)
            attach(module, "weight", shared.setdefault(id(weight), quantizer))
        for kind in ("input", "output"):
            if (width := state.get(f"{name}.{kind}_quantizer.width")) is not None:
                attach(module, kind, ActivationQuantizer(int(width)))


def unroll_lstms(model: nn.Module) -> None:
    """Make every LSTM of Linear layers but bidirectional and projected ones, in place."""
    for name, module in list(model.named_modules()):
        if name and convertible(module):
            model.set_submodule(name, LinearLSTM(module))


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm into the convolution or Linear that alone feeds it, in place.

    y = gamma * (w x + b - mean) / sqrt(var + eps) + beta, with the running statistics; the batch
    norm becomes an Identity. A zero weight stays zero. Raises as `foldable`.
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
        weight.copy_(weight * factor.view(-1, *[1] * (weight.ndim - 1)))
        layer.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
        model.set_submodule(norm_name, nn.Identity())


def foldable(model: nn.Module) -> dict[str, str]:
    """The layer that each batch norm can be folded into, by the names of both.

    Raises:
        ConfigError: there are batch norms, and torch.fx cannot follow the model.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return {}
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's code raises
        raise ConfigError(
            "fold=true: it cannot be found out which layer each batch norm follows, since torch.fx "
            f"cannot trace {type(model).__name__} ({first_line(error)}): set fold=false"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {node.target for node in calls if sum(n.target == node.target for n in calls) == 1}
    found = {}
    for node in calls:
        norm = model.get_submodule(str(node.target))
        before = node.args[0] if node.args else None
        if (
            isinstance(norm, _BatchNorm)
            and norm.track_running_stats
            and isinstance(before, fx.Node)
            and {node.target, before.target} <= once
            and len(before.users) == 1
            and isinstance(model.get_submodule(str(before.target)), _FOLDABLE)
        ):
            found[str(node.target)] = str(before.target)
    return found


def skeleton(model: nn.Module) -> nn.Module:
    """A copy without values: its parameters and buffers are on the meta device."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
