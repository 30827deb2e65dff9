"""Runs ONNX files in onnxruntime and measures latencies."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from torch import Tensor

from trainer.export.onnx import INPUT, OUTPUT

Array = npt.NDArray[Any]

BATCHES = (1, 32)  # samples at a time, for latencies
REPEATS = 50
SECONDS = 10.0  # maximum duration of a latency measurement


class OnnxModel:
    """An ONNX file, loaded on the CPU."""

    def __init__(self, content: bytes, threads: int = 1) -> None:
        """Raises what onnxruntime raises for a file that it cannot run."""
        import onnxruntime  # an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, inputs: Tensor) -> Array:
        """Logits [batch, ..., classes] of a batch of inputs."""
        array = inputs.detach().cpu().contiguous().numpy()
        logits: Array = self._session.run([OUTPUT], {INPUT: array})[0]
        return logits


def latencies(models: Mapping[str, OnnxModel], inputs: Tensor) -> dict[str, float]:
    """Median milliseconds of each model for a batch; the models are measured in turn.

    Args:
        inputs: the batch.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    begun = time.perf_counter()
    for repeat in range(REPEATS + 3):
        for name, model in models.items():
            started = time.perf_counter()
            model(inputs)
            if repeat >= 3:  # the first ones are warm-up
                times[name].append(1e3 * (time.perf_counter() - started))
        if repeat >= 3 and time.perf_counter() - begun > SECONDS:
            break
    return {name: statistics.median(taken) for name, taken in times.items()}
