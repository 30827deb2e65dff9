"""A model's state as named tensors and back: what checkpoints and model files hold.

A file of tensors does not hold everything that `state_dict` returns. Extra state
(`nn.Module.get_extra_state`) that is not a tensor is kept as JSON in a tensor of bytes, under its
name with ".json" appended. The version numbers of modules are not kept: `load_state` takes those
of the model that it loads into.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer.errors import ConfigError

_EXTRA = "_extra_state"  # the last part of the name that state_dict gives to extra state
_JSON = ".json"


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of `model` as tensors; they share memory with the model.

    Raises:
        ConfigError: an entry that no file can hold; the message names it.
    """
    return pack_state(model.state_dict())


def pack_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """`state`, with extra state that is not a tensor as JSON in a tensor of bytes.

    Args:
        state: a state_dict.

    Raises:
        ConfigError: an entry that is sparse or lazy, or neither a tensor nor extra state that JSON
            keeps exactly.
    """
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            packed[name + _JSON] = _to_bytes(name, value)
        elif value.layout is not torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise ConfigError(
                f"model: {name} is a sparse tensor ({layout}), which checkpoints cannot hold: make "
                "it dense, such as with to_dense()"
            )
        elif is_lazy(value):
            raise ConfigError(
                f"model: {name} has no shape yet: give its lazy layer a size, or run the model once"
            )
        else:
            packed[name] = value
    return packed


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the tensors of `model_state` into a model of the same structure.

    Values are converted to the types of the model only within one kind: floating-point, complex,
    integer or bool.

    Args:
        state: of `model_state`; a plain state_dict works as well.

    Raises:
        RuntimeError: names, shapes or kinds of types differ, or extra state is damaged.
    """
    wanted = model.state_dict()
    unpacked: OrderedDict[str, Any] = OrderedDict()
    for name, value in state.items():
        if is_packed(name):
            unpacked[name.removesuffix(_JSON)] = _from_bytes(name, value)
            continue
        target = wanted.get(name)
        if isinstance(target, Tensor) and kind_of(target) != kind_of(value):
            raise RuntimeError(f"{name}: {type_name(value)} cannot become {type_name(target)}")
        unpacked[name] = value
    metadata = getattr(state, "_metadata", None) or getattr(wanted, "_metadata", None)
    unpacked._metadata = metadata  # type: ignore[attr-defined]
    model.load_state_dict(unpacked)


def is_packed(name: str) -> bool:
    """Whether an entry of `pack_state` is extra state as JSON: its shape may change."""
    return name.endswith(_EXTRA + _JSON)


def kind_of(tensor: Tensor) -> str:
    """The kind of numbers in a tensor: floating-point, complex, bool or integer."""
    if tensor.is_floating_point():
        return "floating-point"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype is torch.bool else "integer"


def type_name(tensor: Tensor) -> str:
    """ "float32" for a tensor of type torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def _to_bytes(name: str, value: object) -> Tensor:
    reason = f"a {type(value).__name__}"
    if name.endswith(_EXTRA):
        try:
            text = json.dumps(value)
            if _same(json.loads(text), value):
                return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        except (TypeError, ValueError):
            pass
        reason = f"{reason} that JSON does not keep exactly"
    raise ConfigError(
        f"model: {name} in its state_dict is {reason}; checkpoints hold tensors, and extra state "
        "of None, bool, int, float, str, list and dict with str keys"
    )


def _same(one: object, other: object) -> bool:
    """Whether two values are equal, types included: JSON turns a tuple into a list."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        pair = cast(list[Any], other)
        return len(one) == len(pair) and all(map(_same, one, pair))
    if isinstance(one, dict):
        items = cast(dict[Any, Any], other)
        return one.keys() == items.keys() and all(_same(one[key], items[key]) for key in one)
    return one == other or (one != one and other != other)  # NaN is not equal to itself


def _from_bytes(name: str, value: Tensor) -> object:
    try:
        return json.loads(value.cpu().numpy().tobytes())
    except (ValueError, RecursionError, TypeError) as error:
        raise RuntimeError(f"{name} is damaged: it is not JSON") from error
