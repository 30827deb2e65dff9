"""Put compressions on a model's weights, and fold them back to plain parameters."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from trainer.compress.parametrize import Compression, compression
from trainer.compress.select import ParameterRef, parameters


def install(model: nn.Module, compressions: Mapping[str, Compression]) -> None:
    """Let each named weight be computed by its compression from a new, trainable parameter.

    The parameters of the model are others afterwards: build optimizer and reducer after this. A
    tied weight stays tied: all its places share one trainable parameter and one compression.

    Args:
        compressions: by logical name (trainer.compress.select.parameters), one of its own each.

    Raises:
        ValueError: an unknown name, or a weight that is compressed already.
    """
    places = parameters(model)
    for name in compressions:
        if name not in places:
            raise ValueError(f"no weight is named {name!r}; there are {', '.join(places)}")
        if compression(*places[name][0]) is not None:
            raise ValueError(f"{name} is compressed already: fold the model first")
    for name, new in compressions.items():
        weight = places[name][0].value
        with torch.no_grad():
            trainable = nn.Parameter(new.initial_trainable(weight), weight.requires_grad)
        for place in places[name]:
            _install(place, new, trainable)


def _install(place: ParameterRef, new: Compression, trainable: nn.Parameter) -> None:
    module, name = place
    order = list(module._parameters)
    module._parameters[name] = trainable
    register_parametrization(module, name, new, unsafe=True)
    # An empty slot keeps the weight's position for fold, and with it the order of the state_dict.
    slots = {key: module._parameters.get(key) for key in order}
    module._parameters.clear()
    module._parameters.update(slots)
    if isinstance(module, nn.RNNBase):
        # torch refreshes the list of an RNN's weights itself, but reads each of them four times.
        new.handles.append(module.register_forward_pre_hook(new.before_forward))
        new.handles.append(module.register_forward_hook(new.after_forward, always_call=True))
        new.handles.append(module.register_forward_hook(_forget_weights, always_call=True))


def fold(model: nn.Module) -> None:
    """Turn every compressed weight into a plain parameter of the value that it has.

    Names, order, type, memory format, requires_grad and ties are those from before `install`. The
    parameters of the model are others afterwards.
    """
    for places in parameters(model).values():
        new = compression(*places[0])
        if new is None:
            continue
        weight = places[0].value
        plain = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        for handle in new.handles:
            handle.remove()
        for module, name in places:
            _own_class(module)
            remove_parametrizations(module, name, leave_parametrized=False)
            module._parameters[name] = plain
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    A deep copy shares the class of the original, from which torch deletes the attribute of a folded
    weight.
    """
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _forget_weights(module: nn.Module, inputs: object, output: object) -> None:
    """Forward hook: an RNN must not keep computed weights, or it could not be copied."""
    rnn = cast(nn.RNNBase, module)
    rnn._flat_weights = [None] * len(rnn._flat_weights_names)
