"""Batches of samples whose tensors differ in length."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainer.data.split import IGNORED
from trainer.data.tree import merge


class Pad:
    """Pads the first dimension of all tensors to the longest of the batch.

    Targets that are single numbers are stacked. A batch is as long as its longest sample, so with
    several workers each pads its own share; the model must not be influenced by padding.

    Args:
        value: Padding of inputs; for inputs that are mappings, also a mapping by the name of the
            input, in which missing names mean 0.
        target: Padding of targets; the default does not count in loss and metrics.
    """

    def __init__(self, value: float | Mapping[str, float] = 0, target: float = IGNORED) -> None:
        self.value = value
        self.target = target

    def __call__(self, samples: Sequence[tuple[Any, Any]]) -> tuple[Any, Tensor]:
        """Batch of samples (input, target).

        Raises:
            ValueError: The inputs of samples have different structures.
        """
        first, _ = samples[0]
        inputs = [value for value, _ in samples]
        merged: Any
        if isinstance(first, Mapping):
            merged = merge(lambda items: items, inputs)
            merged = {key: self._pad_input(key, items) for key, items in merged.items()}
        else:
            merged = merge(partial(_padded, value=self._value_of("")), inputs)
        return merged, _padded([torch.as_tensor(target) for _, target in samples], self.target)

    def _pad_input(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        return _padded(tensors, self._value_of(name))

    def _value_of(self, name: str) -> float:
        return self.value.get(name, 0) if isinstance(self.value, Mapping) else self.value


def _padded(tensors: Sequence[Tensor], value: float) -> Tensor:
    if tensors[0].ndim == 0:
        return torch.stack(list(tensors))
    return pad_sequence(list(tensors), batch_first=True, padding_value=value)
