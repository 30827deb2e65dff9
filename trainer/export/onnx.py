"""From a model to ONNX. A quantized one has its integers in the file, and runs on integers.

Weights are int8 initializers behind DequantizeLinear, biases int32, and QuantizeLinear and
DequantizeLinear stand before each quantized layer: the QDQ form, from which runtimes make kernels
for integers (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).

A bias is counted in steps of the input times steps of the weight; to leave it fp32 would not help,
since onnxruntime makes such integers of it by itself, and wraps those that are too large. So the
file's grids of weights are chosen for the biases to be exact: see `_fitted`.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from trainer.compress.quantize import ActivationQuantizer, WeightQuantizer, broadcast_scale
from trainer.errors import RunError, first_line

OPSET = 21  # the first that quantizes to all types of integers that are used here
INPUT, OUTPUT = "input", "logits"
_INTEGER_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers that runtimes compute so
_LARGEST = 2.0**30  # bias in its file, in steps: as much again is left for the products


def to_onnx(model: nn.Module, sample: Tensor) -> bytes:
    """The content of an ONNX file.

    Its input `input` has the shape and type of `sample`, with any number of samples; its output is
    `logits`. It needs nothing of this project.

    Args:
        model: plain or quantized, as training left it; stays as it is.
        sample: a batch of inputs, two at least.

    Raises:
        RunError: PyTorch cannot export the model, or a weight is no longer on its grid.
    """
    exported = copy.deepcopy(model).cpu().float().eval()
    for name, layer in list(exported.named_modules()):
        _put_integers(name, layer)
    batch = torch.export.Dim("batch")
    sample = sample.cpu().contiguous()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                exported,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
    except Exception as error:  # torch.export's and the exporter's own, of many kinds
        raise RunError(
            f"{type(model).__name__} cannot be exported to ONNX: {first_line(_root(error))}"
        ) from error
    assert program is not None
    file = program.model_proto
    for part in (*file.graph.node, *file.graph.value_info, *file.graph.input, *file.graph.output):
        part.ClearField("metadata_props")  # lines and folders of this machine
    return cast(bytes, file.SerializeToString())


def _root(error: BaseException) -> BaseException:
    """The first error of a chain; those of the exporter say which of its steps failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_quantized(model: nn.Module) -> bool:
    """Whether a quantize phase went over the model."""
    return any(isinstance(module, WeightQuantizer) for module in model.modules())


def _put_integers(name: str, layer: nn.Module) -> None:
    """Let a quantized layer compute with what ONNX calls quantized tensors."""
    prefix = f"{name}." if name else ""
    for kind, child in list(layer.named_children()):
        kind = kind.removesuffix("_quantizer")
        if not isinstance(child, WeightQuantizer):
            continue
        _check_finite(prefix, layer, kind)
        integers, scale = _integers(prefix + kind, getattr(layer, kind).detach(), child)
        inputs = getattr(layer, "input_quantizer", None)
        bias = getattr(layer, "bias", None) if isinstance(layer, _INTEGER_BIAS) else None
        if bias is not None and isinstance(inputs, ActivationQuantizer) and inputs.ready:
            step = inputs.grid()[0]
            integers, scale = _fitted(integers, scale, bias.detach().double() / step)
            unit = (step * scale).expand(len(bias)).clone()
            count = (bias.detach().double() / unit).round()
            _replace(layer, "bias", count.to(torch.int32), unit)
        _replace(layer, kind, integers.to(torch.int8), scale)
    for kind in ("input", "output"):
        quantizer = getattr(layer, f"{kind}_quantizer", None)
        if isinstance(quantizer, ActivationQuantizer) and quantizer.ready:
            setattr(layer, f"{kind}_quantizer", _Quantized(quantizer))


