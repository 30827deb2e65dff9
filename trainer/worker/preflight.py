"""Whether data and model fit together, found out with a few samples before any step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.data.datasets import DatasetSplit, generators_left_alone
from trainer.data.split import Split, Splits, TensorSplit
from trainer.engine.loop import micro_batches, steps_in
from trainer.engine.runtime import Runtime
from trainer.errors import ConfigError, first_line


def check_compatible(
    model: nn.Module, data: Splits, runtime: Runtime, fits: Sequence[FitConfig] = ()
) -> torch.Size:
    """Refuse a model that cannot take the samples, or has no output for a label.

    The model and the random state stay as they are. The labels of a split in memory are all
    looked at, of another one that of its first sample.

    Args:
        fits: the training to come. All ranks come to the same verdict on it.

    Returns:
        The shape of the target of one training sample; empty: one class.

    Raises:
        ConfigError: names the split, the shapes or the label, and the model.
    """
    training = model.training
    device = runtime.world.device
    cuda = [device] if device.type == "cuda" else []
    try:
        with generators_left_alone(), torch.random.fork_rng(cuda), torch.no_grad():
            model.eval()  # batch norm keeps its running statistics, dropout draws nothing
            firsts = {
                name: _check_split(name, split, model, runtime)
                for name, split in vars(data).items()
            }
            inputs, targets = firsts["train"]
            model.train()
            for fit in fits:
                _check_smallest_piece(inputs, len(data.train), model, runtime, fit)
    finally:
        model.train(training)
    return targets.shape[1:]


def _check_split(
    name: str, split: Split, model: nn.Module, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Returns the inputs and the targets of its first sample."""
    inputs, targets = _first(split)
    kind = type(model).__name__
    sample = f"{str(inputs.dtype).removeprefix('torch.')} {[*inputs.shape[1:]]}"
    if targets.dtype != torch.int64:
        raise ConfigError(
            f"data: the targets of {name} are {str(targets.dtype).removeprefix('torch.')}; they "
            "must be classes, int64: targets.long()"
        )
    said = f"data and model: {kind} cannot take a {name} sample ({sample})"
    logits = _answer(model, inputs, runtime, said)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        raise ConfigError(
            f"data and model: for targets {[*targets.shape]} of {name} {kind} gives "
            f"{_kind(logits)}; it must be a tensor of logits, with one more dimension for the "
            "classes"
        )
    known = split.targets if isinstance(split, TensorSplit) else targets
    classes = logits.shape[-1]
    wrong = known[(known < 0) | (known >= classes)]
    if len(wrong):
        raise ConfigError(
            f"data and model: {name} holds the label {int(wrong[0])}, but {kind} has {classes} "
            f"outputs, for labels 0 to {classes - 1}"
        )
    return inputs, targets


def _check_smallest_piece(
    inputs: Tensor, samples: int, model: nn.Module, runtime: Runtime, fit: FitConfig
) -> None:
    """Try a forward pass of training with as few samples as one will have: batch norm may mind.

    Args:
        inputs: of one sample.
        samples: size of the training split.
    """
    size, batch_size = runtime.world.size, runtime.batch_size
    # Synchronized batch norm sees the samples of all ranks.
    parts = 1 if runtime.sync_batchnorm else size
    per_epoch, steps = steps_in(samples, batch_size, fit)
    if not steps:
        return
    last = samples % batch_size if steps >= per_epoch else 0
    pieces = [
        len(piece)
        for batch in {min(batch_size, samples), last}
        for rank in range(parts)
        for piece in micro_batches(torch.arange(batch), rank, parts, fit.accumulate)
    ]
    few = inputs.expand(min(pieces), *inputs.shape[1:]).contiguous()
    kind = type(model).__name__
    said = (
        f"data.batch_size={batch_size} with cluster.workers={size} and "
        f"fit.accumulate={fit.accumulate}: {kind} cannot be trained on as little as {len(few)} of "
        f"the {samples} training samples at a time"
    )
    logits = _answer(model, few, runtime, said)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"data and model: {kind} gives {_kind(logits)} in training mode; it must be a tensor "
            "of logits, as in evaluation"
        )


def _answer(model: nn.Module, inputs: Tensor, runtime: Runtime, said: str) -> object:
    """What the model makes of a batch; its buffers stay as they are.

    Raises ConfigError, which begins with `said`, for an error that the inputs cause.
    """
    device = runtime.world.device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        placed, _ = runtime.place_batch(inputs, torch.zeros(0, dtype=torch.int64))
        with runtime.mixed_precision.autocast():
            answer: object = model(placed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what a kernel minds is told here, not later
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if "CUDA error" in str(error):  # this process can do nothing more on its GPU
            raise
        raise ConfigError(f"{said}: {first_line(error)}") from error
    for buffer, before in buffers:
        buffer.copy_(before)
    return answer


def _first(split: Split) -> tuple[Tensor, Tensor]:
    if isinstance(split, DatasetSplit):
        return split.first()
    (batch,) = split.batches([torch.tensor([0])], None)
    return batch


def _kind(logits: object) -> str:
    return str([*logits.shape]) if isinstance(logits, Tensor) else type(logits).__name__
