"""The training loop. There is one, it is a generator, and what wants to know steps along.

A caller iterates: between two steps it may move a pruning mask, evaluate, report or stop. Global
batch k of epoch e is the same set of samples whatever the number of workers (trainer.data.order);
every worker weighs its share so that the mean over workers is the mean over the global batch, in
short last batches and empty shares too.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.data.hashing import mix
from trainer.data.order import global_batches, shard
from trainer.data.split import Split
from trainer.engine.objective import Objective, supervised
from trainer.engine.optim import load_state, lr_factor, set_lr
from trainer.engine.reducer import Reducer
from trainer.engine.runtime import Runtime
from trainer.errors import Diverged

Request = Callable[[], int]
"""Returns what this rank requests of all ranks after the step: a small number, 0 for nothing."""


@dataclass(slots=True)
class StepResult:
    """One optimizer step, as this worker saw it."""

    step: int  # steps done in this phase, this one included
    total: int  # steps that the phase will do
    epoch: int  # 0 is the first
    epoch_ends: bool  # the last step of its epoch, or of the phase
    samples: int  # size of the global batch
    loss: Tensor  # 0-dim; its mean over workers is the mean loss of the global batch
    lr: float
    applied: bool  # False: skipped by loss scaling
    sent_bytes: int  # gradient bytes that this worker sent
    requested: int  # sum of the ranks' requests; the same on all ranks
    state: Callable[[], dict[str, Any]]  # what `fit` needs to go on from here


def steps_in(samples: int, batch_size: int, cfg: FitConfig) -> tuple[int, int]:
    """Steps per epoch, and steps in all, of a fit over `samples` training samples."""
    per_epoch = -(-samples // batch_size)
    total = per_epoch * cfg.epochs
    return per_epoch, total if cfg.max_steps is None else min(total, cfg.max_steps)


def fit(
    model: nn.Module,
    split: Split,
    cfg: FitConfig,
    runtime: Runtime,
    epochs_before: int = 0,
    start: Mapping[str, Any] | None = None,
    request: Request = lambda: 0,
    objective: Objective = supervised,
) -> Iterator[StepResult]:
    """Train `model` in place on `split`, yielding after every optimizer step.

    Args:
        model: on the runtime's device, the same bits on every rank; put in training mode.
        split: training data.
        cfg: how long and how; `epochs: 0` yields nothing.
        runtime: world, precision, and what all phases share.
        epochs_before: epochs of earlier phases; order, augmentation and dropout go by the epoch of
            the run, so that no phase repeats what another saw.
        start: go on from this `StepResult.state`, with the model as it was then.
        request: called on each rank in each step; all ranks get the sum in `requested`.
        objective: what is minimised.

    Raises:
        Diverged: the loss is NaN or infinite; all ranks raise it in the same step.
    """
    per_epoch, total = steps_in(len(split), runtime.batch_size, cfg)
    if total == 0:
        return
    world, precision = runtime.world, runtime.arithmetic()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = runtime.optimizer.build(parameters)
    peak = cfg.lr if cfg.lr is not None else runtime.optimizer.lr
    step = 0
    if start is not None:
        step = start["step"]
        load_state(optimizer, start["optimizer"])
        precision.scaler.load_state_dict(start["scaler"])

    def state() -> dict[str, Any]:
        scaler = precision.scaler.state_dict()
        return {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler}

    reducer = Reducer(parameters, world, runtime.allreduce, extras=2)
    loss_slot, request_slot = reducer.extra.unbind()
    model.train()
    try:
        for epoch in range(step // per_epoch, cfg.epochs):
            run_epoch = epochs_before + epoch
            batches = global_batches(len(split), runtime.batch_size, runtime.seed, run_epoch)
            batches = batches[step % per_epoch :][: total - step]
            shares = [micro_batches(b, world.rank, world.size, cfg.accumulate) for b in batches]
            micros = (micro for share in shares for micro in share)
            loaded = world.heartbeat.busy_until_first(split.batches(micros, run_epoch))
            for batch, share in zip(batches, shares, strict=True):
                lr = peak * lr_factor(step, total, per_epoch, cfg)
                set_lr(optimizer, lr)
                _seed_step(runtime, epochs_before * per_epoch + step)
                reducer.zero_grad()
                request_slot.fill_(request())
                loss: Tensor | None = None
                if not share:
                    loss = loss_slot.zero_().clone()
                    reducer.arm()
                for number, micro in enumerate(share, start=1):
                    inputs, targets = runtime.place_batch(*next(loaded))
                    with precision.autocast():
                        part = objective(model, inputs, targets)
                    weight = len(micro) * world.size / len(batch)
                    part = part if weight == 1 else part * weight
                    loss = part.detach() if loss is None else loss + part.detach()
                    if number == len(share):
                        loss_slot.copy_(loss)
                        reducer.arm()
                    precision.backward(part)
                    world.heartbeat.beat()
                assert loss is not None
                reducer.finish()
                mean_loss, mean_request = reducer.extra.tolist()
                if not math.isfinite(mean_loss):
                    raise Diverged(
                        f"the loss is {mean_loss} in step {step + 1} (epoch {epoch + 1}) at "
                        f"a learning rate of {lr:g}: lower optimizer.lr, warm up, or clip"
                    )
                update = precision.step(optimizer, parameters, cfg.clip)
                step += 1
                world.heartbeat.step = step
                world.heartbeat.beat()
                yield StepResult(
                    step=step,
                    total=total,
                    epoch=epoch,
                    epoch_ends=step % per_epoch == 0 or step == total,
                    samples=len(batch),
                    loss=loss,
                    lr=lr,
                    applied=update.applied,
                    sent_bytes=reducer.sent_bytes,
                    requested=round(mean_request * world.size),
                    state=state,
                )
                if step == total:
                    return
    finally:
        reducer.close()


def micro_batches(batch: Tensor, rank: int, size: int, accumulate: int) -> list[Tensor]:
    """This rank's share of a global batch, in at most `accumulate` non-empty pieces."""
    share = shard(batch, rank, size)
    pieces = share.tensor_split(accumulate) if accumulate > 1 else (share,)
    return [piece for piece in pieces if len(piece)]


def _seed_step(runtime: Runtime, step: int) -> None:
    """Seed dropout by (seed, step of the run, rank): a resumed run draws the same numbers."""
    mixed = mix(runtime.seed, step, runtime.world.rank)
    torch.default_generator.manual_seed(mixed)
    if runtime.world.device.type == "cuda":
        torch.cuda.manual_seed(mixed)
