"""Exports models to ONNX. A quantized model is stored, and computes, with integers.

Weights are int8 initializers behind DequantizeLinear, biases int32, and QuantizeLinear and
DequantizeLinear precede each quantized layer: the QDQ form, which runtimes convert to integer
kernels (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).

The step of a bias is the step of the input times that of the weight. A bias in fp32 would not
help: onnxruntime converts it to such integers, and wraps those that are too large. So the grids of
weights in the file are chosen so that biases are exact: see `_fitted`.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from trainer.compress.quantize import ActivationQuantizer, WeightQuantizer, broadcast_scale
from trainer.data.tree import call_with
from trainer.errors import RunError, first_line
from trainer.models.copying import copy_model

OPSET = 21  # the first version with quantization to all integer types used here
INPUT, OUTPUT = "input", "logits"
Predict = Callable[[nn.Module, Any], Tensor]
_INTEGER_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their biases are integers
_LARGEST = 2.0**30  # of a bias in steps; the rest of the range is for the products


def to_onnx(model: nn.Module, sample: Any, predict: Predict | None = None) -> bytes:
    """The content of an ONNX file.

    Its input `input` has the shape and type of `sample`, with any number of samples; its output is
    `logits`. Several inputs have the names in the mapping, or are called input_0, input_1, ... It
    can be used without this project.

    Args:
        model: plain or quantized, as after training; not changed.
        sample: a batch of at least two inputs.
        predict: calls the model with inputs and returns the prediction; None: the model's output
            is the prediction.

    Raises:
        RunError: PyTorch cannot export the model, or a weight is no longer on its grid.
    """
    exported = copy_model(model).cpu().float().eval()
    for name, layer in list(exported.named_modules()):
        _put_integers(name, layer)
    batch = torch.export.Dim("batch")
    inputs = named_inputs(sample)
    tensors = tuple(tensor.cpu().contiguous() for tensor in inputs.values())
    traced: nn.Module = exported
    dynamic: Any = ({0: batch},)
    if predict is not None or not isinstance(sample, Tensor):
        traced = _Predictor(exported, sample, predict or call_with)
        dynamic = (({0: batch},) * len(inputs),)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                traced,
                tensors,
                dynamo=True,
                opset_version=OPSET,
                input_names=[*inputs],
                output_names=[OUTPUT],
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except Exception as error:  # torch.export and the exporter raise many kinds
        raise RunError(
            f"{type(model).__name__} cannot be exported to ONNX: {first_line(_root(error))}"
        ) from error
    assert program is not None
    file = program.model_proto
    for part in (*file.graph.node, *file.graph.value_info, *file.graph.input, *file.graph.output):
        part.ClearField("metadata_props")  # they contain paths of this machine
    return cast(bytes, file.SerializeToString())


def named_inputs(inputs: Any) -> dict[str, Tensor]:
    """The inputs of a batch by their names in the file."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, tuple | list):
        return {f"{INPUT}_{number}": tensor for number, tensor in enumerate(inputs)}
    return {INPUT: inputs}


class _Predictor(nn.Module):
    """Takes the inputs of a model one by one, and returns its prediction alone."""

    def __init__(self, model: nn.Module, sample: Any, predict: Predict) -> None:
        super().__init__()
        self.model = model
        self._predict = predict
        self._names = [*sample] if isinstance(sample, Mapping) else None
        self._several = isinstance(sample, tuple | list)

    def forward(self, *inputs: Tensor) -> Tensor:
        given: Any = inputs if self._several else inputs[0]
        if self._names is not None:
            given = dict(zip(self._names, inputs, strict=True))
        return self._predict(self.model, given)


def _root(error: BaseException) -> BaseException:
    """The first error of a chain; later ones only name the step of the exporter that failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_quantized(model: nn.Module) -> bool:
    """Whether the model was quantized by a quantize phase."""
    return any(isinstance(module, WeightQuantizer) for module in model.modules())


def _put_integers(name: str, layer: nn.Module) -> None:
    """Replace weight, bias and input of a quantized layer by ONNX's quantized tensors."""
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
    """Raise RunError for Inf and NaN, which would become the smallest integer."""
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

    Integers of fewer bits are scaled up to 7 bits, so that the steps of the bias become finer. With
    8 bits, sums of two products could overflow the 16 bits that some kernels for x86 use.
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
    """The same weight on grids in which each bias is an int32 number of steps; mostly unchanged.

    If a bias has too many steps, the steps of its channel are enlarged by a power of two, which
    changes products by less than 1e-7 of the bias for each weight. The step of a channel of zeros
    is arbitrary.

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
    """Replaces a weight: integers, with one scale or one for each channel."""

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
    """Replaces a quantizer of activations: converts to integers and back."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        scale, zero = quantizer.grid()
        self.scale, self.zero = nn.Buffer(scale), nn.Buffer(zero.to(torch.uint8))
        # QuantizeLinear clips at 0 and 255; a grid of fewer bits has narrower limits.
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
    """Suppress warnings of the exporter about optional packages and its own optimizations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
