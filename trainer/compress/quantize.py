"""Fake quantization: numbers are rounded to a grid of integers times a scale, and stay floats.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, CVPR 2018, arXiv:1712.05877. The gradient passes straight through the rounding, and is
zero where a number lies beyond the grid (Bengio et al. 2013, arXiv:1308.3432).

A quantizer is a child of the layer that it serves: `weight_quantizer` for its parameter `weight`,
`input_quantizer` or `output_quantizer`. Its grid is in the state_dict. Quantizers of inputs and
outputs run whenever the layer is called. The quantizer of a weight only says, once training is
over, which grid the weight is on.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.errors import Diverged

BITS = range(2, 9)

INPUT, OUTPUT = "input", "output"
"""What `attach` calls the first argument of a layer and its result."""

_MIN_SCALE = 1e-12  # scale: below it, its inverse would not be finite in fp32 arithmetic
_MIN_CHANNEL_SCALE = 1e-4  # scale of a channel, as a fraction of the weight's largest one


class Quantizer(nn.Module):
    """A grid of 2^bits integers, or one fewer."""

    width: Tensor

    def __init__(self, bits: int) -> None:
        """Raises ValueError where `bits` is not 2 to 8."""
        super().__init__()
        if bits not in BITS:
            raise ValueError(f"bits={bits}: it must be 2 to 8")
        self.bits = bits
        self.handles: list[RemovableHandle] = []  # of the hooks that call it
        self.register_buffer("width", torch.tensor(bits, dtype=torch.uint8))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.width.is_meta:
            self.bits = int(self.width)


class WeightQuantizer(Quantizer):
    """Symmetric: the integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1 times the scale.

    Zero is on the grid, so a pruned weight stays zero; with one scale per tensor, weights that are
    equal stay equal.
    """

    scale: Tensor

    def __init__(self, bits: int, channels: int | None = None) -> None:
        """Args: channels: size of the weight's first dimension, for a scale each; None: one."""
        super().__init__(bits)
        self.register_buffer("scale", torch.ones(() if channels is None else (channels,)))

    @property
    def max_integer(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1

    @torch.no_grad()
    def calibrate(self, weight: Tensor) -> None:
        """Take the scale of least squared error for `weight`, clipping what is far out.

        A channel that is empty, or as good as that, takes a small fraction of the largest scale.
        Raises Diverged where `weight` has Inf or NaN.
        """
        if not bool(weight.isfinite().all()):
            raise Diverged("weights are Inf or NaN: the training before the quantization diverged")
        rows = weight.float().reshape(self.scale.numel(), -1)
        limit = self.max_integer
        top = rows.abs().amax(1, keepdim=True) / limit
        floor = (_MIN_CHANNEL_SCALE * top.amax()).clamp_min(_MIN_SCALE)
        least = torch.full_like(top, math.inf)
        best = torch.where(top.amax() > 0, floor, torch.ones_like(top))
        for part in torch.linspace(1, 0.25, 26).tolist():
            scale = (top * part).clamp_min(floor)
            rounded = (rows / scale).round_().clamp_(-limit, limit).mul_(scale)
            error = rounded.sub_(rows).square_().sum(1, keepdim=True)
            best = torch.where((error < least) & (top > 0), scale, best)
            least = torch.minimum(error, least)
        self.scale.copy_(best.view(self.scale.shape))

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` [channels, ...] on the grid, float32."""
        zero = torch.zeros_like(self.scale, dtype=torch.int32)
        if self.scale.ndim:
            made = torch.fake_quantize_per_channel_affine(
                weight, self.scale, zero, 0, -self.max_integer, self.max_integer
            )
        else:
            made = torch.fake_quantize_per_tensor_affine(
                weight, self.scale, zero, -self.max_integer, self.max_integer
            )
        return _keep_nan(made, weight)


class ActivationQuantizer(Quantizer):
    """Affine: the integers 0 to 2^bits - 1 spread over [minimum, maximum], which holds zero.

    While it trains it notes the extremes of what it sees, but where they are infinite or NaN;
    `trainer.phases.Quantize` lets the range follow those of all ranks. Until it has a range it
    changes nothing, so that the first step does not depend on how a batch is shared out.

    Attributes:
        ready: whether it has a range.
    """

    range: Tensor
    seen: Tensor
    ready: bool

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("range", torch.full((2,), math.nan))
        self.register_buffer("seen", torch.full((2,), math.nan), persistent=False)
        self.ready = False

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.range.is_meta:
            self.ready = not self.empty

    @property
    def max_integer(self) -> int:
        """The largest integer of the grid."""
        return (1 << self.bits) - 1

    @property
    def empty(self) -> bool:
        """Whether it saw nothing, or nothing but zero: that is no range to spread a grid over."""
        return not bool(self.range[1] > self.range[0])

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), both 0-dim."""
        low, high = self.range.unbind()
        scale = ((high - low) / self.max_integer).clamp_min(_MIN_SCALE)
        zero_point = (-low / scale).round().clamp(0, self.max_integer)
        return scale, zero_point.int()

    @torch.no_grad()
    def update_range(self, seen: Tensor, momentum: float) -> None:
        """Move the range by `momentum` towards `seen` [minimum, maximum]; while there is none, onto
        it. What is NaN in `seen` moves nothing.
        """
        before = self.range if self.ready else seen
        moved = before + momentum * (seen - before)
        self.range.copy_(torch.where(seen.isnan(), self.range, moved))
        self.seen.fill_(torch.nan)
        self.ready = self.ready or not self.empty

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Spread the grid over [low, high], which holds zero."""
        self.range.copy_(torch.stack((low, high)))
        self.ready = not self.empty

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape on the grid, float32."""
        x = x.float()
        if self.training and x.numel():
            low, high = torch.aminmax(x.detach())
            now = torch.stack((low.clamp_max(0), high.clamp_min(0)))
            now = torch.where(now.isfinite(), now, torch.nan)
            seen = self.seen
            seen.copy_(torch.stack((seen[0].fmin(now[0]), seen[1].fmax(now[1]))))
        if not self.ready:
            return x
        scale, zero_point = self.grid()
        made = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, self.max_integer)
        return _keep_nan(made, x)


def attach(layer: nn.Module, kind: str, quantizer: Quantizer) -> None:
    """Make `quantizer` the layer's `kind`_quantizer.

    Args:
        layer: A layer with parameters.
        kind: Name of one of its parameters, for a `WeightQuantizer`; else INPUT or OUTPUT.
        quantizer: May serve several layers, as that of a tied weight.
    """
    device = next(layer.parameters()).device
    layer.add_module(f"{kind}_quantizer", quantizer.to(device).train(layer.training))
    if not isinstance(quantizer, ActivationQuantizer):
        return
    if kind == INPUT:
        quantizer.handles.append(layer.register_forward_pre_hook(_quantize_input, with_kwargs=True))
    else:
        quantizer.handles.append(layer.register_forward_hook(_quantize_output))


def detach_unused(model: nn.Module) -> None:
    """Take away the quantizers of activations that saw nothing, or nothing but zeros.

    A layer that is never called, because only its weight is used (MultiheadAttention.out_proj),
    keeps the inputs that it gets.
    """
    for layer in list(model.modules()):
        for kind in (INPUT, OUTPUT):
            quantizer = getattr(layer, f"{kind}_quantizer", None)
            if isinstance(quantizer, ActivationQuantizer) and quantizer.empty:
                for handle in quantizer.handles:
                    handle.remove()
                delattr(layer, f"{kind}_quantizer")


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """All of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]


def broadcast_scale(scale: Tensor, ndim: int) -> Tensor:
    """A scale in the shape that is broadcast along the first of `ndim` dimensions."""
    return scale.view(-1, *[1] * (ndim - 1)) if scale.ndim else scale


def is_quantizer_entry(name: str) -> bool:
    """Whether an entry of a state_dict belongs to a quantizer: it is exact, and no parameter."""
    return name.rpartition(".")[0].endswith("_quantizer")


def _keep_nan(quantized: Tensor, x: Tensor) -> Tensor:
    """`quantized`, changed in place to NaN where `x` is NaN or infinite, which has no grid value.

    Fake quantization turns NaN into the smallest value of the grid, which would hide wrong data and
    diverged weights. Adding 0 * x costs a twentieth of the quantization; a mask costs a quarter.
    """
    return quantized.add_(x.detach(), alpha=0)


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer: Any = module.input_quantizer
    if args:
        first = args[0]
        return ((quantizer(first) if _is_float(first) else first), *args[1:]), kwargs
    name = next(iter(kwargs))  # self.fc(input=x)
    first = kwargs[name]
    return args, {**kwargs, name: quantizer(first) if _is_float(first) else first}


def _is_float(value: object) -> bool:
    """Whether a value can be quantized; indices of an embedding cannot."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    quantizer: Any = module.output_quantizer
    return quantizer(output) if _is_float(output) else output
