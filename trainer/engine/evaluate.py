"""Loss and metrics of a model on a split; each sample is evaluated once, by one of the workers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainer.data.order import shard
from trainer.data.split import Split
from trainer.engine.finite import check_samples
from trainer.engine.gather import all_gather
from trainer.engine.runtime import Runtime
from trainer.errors import RunError
from trainer.metrics import MAXIMIZE

MIN_BATCH = 256  # samples that a worker may always evaluate at a time, if the batch has so many


@dataclass(frozen=True)
class Metrics:
    """Loss and metrics of a model on a split."""

    loss: float  # mean over the units of loss, such as samples or tokens
    values: Mapping[str, float]  # the metrics of the task by name, in order
    direction: str = MAXIMIZE  # of the first metric: maximize or minimize

    @property
    def first(self) -> float:
        """The first metric of the task; the loss, if it has none."""
        return next(iter(self.values.values()), self.loss)

    @property
    def accuracy(self) -> float | None:
        """The metric "accuracy", a fraction; None if the task has no such metric."""
        return self.values.get("accuracy")

    @property
    def name(self) -> str:
        """Name of the first metric."""
        return next(iter(self.values), "loss")


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
    world, precision, task = runtime.world, runtime.mixed_precision, runtime.task
    world.broadcast(_saved_buffers(model))
    with world.heartbeat.busy():  # a stream may have to be counted
        share = shard(torch.arange(len(split)), world.rank, world.size)
    # A worker's share of a training batch fits its memory, and a few hundred without gradients do.
    share_of_batch = -(-runtime.batch_size // world.size)
    shares = share.split(min(runtime.batch_size, max(share_of_batch, MIN_BATCH)))
    shares = shares if len(share) else ()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss, units
    accumulators = {name: metric.start() for name, metric in task.measured.items()}
    training = model.training
    model.eval()
    with torch.no_grad():
        for inputs, targets in world.heartbeat.busy_until_first(split.batches(shares, None)):
            units = task.units(targets)
            inputs, targets = runtime.place_batch(inputs, targets)
            with precision.autocast():
                output = task.call_with_targets(model, inputs, targets)
            world.heartbeat.beat()
            sums[0] += task.evaluation_loss(output, targets, units).double()
            sums[1] += units
            if accumulators:
                measured = task.metric_inputs(task.prediction(output), targets)
                for accumulator in accumulators.values():
                    accumulator.add(*measured)
    model.train(training)
    world.all_reduce(sums)
    loss, count = sums.tolist()
    if not math.isfinite(loss):
        check_samples(world, split, name, shares, None)
    if count == 0:
        raise RunError(f"data: every target of the {name} data is -100, which means ignored")
    gather = partial(all_gather, world)
    values = {name: accumulator.value(gather) for name, accumulator in accumulators.items()}
    return Metrics(loss / count, values, task.directions[task.first_metric])


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that are in the state_dict."""
    parameters = {id(p) for p in model.parameters()}
    state = model.state_dict(keep_vars=True)
    return [t for t in state.values() if isinstance(t, Tensor) and id(t) not in parameters]
