"""Error feedback around an average that sends less than its values.

What a rank could not send in one step is added to its values in the next one, so that it is late
instead of lost: Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014, and Karimireddy
et al., Error Feedback Fixes SignSGD, ICML 2019 (arXiv:1901.09847).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.engine.ring import AllReduce
from trainer.engine.transport import Transport


@dataclass(frozen=True)
class Part:
    """Some gradients in a flat tensor, for one `Lossy`, and the ways to the other ranks."""

    shapes: Sequence[torch.Size]  # of the gradients, in the order in which they follow each other
    transport: Transport  # sends tensors to any rank (not with PowerSGD, which only averages)
    all_reduce: AllReduce  # shared by all parts; what travels is rounded to `allreduce.wire`


class Lossy(Protocol):
    """Averages one tensor per step over the ranks, approximately; used by one thread at a time.

    `trainer.testing.lossy` has the tests that every implementation passes.
    """

    @property
    def sent_bytes(self) -> int:
        """Payload that this rank has sent so far, by this or by what it shares with others."""

    def mean_(self, values: Tensor, error: Tensor | None) -> None:
        """Replace `values` by almost their mean over all ranks, with the same bits on every rank.

        Every rank calls it, with the same length in every step. A value that is NaN or infinite on
        one rank must make the mean NaN or infinite on all of them, at least in one place.

        Args:
            values: float32 [n], contiguous.
            error: float32 [n]; gets the part of this rank's values that the result lacks: the mean
                over the ranks of `values - error` is the result, up to rounding. None: not wanted.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, the same on all ranks: tensors and plain values.

        Later steps must not change these tensors in place.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class LossyAllReduce:
    """The average of a part of the gradients, one per step: an `AllReduce` of its own for each.

    Args:
        lossy: Averages the values; may be that of other parts, too, if it has no state.
        error_feedback: Whether what was not sent is added to the values of the next step. This
            needs 4 bytes for each value.
        whole: Averages the values of the first steps.
        whole_steps: Number of these steps.
    """

    def __init__(
        self,
        lossy: Lossy,
        error_feedback: bool,
        whole: AllReduce | None = None,
        whole_steps: int = 0,
    ) -> None:
        self.sent_bytes = 0
        self._lossy = lossy
        self._feeds_back = error_feedback
        self._whole = whole
        self._whole_steps = whole_steps  # that remain
        self._error: Tensor | None = None  # of this rank, not sent so far; None: nothing

    def mean_(self, flat: Tensor) -> None:
        """See `AllReduce`."""
        if self._whole is not None and self._whole_steps > 0:
            self._whole_steps -= 1
            before = self._whole.sent_bytes
            self._whole.mean_(flat)
            self.sent_bytes += self._whole.sent_bytes - before
            return
        values = flat.to(torch.float32)  # itself, if that is its type
        if self._feeds_back:
            if self._error is None:
                self._error = torch.zeros_like(values)
            self._error = self._error.to(values.device)  # a checkpoint's is on the CPU
            values.add_(self._error)
        before = self._lossy.sent_bytes
        self._lossy.mean_(values, self._error)
        self.sent_bytes += self._lossy.sent_bytes - before
        if self._error is not None:  # NaN would come back in every later step
            torch.nan_to_num_(self._error, nan=0.0, posinf=0.0, neginf=0.0)
        if values is not flat:
            flat.copy_(values)

    def rescale(self, factor: float) -> None:
        """Multiply what has not been sent: the loss, and with it the gradient, is scaled anew."""
        if self._error is not None:
            self._error.mul_(factor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs that is the same on all ranks."""
        return {"whole_steps": self._whole_steps, "lossy": self._lossy.state_dict()}

    def rank_state(self) -> dict[str, Any]:
        """What a checkpoint needs of this rank."""
        return {} if self._error is None else {"error": self._error}

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Continue from what `state` and `rank_state` returned; without the latter, from zero."""
        self._whole_steps = state["whole_steps"]
        self._lossy.load_state_dict(state["lossy"])
        if (error := rank_state.get("error")) is not None:
            self._error = error.clone()
