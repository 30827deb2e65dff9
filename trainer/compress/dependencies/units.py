"""The units of a model: what one forward pass shows to be removable as a whole."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.compress.attention import unfused_attention
from trainer.compress.dependencies.labels import FIXED, Labels, LabelTable
from trainer.compress.dependencies.operators import propagate


@dataclass(frozen=True)
class Part:
    """Positions along a dimension of a parameter or buffer that belong to one unit."""

    name: str  # in the state_dict
    dim: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """What is removed as a whole: a channel, a hidden unit, an attention head."""

    parts: tuple[Part, ...]

    @property
    def dimensions(self) -> frozenset[tuple[str, int]]:
        """The dimensions that it is removed from: units of one layer have the same ones."""
        return frozenset((part.name, part.dim) for part in self.parts)


@torch.no_grad()
def removable_units(model: nn.Module, inputs: Tensor) -> list[Unit]:
    """The units of a model, in the order of its parameters.

    Args:
        model: With plain weights; its mode is restored afterwards.
        inputs: A batch of at least two samples, on the model's device.
    """
    tracer = _Tracer(model)
    training = model.training
    try:
        model.eval()
        with unfused_attention(), torch.autocast(inputs.device.type, enabled=False), tracer:
            outputs = model(inputs)
    finally:
        model.train(training)
    return tracer.units(outputs)


class _Tracer(TorchDispatchMode):
    """Follows the labels of all dimensions through the operators that run while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._table = LabelTable()
        self._own: list[tuple[str, list[Labels]]] = []  # of parameters and buffers
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            labels = [self._table.new(size) for size in tensor.shape]
            self._table.set(tensor, labels)
            self._own.append((name, labels))

    def units(self, outputs: Any) -> list[Unit]:
        """The sets of merged labels that need not stay, given the outputs of the model."""
        for leaf in tree_leaves(outputs):
            self._table.fix_tensor(leaf)
        parts: dict[int, list[Part]] = {}
        for name, dims in self._own:
            for dim, labels in enumerate(dims):
                roots = self._table.roots(labels)
                for root in dict.fromkeys(roots.tolist()):
                    if root != FIXED:
                        positions = tuple(np.flatnonzero(roots == root).tolist())
                        parts.setdefault(root, []).append(Part(name, dim, positions))
        # What only one parameter has was never multiplied with anything.
        return [Unit(tuple(found)) for found in parts.values() if len(found) > 1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        propagate(self._table, func, args, kwargs, result)
        return result
