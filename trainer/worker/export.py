"""Export to ONNX: a trial with the fresh model before the first phase, and the export at the end.

Rank 0 exports the final model, and the dense one to compare with, runs both in onnxruntime on
validation data, and reports the result. The other ranks have nothing to do.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.split import Split
from trainer.data.tree import first_samples, tensors
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError, first_line
from trainer.experiment import Experiment, check_phases
from trainer.export import check_installed
from trainer.export.onnx import is_quantized, to_onnx
from trainer.export.runtime import BATCHES, OnnxModel, latencies
from trainer.messages import Exported, Message
from trainer.phases import Quantize, StructuralPhase
from trainer.phases.structure import from_metadata
from trainer.store.serialization import from_bytes
from trainer.tasks import Task
from trainer.worker.preflight import check_compatible

FP32, INT8 = "fp32", "int8"
MAX_BATCH = 256  # samples that are evaluated at a time


def try_export(world: World, experiment: Experiment) -> Iterator[Message]:
    """Refuse a model that could not be exported at the end. Yields no messages.

    The fresh model goes through the quantize phases without training, is exported to ONNX, and runs
    in onnxruntime once: its structure and operators are those of the final model.

    Raises:
        ConfigError: A package is missing on this node, the model cannot be exported, or another
            check before the first step fails.
    """
    if world.rank != 0:
        return
    check_installed()
    with world.heartbeat.busy():  # a large model may take minutes
        _try(experiment)
    yield from ()


def _try(experiment: Experiment) -> None:
    alone = World.single(torch.device("cpu"))
    data, model = experiment.build_data(), experiment.build_model()
    check_phases(experiment, model)
    check_compatible(model, data, experiment.build_runtime(alone))
    sample = _inputs(data.validation, 2)
    if {tensor.shape[:1] for tensor in tensors(sample)} != {(2,)}:
        raise ConfigError(
            "export.onnx=true: the inputs of a batch have no row for each sample, which the sizes "
            "in a file need; set export.onnx=false"
        )
    for name, phase in experiment.phases.items():
        if phase.samples:
            phase.observe(model, alone, [sample])
        if isinstance(phase, StructuralPhase):
            try:
                phase.apply_change(model, phase.plan_change(model, alone))
            except (ConfigError, RunError) as error:
                raise ConfigError(f"phases.{name}: {error}") from error
        if isinstance(phase, Quantize):
            phase.enter(model, alone)
            experiment.task.call(model.train(), sample)
            phase.after_step(model, alone, 1, 1)
            phase.leave(model)
    try:
        OnnxModel(_file(experiment.task, model, sample))(sample)
    except Exception as error:  # onnxruntime has its own exceptions
        raise ConfigError(
            f"export.onnx=true: {first_line(error)}; set export.onnx=false, or change the model"
        ) from error


def export_models(
    world: World, experiment: Experiment, final: bytes, dense: bytes | None
) -> Iterator[Message]:
    """Export to ONNX, run in onnxruntime, and compare with PyTorch.

    Args:
        final: Weights of the last phase, as the content of a safetensors file.
        dense: Weights of the dense model, to compare a quantized model with; None: there is none.
    """
    if world.rank != 0:
        return
    with world.heartbeat.busy():  # a large model may take minutes
        exported = list(_exported(experiment, final, dense))
    yield from exported


def _exported(experiment: Experiment, final: bytes, dense: bytes | None) -> Iterator[Exported]:
    split = experiment.build_data().validation
    models = {FP32: _loaded(experiment, final)}
    if is_quantized(models[FP32]):
        models = {INT8: models[FP32]}
        if dense is not None:
            models = {FP32: _loaded(experiment, dense), **models}
    count = max(2, min(max(BATCHES), len(split)))
    sample = _inputs(split, count)
    files = {
        name: _file(experiment.task, model, first_samples(sample, 2))
        for name, model in models.items()
    }
    loaded = {name: OnnxModel(content) for name, content in files.items()}
    speeds = {
        batch: latencies(loaded, first_samples(sample, batch))
        for batch in BATCHES
        if batch <= count
    }
    last, batch_size = list(models)[-1], min(MAX_BATCH, experiment.config.batch_size)
    for name, model in models.items():
        metrics, in_torch, difference = _compare(
            experiment.task, model, loaded[name], split, batch_size
        )
        yield Exported(
            name=name,
            file_bytes=len(files[name]),
            metrics=metrics,
            torch_metrics=in_torch,
            difference=difference,
            milliseconds={str(batch): speed[name] for batch, speed in speeds.items()},
            content=files[name] if name == last else b"",
        )


def _loaded(experiment: Experiment, content: bytes) -> nn.Module:
    weights, metadata = from_bytes(content)
    return experiment.load_model(weights, from_metadata(metadata)).eval()


def _inputs(split: Split, count: int) -> Any:
    """The inputs of the first `count` samples of a split; repeated if it has fewer."""
    indices = torch.arange(count) % len(split)
    ((inputs, _),) = split.batches([indices], None)
    return inputs


@torch.no_grad()
def _file(task: Task, model: nn.Module, sample: Any) -> bytes:
    """The ONNX file of a model; its output is the prediction alone."""
    plain = isinstance(sample, Tensor) and type(task).call is Task.call
    if plain and isinstance(model.eval()(sample), Tensor):
        return to_onnx(model, sample)
    return to_onnx(model, sample, lambda model, inputs: task.prediction(task.call(model, inputs)))


@torch.no_grad()
def _compare(
    task: Task, model: nn.Module, onnx: OnnxModel, split: Split, batch_size: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Metrics in onnxruntime and in PyTorch, and the largest difference of an output.

    Args:
        task: Defines the metrics.
        batch_size: samples that are evaluated at a time.
    """
    in_onnx, in_torch = (
        {name: metric.start() for name, metric in task.measured.items()} for _ in range(2)
    )
    differences = []
    for inputs, targets in split.batches(torch.arange(len(split)).split(batch_size), None):
        plain = task.prediction(task.call(model, inputs))
        found = torch.from_numpy(onnx(inputs))
        for accumulators, prediction in ((in_onnx, found), (in_torch, plain)):
            measured = task.metric_inputs(prediction, targets)
            for accumulator in accumulators.values():
                accumulator.add(*measured)
        differences.append(float((found - plain).abs().max()))
    values, plain_values = (
        {name: accumulator.value(lambda own: [own]) for name, accumulator in each.items()}
        for each in (in_onnx, in_torch)
    )
    return values, plain_values, float(np.max(differences))  # NaN, if there is one
