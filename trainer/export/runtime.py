"""Runs ONNX files in onnxruntime and measures latencies."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from trainer.export.onnx import OUTPUT, named_inputs

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
        self._inputs = {place.name for place in self._session.get_inputs()}

    def __call__(self, inputs: Any) -> Array:
        """Logits [batch, ..., classes] of a batch of inputs: a tensor, or several as for the model.

        An input that the model does not use is not in the file.
        """
        arrays = {
            name: tensor.detach().cpu().contiguous().numpy()
            for name, tensor in named_inputs(inputs).items()
            if name in self._inputs
        }
        logits: Array = self._session.run([OUTPUT], arrays)[0]
        return logits


def latencies(models: Mapping[str, OnnxModel], inputs: Any) -> dict[str, float]:
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
