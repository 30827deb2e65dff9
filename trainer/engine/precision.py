"""Mixed precision: the type of the arithmetic, and the scaling that gradients need in fp16.

Parameters, gradients and optimizer state stay in the type of the model, usually FP32 (the master
weights); `autocast` runs the forward pass in bf16 or fp16 where that is safe. fp16 has 5 exponent
bits, so the loss is multiplied by a scale before backward, the gradient is divided by it before
clipping and weight decay, and a step whose gradient holds Inf or NaN is skipped and halves the
scale (Micikevicius et al., Mixed Precision Training, ICLR 2018, arXiv:1710.03740). The decision
depends on the averaged gradient alone, whose bits are the same on every rank, so all ranks agree.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from trainer.compress.attention import without_fast_path
from trainer.engine.half import HalfProducts
from trainer.errors import Diverged

MIN_SCALE = 2.0**-24  # fp16's smallest positive number: below it every gradient becomes zero
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class Update:
    """The outcome of one optimizer step."""

    applied: bool  # False: skipped, because the gradient held Inf or NaN, or there was none
    grad_norm: Tensor | None  # L2 norm before clipping, 0-dim; None where it was not computed


class Precision:
    """Autocast and loss scaling of one run. The loss scale adapts, and lasts for all phases.

    Args:
        name: fp32, bf16 or fp16.
        device: Where the model lives; the CPU and CUDA behave alike.
        initial_scale: Of the loss, for fp16.
    """

    def __init__(self, name: str, device: torch.device, initial_scale: float = 2.0**16) -> None:
        self.name = name
        self.device = device
        if device.type == "cuda":
            set_tf32(name != "fp32")
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=initial_scale, enabled=name == "fp16"
        )
        # The scaler creates its tensors when it scales for the first time, but a rank whose share
        # of the first batch is empty scales nothing.
        self._scaler.scale(torch.zeros((), device=device))

    def autocast(self) -> AbstractContextManager[object]:
        """Context for the forward pass and the loss."""
        if self.name == "fp32":
            return nullcontext()
        if self.device.type == "cpu":
            return _half_on_cpu() if self.name == "fp16" else _bf16_on_cpu()
        return torch.autocast(self.device.type, dtype=DTYPES[self.name])

    def state(self) -> dict[str, Any]:
        """The loss scale and its history, as plain numbers; empty without loss scaling."""
        return self._scaler.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._scaler.load_state_dict(dict(state))

    @property
    def scale(self) -> float:
        """The factor on the loss; 1 without loss scaling. On CUDA this waits for the device."""
        return self._scaler.get_scale()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, 0-dim, multiplied by the scale."""
        self._scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        clip: float | None,
    ) -> Update:
        """Unscale the gradient, clip it to an L2 norm of `clip`, and apply or skip it.

        A parameter whose `.grad` is None stays as it is, weight decay included.

        Raises:
            Diverged: Every gradient has been skipped until the scale was too small to matter.
        """
        parameters = [p for p in parameters if p.grad is not None]
        if not parameters:
            return Update(applied=False, grad_norm=None)
        if not self._scaler.is_enabled():
            norm = None if clip is None else _clip(parameters, clip)
            optimizer.step()
            return Update(applied=True, grad_norm=norm)
        self._scaler.unscale_(optimizer)
        norm = _clip(parameters, clip)
        applied = bool(norm.isfinite())
        # GradScaler.step would leave the decision to fused kernels, and torch's fused SGD (2.13)
        # starts from an uninitialized momentum if the very first step is skipped.
        if applied:
            optimizer.step()
        self._scaler.update()
        if not applied and (scale := self.scale) < MIN_SCALE:
            raise Diverged(
                f"the gradient is NaN or infinite even at a loss scale of {scale:.2g}: the model "
                "may divide by zero or take a root or a norm of zero; change that, or train in bf16"
            )
        return Update(applied=applied, grad_norm=norm)


@contextmanager
def _half_on_cpu() -> Iterator[None]:
    with torch.autocast("cpu", torch.float16), HalfProducts():
        yield


@contextmanager
def _bf16_on_cpu() -> Iterator[None]:
    # Nested tensors fail under autocast on CPUs (torch 2.14), and on CUDA torch avoids them.
    with torch.autocast("cpu", torch.bfloat16), without_fast_path():
        yield


def set_tf32(enabled: bool) -> None:
    """Set whether CUDA rounds the factors of fp32 products to TF32, which has 10 bits of mantissa.

    PyTorch's default is to do so in convolutions and not in matrix products. Here fp32 is 32-bit
    arithmetic throughout, and what bf16 and fp16 leave in fp32 may be rounded.
    (https://docs.pytorch.org/docs/stable/notes/cuda.html)
    """
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def _clip(parameters: list[nn.Parameter], clip: float | None) -> Tensor:
    """Scale the gradients down to an L2 norm of `clip`; returns their norm before, 0-dim.

    The norm is infinite or NaN only if a gradient is: squares that exceed the range of the
    gradient's type are summed again in float64.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = get_total_norm(gradients)
    if bool(norm.isfinite()):
        if clip is not None:
            clip_grads_with_norm_(parameters, clip, norm)
        return norm
    largest = torch.stack([g.abs().amax().double() for g in gradients if g.numel()]).amax()
    if not bool(largest.isfinite()):
        return norm
    parts = [torch.linalg.vector_norm(g.double() / largest) for g in gradients]
    norm = largest * torch.linalg.vector_norm(torch.stack(parts))
    if clip is not None:
        factor = min(1.0, clip / norm.item())
        for gradient in gradients:
            gradient.copy_(gradient.double() * factor)
    return norm
