"""The training loop. There is one, it is a generator, and what wants to know steps along.

A caller iterates: between two steps it may move a pruning mask, evaluate, report or stop. Global
batch k of epoch e is the same set of samples whatever the number of workers (trainer.data.order);
every worker weighs its share so that the mean over workers is the mean over the global batch, in
short last batches and empty shares too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.data.order import global_batches, shard
from trainer.data.split import Split
from trainer.engine.optim import build_optimizer, lr_factor, set_lr
from trainer.engine.reducer import Reducer
from trainer.engine.runtime import Runtime, cross_entropy


@dataclass(frozen=True, slots=True)
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


def steps_in(samples: int, batch_size: int, cfg: FitConfig) -> tuple[int, int]:
    """Steps per epoch, and steps in all, of a fit over `samples` training samples."""
    per_epoch = -(-samples // batch_size)
    total = per_epoch * cfg.epochs
    return per_epoch, total if cfg.max_steps is None else min(total, cfg.max_steps)


def fit(
    model: nn.Module, split: Split, cfg: FitConfig, runtime: Runtime, epochs_before: int = 0
) -> Iterator[StepResult]:
    """Train `model` in place on `split`, yielding after every optimizer step.

    Args:
        model: on the runtime's device, the same bits on every rank; put in training mode.
        split: training data.
        cfg: how long and how; `epochs: 0` yields nothing.
        runtime: world, precision, and what all phases share.
        epochs_before: epochs of earlier phases; order, augmentation and dropout go by the epoch of
            the run, so that no phase repeats what another saw.
    """
    per_epoch, total = steps_in(len(split), runtime.batch_size, cfg)
    if total == 0:
        return
    world, precision = runtime.world, runtime.precision
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(runtime.optimizer, parameters)
    peak = cfg.lr if cfg.lr is not None else float(runtime.optimizer["lr"])
    reducer = Reducer(parameters, world, runtime.allreduce)
    model.train()
    step = 0
    try:
        for epoch in range(cfg.epochs):
            run_epoch = epochs_before + epoch
            batches = global_batches(len(split), runtime.batch_size, runtime.seed, run_epoch)
            batches = batches[: total - step]
            shares = [_micro_batches(b, world.rank, world.size, cfg.accumulate) for b in batches]
            loaded = split.batches((micro for share in shares for micro in share), run_epoch)
            for batch, share in zip(batches, shares, strict=True):
                lr = peak * lr_factor(step, total, per_epoch, cfg)
                set_lr(optimizer, lr)
                _seed_step(runtime, epochs_before * per_epoch + step)
                reducer.zero_grad()
                loss: Tensor | None = None
                if not share:
                    reducer.arm()
                for number, micro in enumerate(share, start=1):
                    inputs, targets = runtime.place_batch(*next(loaded))
                    with precision.autocast():
                        part = cross_entropy(model(inputs), targets)
                    weight = len(micro) * world.size / len(batch)
                    part = part if weight == 1 else part * weight
                    if number == len(share):
                        reducer.arm()
                    precision.backward(part)
                    loss = part.detach() if loss is None else loss + part.detach()
                reducer.finish()
                update = precision.step(optimizer, parameters, cfg.clip)
                step += 1
                yield StepResult(
                    step=step,
                    total=total,
                    epoch=epoch,
                    epoch_ends=step % per_epoch == 0 or step == total,
                    samples=len(batch),
                    loss=torch.zeros((), device=world.device) if loss is None else loss,
                    lr=lr,
                    applied=update.applied,
                    sent_bytes=reducer.sent_bytes,
                )
    finally:
        reducer.close()


def _micro_batches(batch: Tensor, rank: int, size: int, accumulate: int) -> list[Tensor]:
    """This rank's share of a global batch, in at most `accumulate` non-empty pieces."""
    share = shard(batch, rank, size)
    return [piece for piece in share.tensor_split(accumulate) if len(piece)]


def _seed_step(runtime: Runtime, step: int) -> None:
    """Seed dropout by (seed, step of the run, rank): a resumed run draws the same numbers."""
    mixed = hash((runtime.seed, step, runtime.world.rank)) & 0x7FFF_FFFF_FFFF_FFFF
    if runtime.world.device.type == "cuda":
        torch.cuda.manual_seed(mixed)
    else:
        torch.default_generator.manual_seed(mixed)
