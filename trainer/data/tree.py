"""Batches of one or several tensors: a tensor, or a tuple, list or mapping of such values.

The inputs of a model with several arguments are a tuple (positional arguments) or a mapping
(keyword arguments).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor; other values are returned unchanged.

    Args:
        function: From tensor to tensor.
        value: A tensor, or a tuple, list or mapping of values. Mappings become dicts.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, PackedSequence):  # its batch_sizes stay on the CPU
        data, sizes, *orders = value
        return PackedSequence(function(data), sizes, *(map_tensors(function, i) for i in orders))
    if isinstance(value, tuple | list):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def first_samples(inputs: Any, count: int) -> Any:
    """The first samples of a batch; the whole batch if they are not its rows, as of graphs."""
    lengths = {tensor.shape[:1] for tensor in tensors(inputs)}
    if len(lengths) > 1 or torch.Size([]) in lengths or isinstance(inputs, PackedSequence):
        return inputs
    return map_tensors(lambda tensor: tensor[:count], inputs)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, as `map_tensors` visits them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def call_with(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with the inputs of a batch.

    Args:
        model: The model.
        inputs: A tensor or PackedSequence is the argument, a tuple or list the positional ones, a
            mapping those by keyword.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors that a model returned, also those in the attributes of an object."""
    return list(tensors(output)) or list(tensors(attributes(output)))


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object by name, also of a dataclass with slots."""
    if not hasattr(value, "__dict__") and dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))


def merge(function: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> Any:
    """Apply a function to the corresponding leaves of values with the same structure.

    Args:
        function: From a sequence of leaves, one of each value, to one.
        values: At least one.

    Raises:
        ValueError: The structures differ.
    """
    first = values[0]
    if isinstance(first, Mapping):
        if any(not isinstance(v, Mapping) or v.keys() != first.keys() for v in values):
            raise ValueError(f"not all are mappings with the keys {', '.join(map(str, first))}")
        return {key: merge(function, [value[key] for value in values]) for key in first}
    if isinstance(first, tuple | list):
        if any(not isinstance(v, tuple | list) or len(v) != len(first) for v in values):
            raise ValueError(f"not all are sequences of {len(first)} values")
        return tuple(merge(function, items) for items in zip(*values, strict=True))
    return function(values)


def describe(value: Any) -> str:
    """Types and shapes of the tensors of a batch without its first dimension, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {[*value.shape[1:]]}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {describe(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(describe(item) for item in value)
    return type(value).__name__
