"""Mixed precision: which type the arithmetic has, and how gradients survive it.

Parameters, gradients and optimizer state stay FP32 (the master weights); `autocast` runs the
forward pass in bf16 or fp16 where that is safe. fp16 has 5 exponent bits, so the loss is scaled up
before backward, the gradient is unscaled before clipping and weight decay, and a step whose
gradient holds Inf or NaN is skipped and the scale halved (Micikevicius et al., ICLR 2018). The
decision is taken on the averaged gradient, which has the same bits on every rank: all agree.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from trainer.errors import Diverged

MIN_SCALE = 2.0**-24  # fp16's smallest number: below it every gradient is lost anyway
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class Update:
    """What came of one optimizer step."""

    applied: bool  # False: skipped, the gradient had Inf or NaN
    grad_norm: Tensor | None  # L2 norm before clipping, 0-dim; None where it was not needed


class Precision:
    """Autocast and loss scaling of one run.

    Args:
        name: fp32, bf16 or fp16.
        device: where the model lives; CPU and CUDA behave alike.
        initial_scale: fp16 only: the loss scale to start from; it adapts.
    """

    def __init__(self, name: str, device: torch.device, initial_scale: float = 2.0**16) -> None:
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=initial_scale, enabled=name == "fp16"
        )
        # It makes its tensors when it first scales. A rank whose first share of a batch is empty,
        # after a restart say, would have nothing to scale.
        self.scaler.scale(torch.zeros((), device=device))

    def autocast(self) -> AbstractContextManager[object]:
        """Context for the forward pass and the loss."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.name])

    def backward(self, loss: Tensor) -> None:
        """Accumulate the (scaled) gradient of `loss`, 0-dim."""
        self.scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        clip: float | None,
    ) -> Update:
        """Unscale, clip to an L2 norm of `clip`, and apply or skip the gradient.

        The optimizer is not called for a gradient that is skipped. GradScaler.step would leave that
        to fused kernels, and torch's fused SGD (2.13) then starts from an uninitialised momentum if
        the very first step is skipped, as it often is in fp16.

        Raises:
            Diverged: every gradient has been skipped for so long that it is not the scale's fault.
        """
        if not self.scaler.is_enabled():
            norm = clip_grad_norm_(parameters, clip) if clip is not None else None
            optimizer.step()
            return Update(applied=True, grad_norm=norm)
        self.scaler.unscale_(optimizer)
        norm = clip_grad_norm_(parameters, math.inf if clip is None else clip)
        applied = bool(norm.isfinite())
        if applied:
            optimizer.step()
        self.scaler.update()
        # Asked for only then: on CUDA it waits for the device.
        if not applied and (scale := self.scaler.get_scale()) < MIN_SCALE:
            raise Diverged(
                f"the gradient is NaN or infinite even at a loss scale of {scale:.2g}, whatever "
                "the loss: look for a norm or a root of zero in the model, or train in bf16"
            )
        return Update(applied=applied, grad_norm=norm)