def _check_finite(prefix: str, layer: nn.Module, kind: str) -> None:
    """Raise RunError where a layer has no integers: NaN would become the smallest one."""
    for key, value in layer.state_dict().items():
        ranges = key.endswith("_quantizer.range")
        if key in (kind, "bias") or ranges:
            odd = value.isinf() if ranges else ~value.isfinite()  # a range is NaN until it is set
            if bool(odd.any()):
                raise RunError(
                    f"{prefix}{key} holds NaN or Inf, which no integer represents: the training "
                    "diverged, or the file is damaged"
                )


def _integers(name: str, weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """A weight as integers (float32), and their scale. Raises RunError.

    Integers of few bits are multiplied up to 7 bits, which makes the steps finer in which a bias is
    counted. With the eighth, sums of two products could overflow the 16 bits that some kernels for
    x86 have for them.
    """
    steps = weight / broadcast_scale(quantizer.scale, weight.ndim)
    integers = steps.round()
    limit = quantizer.max_integer
    on_grid = (steps - integers).abs().max() < 1e-3 and integers.abs().max() <= limit
    if not on_grid:
        raise RunError(
            f"{name} is not on the grid of its quantizer, so it cannot be written as integers: "
            "something changed it after the quantize phase"
        )
    finer = 1 << max(0, 7 - quantizer.bits)
    return integers * finer, quantizer.scale / finer


def _fitted(integers: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same weight on grids of which each bias is an exact number of int32, nearly always as
    it is.

    A channel whose bias has too many steps gets fewer and larger ones, by a power of two: that
    moves its products by less than 1e-7 of the bias for each weight. One without a weight that is
    not zero may have any steps.

    Args:
        integers: [channels, ...].
        scale: of one element, or one for each channel.
        bias: [channels], in steps of the input.
    """
    count = (bias / scale).abs()
    free = (integers.flatten(1) == 0).all(1)
    larger = (count / _LARGEST).clamp_min(2.0**-60).log2().ceil().exp2()
    larger = torch.where((count > _LARGEST) | (free & (count > 0)), larger, 1.0)
    if bool((larger == 1).all()):
        return integers, scale
    return (integers / broadcast_scale(larger, integers.ndim)).round(), (scale * larger).float()


def _replace(layer: nn.Module, name: str, integers: Tensor, scale: Tensor) -> None:
    register_parametrization(layer, name, _Dequantized(integers, scale), unsafe=True)


class _Dequantized(nn.Module):
    """In the place of a weight: integers, and one scale or one for each channel."""

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.integers = nn.Buffer(integers)
        self.scale = nn.Buffer(scale.clone())
        self.zero = nn.Buffer(torch.zeros(scale.shape, dtype=integers.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return _symbolic(
            "DequantizeLinear",
            (self.integers, self.scale, self.zero),
            torch.float32,
            0 if self.scale.ndim else None,
        )


class _Quantized(nn.Module):
    """In the place of a quantizer of activations: to integers, and back."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero = quantizer.grid()
        self.scale, self.zero = nn.Buffer(scale), nn.Buffer(zero.to(torch.uint8))
        # QuantizeLinear stops at 0 and 255; a grid of fewer bits ends before.
        self.ends: tuple[float, float] | None = None
        if quantizer.bits < 8:
            below, above = -int(zero), quantizer.max_integer - int(zero)
            self.ends = below * float(scale), above * float(scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.ends is not None:
            x = x.clamp(*self.ends)
        integers = _symbolic("QuantizeLinear", (x, self.scale, self.zero), torch.uint8)
        return _symbolic("DequantizeLinear", (integers, self.scale, self.zero), torch.float32)


def _symbolic(
    operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, axis: int | None = None
) -> Tensor:
    """An operator of ONNX, of the shape of its first input. It only works while exporting."""
    return torch.onnx.ops.symbolic(
        operator,
        inputs,
        None if axis is None else {"axis": axis},
        dtype=dtype,
        shape=inputs[0].shape,
        version=OPSET,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about optional packages."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
