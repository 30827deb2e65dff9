"""Outputs of models: finds the prediction and the auxiliary outputs in them."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.data.tree import attributes

PREDICTIONS = ("logits", "out", "prediction", "predictions")
"""Names of the prediction in outputs with names: of transformers, of torchvision's segmentation."""


def prediction(output: Any, wanted: str | int | None = None) -> Tensor:
    """The prediction in a model's output.

    Args:
        output: A tensor; a tuple, whose first element is the prediction; or a mapping or an object
            with named values, where it is the first of `PREDICTIONS` that there is.
        wanted: The key, attribute or position of the prediction, if it is another one.

    Raises:
        ValueError: There is no such tensor.
    """
    found = output
    if wanted is not None:
        found = _entry(output, wanted)
    elif not isinstance(output, Tensor):
        named = dict(_named(output))
        present = [name for name in PREDICTIONS if name in named]
        if present:
            found = named[present[0]]
        elif isinstance(output, tuple | list) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        where = "" if wanted is None else f" with {wanted!r} being a {type(found).__name__}"
        raise ValueError(
            f"{describe(output)}{where}; set task.output to the name or position of the prediction"
        )
    return found


def auxiliary(output: Any) -> list[Tensor]:
    """The predictions of auxiliary heads: tensors whose name begins with "aux".

    torchvision's Inception, GoogLeNet and segmentation networks return them in training mode.
    """
    return [value for name, value in _named(output) if name.startswith("aux")]


def model_loss(output: Any) -> Tensor:
    """The loss that a model computed itself: `loss` of its output.

    Raises:
        ValueError: There is none, or it is not 0-dim.
    """
    found = dict(_named(output)).get("loss")
    if found is None:
        raise ValueError(
            f"{describe(output)} without a loss, which must be in it in training and in "
            "evaluation; the model gets the targets if task.target_argument is set, such as to "
            "labels"
        )
    if found.ndim:
        raise ValueError(
            f"{describe(output)} with a loss {[*found.shape]}; it must be the mean of the batch, "
            "of no dimension"
        )
    return found


def in_float(output: Any) -> Any:
    """An output whose float16 and bfloat16 tensors are float32, of the same type as `output`."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if isinstance(output, tuple | list):
        items = [in_float(item) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        for key, item in output.items():
            changed[key] = in_float(item)  # type: ignore[index]
        return changed
    named = attributes(output)
    changed = copy.copy(output) if named else output
    for name, item in named.items():
        if isinstance(item, Tensor | tuple | list | Mapping):
            object.__setattr__(changed, name, in_float(item))  # it may be frozen
    return changed


def describe(output: Any) -> str:
    """The output of a model as text, for messages."""
    if isinstance(output, Tensor):
        return str([*output.shape])
    names = [name for name, _ in _named(output)]
    return f"{type(output).__name__} ({', '.join(names)})" if names else type(output).__name__


def _entry(output: Any, key: str | int) -> Any:
    if isinstance(output, Mapping):
        return output.get(key)
    if isinstance(key, int):
        whole = isinstance(output, tuple | list) and -len(output) <= key < len(output)
        return output[key] if whole else None
    return getattr(output, key, None)


def _named(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output that have names."""
    if isinstance(output, Mapping):
        items = list(output.items())
    elif hasattr(output, "_fields"):
        items = [(name, getattr(output, name)) for name in output._fields]
    elif isinstance(output, Tensor | tuple | list):
        items = []
    else:
        items = list(attributes(output).items())
    for name, value in items:
        if isinstance(value, Tensor):
            yield str(name), value
