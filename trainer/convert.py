"""The ONNX file of a finished run: the body that workers execute when all has been measured.

Rank 0 exports the final model, and the dense one to compare with, runs both in onnxruntime on
validation data, and tells what came of it. The other ranks have nothing to do.
"""

from collections.abc import Iterator

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.compress.rewrite import restore
from trainer.config import Config
from trainer.data.split import Split
from trainer.engine.world import World
from trainer.export.onnx import is_quantized, to_onnx
from trainer.export.runtime import BATCHES, OnnxModel, correct, latencies
from trainer.messages import Converted, Message
from trainer.run import build_data, build_model

FP32, INT8 = "fp32", "int8"
BATCH = 256  # samples that are evaluated at a time


def convert(world: World, cfg: Config, final: bytes, dense: bytes | None) -> Iterator[Message]:
    """Export, run and compare.

    Args:
        final: the weights of the last phase, as a safetensors file.
        dense: those of the dense stage, to compare a quantized model with; None: there is none.
    """
    if world.rank != 0:
        return
    split = build_data(cfg).validation
    models = {FP32: _built(cfg, final)}
    if is_quantized(models[FP32]):
        models = {INT8: models[FP32]}
        if dense is not None:
            models = {FP32: _built(cfg, dense), **models}
    sample = _inputs(split, max(2, min(max(BATCHES), len(split))))
    files: dict[str, bytes] = {}
    for name, model in models.items():
        with world.pulse.waits():  # exporting a large model may take minutes
            files[name] = to_onnx(model, sample[:2])
    loaded = {name: OnnxModel(content) for name, content in files.items()}
    speeds = {batch: latencies(loaded, sample[:batch]) for batch in BATCHES if batch <= len(sample)}
    last = list(models)[-1]
    for name, model in models.items():
        accuracy, plain, difference = _compare(model, loaded[name], split, world)
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
    model: nn.Module, onnx: OnnxModel, split: Split, world: World
) -> tuple[float, float, float]:
    """Accuracy in onnxruntime and in PyTorch, and the largest difference of a logit."""
    right = right_plain = count = 0
    difference = 0.0
    for inputs, targets in split.batches(torch.arange(len(split)).split(BATCH), None):
        plain = model(inputs).numpy()
        logits = onnx(inputs)
        right += correct(logits, targets)
        right_plain += correct(plain, targets)
        count += targets.numel()
        difference = max(difference, float(abs(logits - plain).max()))
        world.pulse.beat()
    return right / count, right_plain / count, difference
