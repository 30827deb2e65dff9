"""Measures the latency of a model in the engine, PyTorch and onnxruntime, in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainer.compress.quantize import WeightQuantizer
from trainer.errors import RunError
from trainer.export.onnx import to_onnx
from trainer.export.runtime import OnnxModel
from trainer.inference.build import compile, layer_kernels
from trainer.inference.layers import INT8, Choice, LayerKernel
from trainer.inference.measure import alternate, medians
from trainer.models.copying import copy_model

ENGINE, TORCH, TORCH_INT8 = "engine", "PyTorch fp32", "PyTorch int8"
ONNX, ONNX_INT8 = "onnxruntime fp32", "onnxruntime int8"


@dataclass(frozen=True)
class Latencies:
    """Latencies of one batch."""

    seconds: Mapping[str, float]
    """Median seconds by engine or library, the engine of this project first."""
    rounds: int
    layers: list[LayerKernel]
    """Of the engine."""
    missing: Mapping[str, str]
    """Libraries that could not run, with the reason."""


def measure_latencies(
    model: nn.Module,
    dense: nn.Module,
    samples: Tensor,
    quantized: nn.Module | None = None,
    *,
    onnx: bool = True,
    threads: int = 1,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Latencies:
    """Measure the latency of a batch in all libraries, in turn.

    Args:
        model: With compressed weights, perhaps quantized.
        dense: The same model without quantizers.
        samples: The batch.
        quantized: The model with quantizers, for onnxruntime int8; `model` if it has them.
        onnx: Whether to measure onnxruntime.
        threads: Threads of each library.
        seconds: How long to measure.
        clock: As for `alternate`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _measure(model, dense, samples, quantized, onnx, threads, seconds, clock)
    finally:
        torch.set_num_threads(before)


def _measure(
    model: nn.Module,
    dense: nn.Module,
    samples: Tensor,
    quantized: nn.Module | None,
    onnx: bool,
    threads: int,
    seconds: float,
    clock: Callable[[], float],
) -> Latencies:
    missing: dict[str, str] = {}
    # Kernels are chosen at the first call, which is not part of the measurement.
    engine = compile(copy_model(model), samples=samples, threads=threads)
    has_grid = any(isinstance(module, WeightQuantizer) for module in model.modules())
    plain = copy_model(dense).eval()
    calls: dict[str, Callable[[], object]] = {
        ENGINE: lambda: engine(samples),
        TORCH: lambda: plain(samples),
    }
    integers = _with_integers(model, threads) if has_grid else None
    if integers is None:
        reason = "no layer has integers that oneDNN can multiply"
        missing[TORCH_INT8] = reason if has_grid else "the model is not quantized"
    else:
        calls[TORCH_INT8] = lambda: integers(samples)
    if onnx:
        files = {ONNX: plain, ONNX_INT8: model if has_grid else quantized}
        for name, of in files.items():
            if of is None:
                missing[name] = "the model is not quantized"
                continue
            try:
                session = _session(of, samples, threads)
                calls[name] = partial(session, samples)
            except ImportError as error:
                needed = "run pip install '.[onnx]' in the checkout"
                missing[name] = f"{error.name} is not installed: {needed}"
            except RunError as error:
                missing[name] = str(error)
    times = alternate(calls, seconds, clock=clock)
    return Latencies(medians(times), len(times[ENGINE]), layer_kernels(engine), missing)


def _with_integers(model: nn.Module, threads: int) -> nn.Module | None:
    """The model with integers in all layers that can use them; None if there are none."""
    found = compile(copy_model(model), threads=threads)
    kept = [module.keep(INT8) for module in found.modules() if isinstance(module, Choice)]
    return found if any(kept) else None


def _session(model: nn.Module, samples: Tensor, threads: int) -> OnnxModel:
    import onnxruntime  # noqa: F401  an extra; checked first, since the export takes long

    pair = samples if len(samples) > 1 else torch.cat([samples, samples])
    return OnnxModel(to_onnx(model, pair), threads)
