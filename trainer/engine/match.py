"""Whether data and model fit together, found out with one sample of each split before any step."""

import torch
from torch import Tensor, nn

from trainer.data.split import Split, Splits, TensorSplit
from trainer.engine.runtime import Runtime
from trainer.errors import ConfigError, first_line


def check_match(model: nn.Module, data: Splits, runtime: Runtime) -> None:
    """Refuse a model that cannot take the samples, or has no output for a label.

    The model and the random state stay as they are. The labels of a split in memory are all
    looked at, of another one that of its first sample.

    Raises:
        ConfigError: names the split, the shapes or the label, and the model.
    """
    training = model.training
    model.eval()  # batch norm keeps its running statistics, dropout draws nothing
    device = runtime.world.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for name, split in vars(data).items():
                _check_split(name, split, model, runtime)
    finally:
        model.train(training)


def _check_split(name: str, split: Split, model: nn.Module, runtime: Runtime) -> None:
    ((inputs, targets),) = split.batches([torch.tensor([0])], None)
    kind = type(model).__name__
    sample = f"{str(inputs.dtype).removeprefix('torch.')} {[*inputs.shape[1:]]}"
    try:
        with runtime.arithmetic().autocast():
            logits = model(runtime.place_batch(inputs, targets)[0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise ConfigError(
            f"data and model: {kind} cannot take a {name} sample ({sample}): {first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        made = [*logits.shape] if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"data and model: for targets {[*targets.shape]} of {name} {kind} gives {made}; "
            "it must be a tensor of logits, with one more dimension for the classes"
        )
    known = split.targets if isinstance(split, TensorSplit) else targets
    classes = logits.shape[-1]
    wrong = known[(known < 0) | (known >= classes)]
    if len(wrong):
        raise ConfigError(
            f"data and model: {name} holds the label {int(wrong[0])}, but {kind} has {classes} "
            f"outputs, for labels 0 to {classes - 1}"
        )
