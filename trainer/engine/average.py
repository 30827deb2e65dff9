"""An exponential moving average of a model's weights, which often generalizes better than the last.

It is taken of the trainable values, so that it keeps what a phase preserves: pruned weights stay
zero, shared ones keep few values, quantized ones stay on their grid.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class WeightAverage:
    """The moving average of all parameters and of batch norm's running statistics.

    After n updates the next one has the weight 1 - min(decay, (1 + n) / (10 + n)), so that the
    first, untrained weights are forgotten soon, as in TensorFlow's ExponentialMovingAverage. Values
    of fewer than 32 bits are averaged in float32. Parameters are equal on all ranks, and so are
    their averages; running statistics differ, and so do theirs, until `evaluate` replaces them by
    those of rank 0.

    Args:
        model: As it is trained; its parameters may be those of compressed weights.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self._current = dict(_averaged(model))
        self._average = {
            name: value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in self._current.items()
        }

    def update(self) -> None:
        """Add the present weights. Call it after each optimizer step that was applied."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averages = list(self._average.values())
        values = [
            value.to(average.dtype)
            for value, average in zip(self._current.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, values, 1 - decay)

    def apply(self) -> None:
        """Replace the model's weights by their averages."""
        for name, value in self._current.items():
            value.copy_(self._average[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model has the averages as its weights."""
        before = {name: value.clone() for name, value in self._current.items()}
        self.apply()
        try:
            yield
        finally:
            for name, value in self._current.items():
                value.copy_(before[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"updates": self._updates, "values": self._average}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned, with a model of the same structure."""
        self._updates = state["updates"]
        for name, average in self._average.items():
            average.copy_(state["values"][name])


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            yield name, parameter.detach()
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase):
            for name in ("running_mean", "running_var"):
                value = getattr(module, name)
                if value is not None:
                    yield f"{prefix}.{name}", value
