"""Loss and accuracy of a model on a split; each sample is evaluated once, by one of the workers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.order import shard
from trainer.data.split import Split
from trainer.engine.finite import check_inputs
from trainer.engine.objective import count_targets, cross_entropy
from trainer.engine.runtime import Runtime
from trainer.errors import RunError

MIN_BATCH = 256  # samples that a worker may always evaluate at a time, if the batch has so many


@dataclass(frozen=True)
class Metrics:
    """Means over the counted targets of a split (a language model has one per position)."""

    loss: float  # nats
    accuracy: float  # fraction in [0, 1]


def evaluate(model: nn.Module, split: Split, runtime: Runtime, name: str = "validation") -> Metrics:
    """Evaluate a model in the run's precision. A collective call.

    The running statistics of batch norm and all other buffers differ between ranks that saw
    different samples: rank 0's are used here, and written to every checkpoint. Sums over the
    workers are float64, in which counts are exact, so that the loss depends on the number of
    workers by rounding alone.

    Args:
        model: With the same parameters on all ranks; its mode is restored afterwards.
        split: What to evaluate on.
        runtime: What all phases share.
        name: Of the split, for messages: validation or test.

    Returns:
        The metrics. The loss may be NaN or infinite, though all inputs are finite.

    Raises:
        RunError: An input is NaN or infinite, or no target counts.
    """
    world, precision = runtime.world, runtime.mixed_precision
    world.broadcast(_saved_buffers(model))
    share = shard(torch.arange(len(split)), world.rank, world.size)
    # A worker's share of a training batch fits its memory, and a few hundred without gradients do.
    share_of_batch = -(-runtime.batch_size // world.size)
    shares = share.split(min(runtime.batch_size, max(share_of_batch, MIN_BATCH)))
    shares = shares if len(share) else ()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, correct, counted
    training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in world.heartbeat.busy_until_first(split.batches(shares, None)):
            counted = count_targets(targets)
            inputs, targets = runtime.place_batch(inputs, targets)
            with precision.autocast():
                logits = model(inputs)
            world.heartbeat.beat()
            sums[0] += cross_entropy(logits.float(), targets, reduction="sum").double()
            sums[1] += (logits.argmax(-1) == targets).sum()
            sums[2] += counted
    model.train(training)
    world.all_reduce(sums)
    loss, correct, count = sums.tolist()
    if not math.isfinite(loss):
        check_inputs(world, split, name, shares, None)
    if count == 0:
        raise RunError(f"data: every target of the {name} data is -100, which means ignored")
    return Metrics(loss=loss / count, accuracy=correct / count)


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that are in the state_dict."""
    parameters = {id(p) for p in model.parameters()}
    state = model.state_dict(keep_vars=True)
    return [t for t in state.values() if isinstance(t, Tensor) and id(t) not in parameters]
