"""The ONNX file of a run: what workers execute before the first phase, and when all is measured.

Rank 0 exports the final model, and the dense one to compare with, runs both in onnxruntime on
validation data, and tells what came of it. Before anything is trained it tries that with the fresh
model. The other ranks have nothing to do.
"""

from collections.abc import Iterator

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.compress.rewrite import restore
from trainer.config import Config
from trainer.data.split import Split
from trainer.engine.objective import count_targets
from trainer.engine.world import World
from trainer.errors import ConfigError, first_line
from trainer.export import check_installed
from trainer.export.onnx import is_quantized, to_onnx
from trainer.export.runtime import BATCHES, OnnxModel, count_correct, latencies
from trainer.messages import Converted, Message
from trainer.parts import build_data, build_model, build_runtime
from trainer.phases import Quantize, build_phases
from trainer.worker.preflight import check_match
from trainer.worker.run import check_phases

FP32, INT8 = "fp32", "int8"
BATCH = 256  # samples that are evaluated at a time, at most


def try_export(world: World, cfg: Config) -> Iterator[Message]:
    """Refuse a model that could not be exported in the end. Tells nothing else.

    The fresh model goes through the quantize phases without training, to ONNX, and through
    onnxruntime once: structure and operators are those of the final one.

    Raises:
        ConfigError: a package is missing on this node, or the model cannot be exported; or what
            the run itself would refuse before its first step.
    """
    if world.rank != 0:
        return
    check_installed()
    with world.heartbeat.busy():  # a large model may take minutes
        _try(cfg)
    yield from ()


def _try(cfg: Config) -> None:
    alone = World.single(torch.device("cpu"))
    phases, data, model = build_phases(cfg.phases), build_data(cfg), build_model(cfg)
    check_phases(phases, model)
    check_match(model, data, build_runtime(alone, cfg))
    sample = _inputs(data.validation, 2)
    for phase in phases.values():
        if isinstance(phase, Quantize):
            phase.enter(model, alone)
            model.train()(sample)
            phase.after_step(model, alone, 1, 1)
            phase.leave(model)
    try:
        OnnxModel(to_onnx(model, sample))(sample)
    except Exception as error:  # onnxruntime has its own
        raise ConfigError(
            f"export.onnx=true: {first_line(error)}; set export.onnx=false, or change the model"
        ) from error


def convert(world: World, cfg: Config, final: bytes, dense: bytes | None) -> Iterator[Message]:
    """Export, run and compare.

    Args:
        final: the weights of the last phase, as a safetensors file.
        dense: those of the dense stage, to compare a quantized model with; None: there is none.
    """
    if world.rank != 0:
        return
    with world.heartbeat.busy():  # a large model may take minutes
        converted = list(_converted(cfg, final, dense))
    yield from converted


def _converted(cfg: Config, final: bytes, dense: bytes | None) -> Iterator[Converted]:
    split = build_data(cfg).validation
    models = {FP32: _built(cfg, final)}
    if is_quantized(models[FP32]):
        models = {INT8: models[FP32]}
        if dense is not None:
            models = {FP32: _built(cfg, dense), **models}
    sample = _inputs(split, max(2, min(max(BATCHES), len(split))))
    files = {name: to_onnx(model, sample[:2]) for name, model in models.items()}
    loaded = {name: OnnxModel(content) for name, content in files.items()}
    speeds = {batch: latencies(loaded, sample[:batch]) for batch in BATCHES if batch <= len(sample)}
    last, batch_size = list(models)[-1], min(BATCH, int(cfg.data["batch_size"]))
    for name, model in models.items():
        accuracy, plain, difference = _compare(model, loaded[name], split, batch_size)
        yield Converted(
            name=name,
            file_bytes=len(files[name]),
            accuracy=accuracy,
            torch_accuracy=plain,
            difference=difference,
            milliseconds={str(batch): speed[name] for batch, speed in speeds.items()},
            content=files[name] if name == last else b"",
        )


def _built(cfg: Config, content: bytes) -> nn.Module:
    return restore(build_model(cfg), safetensors.torch.load(content)).eval()


def _inputs(split: Split, count: int) -> Tensor:
    """The first samples of a split; the only one twice."""
    indices = torch.arange(count) % len(split)
    ((inputs, _),) = split.batches([indices], None)
    return inputs


@torch.no_grad()
def _compare(
    model: nn.Module, onnx: OnnxModel, split: Split, batch_size: int
) -> tuple[float, float, float]:
    """Accuracy in onnxruntime and in PyTorch, and the largest difference of a logit.

    Args:
        batch_size: samples that are evaluated at a time.
    """
    right = right_plain = count = 0
    differences = []
    for inputs, targets in split.batches(torch.arange(len(split)).split(batch_size), None):
        plain = model(inputs).numpy()
        logits = onnx(inputs)
        right += count_correct(logits, targets)
        right_plain += count_correct(plain, targets)
        count += count_targets(targets)
        differences.append(float(abs(logits - plain).max()))
    return right / count, right_plain / count, float(np.max(differences))  # NaN, if there is one
