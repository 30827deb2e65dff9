"""Loss and accuracy of a model on a split, each sample once, shared out over all workers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.order import shard
from trainer.data.split import Split
from trainer.engine.objective import cross_entropy
from trainer.engine.runtime import Runtime

AT_A_TIME = 256  # samples that a worker may always evaluate together, if the batch has so many


@dataclass(frozen=True)
class Metrics:
    """Means over every target of a split (a language model has one per position)."""

    loss: float  # nats
    accuracy: float  # fraction in [0, 1]


def evaluate(model: nn.Module, split: Split, runtime: Runtime) -> Metrics:
    """Evaluate in the run's precision; the model comes back in the mode that it was in.

    Buffers such as batch norm's running statistics differ between ranks, which saw different
    samples: rank 0's count, here and in every checkpoint.
    The workers' sums are added as float64, in which counts are exact; loss differs between worker
    counts by rounding alone.
    """
    world, precision = runtime.world, runtime.arithmetic()
    world.broadcast(_running_statistics(model))
    share = shard(torch.arange(len(split)), world.rank, world.size)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # loss, correct, targets
    training = model.training
    model.eval()
    with torch.no_grad():
        # What a step gives a worker fits its memory, and so do some hundreds without gradients.
        share_of_batch = -(-runtime.batch_size // world.size)
        at_a_time = min(runtime.batch_size, max(share_of_batch, AT_A_TIME))
        shares = share.split(at_a_time) if len(share) else ()
        for batch in world.heartbeat.busy_until_first(split.batches(shares, None)):
            inputs, targets = runtime.place_batch(*batch)
            with precision.autocast():
                logits = model(inputs)
            world.heartbeat.beat()
            sums[0] += cross_entropy(logits.float(), targets, reduction="sum").double()
            sums[1] += (logits.argmax(-1) == targets).sum()
            sums[2] += targets.numel()
    model.train(training)
    world.all_reduce(sums)
    loss, correct, count = sums.tolist()
    return Metrics(loss=loss / count, accuracy=correct / count)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that checkpoints keep."""
    parameters = {id(p) for p in model.parameters()}
    state = model.state_dict(keep_vars=True)
    return [t for t in state.values() if isinstance(t, Tensor) and id(t) not in parameters]
