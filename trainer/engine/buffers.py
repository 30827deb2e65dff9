"""Restores the buffers that forward passes change, if a step cannot be completed."""

import torch
from torch import Tensor, nn


class ForwardBuffers:
    """Values of a model's buffers at the beginning of a step, such as batch norm's statistics.

    Only buffers that forward passes change are copied in each step. They are found in the first
    one: a buffer that its forward and backward passes leave alone counts as constant.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._values: list[Tensor] = []
        self._found = False  # whether `_places` are those that change
        self._in_step = False

    def begin_step(self) -> None:
        """Copy the values."""
        present = [self._get(place) for place in self._places]
        if not self._values:
            self._values = [buffer.clone() for buffer in present]
        elif present:
            torch._foreach_copy_(self._values, present)
        self._in_step = True

    def end_step(self) -> None:
        """The step is complete: `restore` has nothing to restore until the next one begins."""
        self._in_step = False
        if not self._found:
            changed = [
                number
                for number, place in enumerate(self._places)
                if not torch.equal(self._get(place), self._values[number])
            ]
            self._places = [self._places[number] for number in changed]
            self._values = [self._values[number] for number in changed]
            self._found = True

    def restore(self) -> None:
        """Restore the values that the buffers had when the present step began."""
        if self._in_step:
            for place, value in zip(self._places, self._values, strict=True):
                self._get(place).copy_(value)
            self._in_step = False

    @staticmethod
    def _get(place: tuple[dict[str, Tensor | None], str]) -> Tensor:
        buffers, name = place
        buffer = buffers[name]
        assert buffer is not None
        return buffer
