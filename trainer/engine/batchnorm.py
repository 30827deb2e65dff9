"""Batch norm over the samples of all workers, on the CPU as on CUDA.

Without it every worker normalizes its own share of a batch, and N workers do not train like one.
(torch.nn.SyncBatchNorm runs on CUDA alone, and needs the layers of the model to be replaced.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trainer.engine.ring import RingAllReduce
from trainer.engine.world import World

_SEGMENT_BYTES = 1024 * 1024


class SyncBatchNorm(TorchFunctionMode):
    """A context for the forward pass, in which batch norm in training mode covers all ranks.

        with sync, precision.autocast():
            loss = objective(...)

    It replaces `torch.nn.functional.batch_norm`, so the layers, their names and their statistics
    stay as they are. All ranks must call the same batch norms in the same order. Loss, gradients
    and running statistics are those of one worker with all the samples, up to rounding (Ioffe &
    Szegedy, Batch Normalization, ICML 2015, arXiv:1502.03167).

    Attributes:
        counts: Whether this rank's samples count. A rank without samples in a micro-batch passes a
            substitute through the model, so that it takes part in the sums of the others.

    Args:
        world: The ranks. All of them construct this at the same time.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.counts = True
        self._world = world
        self._ring: RingAllReduce | None = None
        if world.device.type == "cpu" and world.size > 1:
            # The reducer uses the other transport at the same time, from another thread.
            self._ring = RingAllReduce(world.side_transport(), torch.float64, _SEGMENT_BYTES)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.batch_norm and self._world.size > 1:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def sum_(self, values: Tensor) -> None:
        """Replace `values`, float64 and 1-D, by their sum over all ranks."""
        if self._ring is None:
            self._world.native_all_reduce(values)
            return
        with self._world.heartbeat.busy():
            self._ring.sum_(values)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.batch_norm`, over the samples of all ranks in training mode."""
        if not training:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        normalized: Tensor
        normalized, mean, variance, count = _Normalize.apply(input, weight, bias, eps, self)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = variance * (count / (count - 1).clamp_min(1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return normalized


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the statistics of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        sync: SyncBatchNorm,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        sums = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        if sync.counts:
            variance, mean = torch.var_mean(_wide(x), _other_dimensions(x), correction=0)
            sums[:channels] = mean
            sums[channels:-1] = variance.double() + mean.double().square()
            sums[-1] = 1
            sums *= x.numel() // channels
        sync.sum_(sums)
        count = sums[-1]
        mean = sums[:channels] / count
        # In float64 the difference is exact enough even where the mean is a million deviations.
        variance = (sums[channels:-1] / count - mean.square()).clamp_min_(0)
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        saved_mean, inverse = mean.to(kind), (variance + eps).rsqrt().to(kind)
        normalized = F.batch_norm(x, saved_mean, variance.to(kind), weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, saved_mean, inverse, count)
        ctx.eps, ctx.sync, ctx.counts = eps, sync, sync.counts
        ctx.mark_non_differentiable(mean, variance, count)
        return normalized, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *unused: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        kind, channels = mean.dtype, len(mean)
        shape = (1, channels, *[1] * (x.ndim - 2))
        # With x' = (x - mean) / deviation, the sums over grad * x' and over grad.
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            _wide(grad), _wide(x), None, None, None, mean, inverse, True, ctx.eps,
            [False, True, True],
        )  # fmt: skip
        sums = torch.cat((of_weight, of_bias)).double()
        if not ctx.counts:
            sums.zero_()
        ctx.sync.sum_(sums)
        if ctx.counts:
            with_x, alone = (sums / count).to(kind).split(channels)
            # grad_x = (grad - alone - x' with_x) weight / deviation, in one pass each.
            factor = inverse if weight is None else inverse * weight.to(kind)
            slope = -factor * inverse * with_x
            offset = -factor * alone - slope * mean
            grad_x = torch.addcmul(offset.view(shape), _wide(grad), factor.view(shape))
            grad_x = grad_x.addcmul_(_wide(x), slope.view(shape)).to(x.dtype)
        else:
            grad_x = torch.zeros_like(x)
        if weight is None:
            return grad_x, None, None, None, None
        return grad_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    """`x`, in float32 if its type has fewer bits."""
    return x.float() if x.dtype.itemsize < 4 else x


def _other_dimensions(x: Tensor) -> list[int]:
    """All dimensions except that of the channels, which is 1."""
    return [0, *range(2, x.ndim)]
