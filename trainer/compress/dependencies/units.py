"""The units of a model: what one forward pass shows to be removable as a whole."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.compress.attention import unfused_attention
from trainer.compress.dependencies.labels import FIXED, Labels, LabelTable
from trainer.compress.dependencies.operators import propagate
from trainer.data.tree import call_with, tensors, tensors_of


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
def removable_units(model: nn.Module, inputs: Any) -> list[Unit]:
    """The units of a model, in the order of its parameters.

    The forward pass is one of evaluation. If it does not use all parameters, because there are
    auxiliary heads, another one follows in training mode.

    Args:
        model: With plain weights; its mode and its buffers are restored afterwards.
        inputs: A batch of at least two samples, on the model's device; several inputs in a tuple
            or mapping.
    """
    tracer = _Tracer(model)
    training = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        tracer.follow(model.eval(), inputs)
        if not tracer.used.issuperset(map(id, model.parameters())):
            model.train()
            for module in model.modules():
                if isinstance(module, _DropoutNd):
                    module.eval()  # its noise belongs to no unit
            tracer.follow(model, inputs)
    finally:
        model.train(training)
        for buffer, before in buffers:
            buffer.copy_(before)
    return tracer.units()


def output_tensors(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a model returns. Attention is not fused; the random state is restored."""
    device = next(tensors(inputs)).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        unfused_attention(),
        torch.autocast(device.type, enabled=False),
    ):
        return tensors_of(call_with(model, inputs))


class _Tracer(TorchDispatchMode):
    """Follows the labels of all dimensions through the operators that run while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._table = LabelTable()
        self._own: list[tuple[str, list[Labels]]] = []  # of parameters and buffers
        self.used: set[int] = set()  # ids of all arguments of operators
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            labels = [self._table.new(size) for size in tensor.shape]
            self._table.set(tensor, labels)
            self._own.append((name, labels))

    def follow(self, model: nn.Module, inputs: Any) -> None:
        """Run a model. What it returns must stay."""
        with self:
            outputs = output_tensors(model, inputs)
        for output in outputs:
            self._table.fix_tensor(output)

    def units(self) -> list[Unit]:
        """The sets of merged labels that need not stay."""
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
        self.used.update(map(id, tree_leaves((args, kwargs))))
        result = func(*args, **kwargs)
        propagate(self._table, func, args, kwargs, result)
        return result
