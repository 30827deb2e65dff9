"""The training loop: one generator that yields after every optimizer step.

Between two steps the caller may change a pruning mask, evaluate, report or stop. Global batch k of
epoch e holds the same samples for any number of workers (trainer.data.order), and every unit of
loss (`Task.units`) has the same weight in it, on whichever worker and in whichever micro-batch it
is: the mean over workers of the gradients is the gradient of the mean over the global batch.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.data.hashing import mix
from trainer.data.order import global_batches, shard
from trainer.data.split import Split
from trainer.data.streams import stream_of
from trainer.engine.batchnorm import SyncBatchNorm
from trainer.engine.buffers import ForwardBuffers
from trainer.engine.finite import check_inputs
from trainer.engine.freeze import Freezing
from trainer.engine.late import LateValue, reads_late
from trainer.engine.local import LocalSteps
from trainer.engine.objective import Objective, Supervised
from trainer.engine.optim import load_state, set_lr
from trainer.engine.reducer import Reducer
from trainer.engine.runtime import Runtime
from trainer.engine.schedules import build_schedule
from trainer.errors import Diverged

Request = Callable[[], int]
"""Returns what this rank requests of all ranks after the step: a small number, 0 for nothing."""


@dataclass(slots=True)
class StepResult:
    """One optimizer step; the same on all ranks, but for `sent_bytes`.

    With local steps, `applied` and `lr` are also those of this rank and, where the step is not
    `synchronized`, the loss and `targets`.
    """

    step: int  # steps done in this phase, this one included
    total: int  # steps that the phase will do
    epoch: int  # 0 is the first
    epoch_ends: bool  # the last step of its epoch, or of the phase
    samples: int  # size of the global batch
    targets: float  # units of loss of the global batch, such as targets that are not ignored
    lr: float
    applied: bool  # False: skipped by loss scaling, or there is no unit of loss
    sent_bytes: int  # gradient bytes that this worker sent
    requested: int  # sum of the ranks' requests; the same on all ranks
    state: Callable[[], dict[str, Any]]  # returns what `fit` needs to continue from here
    read_loss: Callable[[], float]
    # Returns entries of the state that are not the same on all ranks: see `fit`.
    rank_state: Callable[[], dict[str, Any]] = dict
    synchronized: bool = True  # whether all ranks have the same weights; False within local steps

    @property
    def loss(self) -> float:
        """Mean loss over the units of loss of the global batch; 0 if there are none.

        On a single GPU, reading the loss of the last step waits for the device.
        """
        return self.read_loss()


@dataclass(slots=True, frozen=True)
class _Loss:
    """The loss of a step, and what belongs to it."""

    read: Callable[[], float]
    step: int  # 1 is the first
    lr: float
    samples: list[Tensor]  # this rank's indices, by micro-batch; empty ones among them


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
    objective: Objective | None = None,
    local_steps: int = 1,
) -> Iterator[StepResult]:
    """Train `model` in place on `split`, yielding after every optimizer step.

    A step that is skipped (see `StepResult.applied`) does not advance the learning-rate schedule.

    Args:
        model: On the runtime's device, with the same bits on every rank; put in training mode.
        split: Training data.
        cfg: Length and settings of the training; with `epochs: 0` nothing is yielded.
        runtime: What all phases share.
        epochs_before: Epochs of earlier phases. Order, augmentation and dropout depend on the epoch
            of the run, so that no phase repeats those of another.
        start: Continue from this `StepResult.state`, with the model as it was then. The entries of
            this rank's own `StepResult.rank_state` are added to it, unless they are lost; they are
            empty where all ranks have the same state.
        request: Called on each rank in each step; all ranks get the sum in `requested`.
        objective: What is minimized; None: the loss of the task.
        local_steps: Optimizer steps that a rank takes alone between two averages of the weights
            (see `LocalSteps`); an average also ends each epoch. 1, or a single rank: gradients are
            averaged in each step.

    Raises:
        Diverged: The loss is NaN or infinite. All ranks raise it in the same step: before its
            update, or, on a single GPU, a step later, or from `StepResult.state`.
        RunError: Likewise, because of an input; the message names the sample.
        ConnectionError: A rank is lost. The model and `StepResult.state` are those after the last
            step that was yielded, or as at the start.
        TimeoutError: Likewise, of a rank that is silent.
    """
    per_epoch, total = steps_in(len(split), runtime.batch_size, cfg)
    if total == 0:
        return
    world, precision, task = runtime.world, runtime.mixed_precision, runtime.task
    if world.size == 1:
        local_steps = 1
    objective = objective or Supervised(task)
    freezing = Freezing(model, cfg.freeze, cfg.epochs)
    parameters = freezing.trained
    with runtime.world.heartbeat.busy():  # torch imports its compiler for the first optimizer
        optimizer = runtime.optimizer.build(parameters, model)
    peak = cfg.lr if cfg.lr is not None else runtime.optimizer.lr
    schedule = build_schedule(cfg, peak, total, per_epoch)
    step = updates = 0
    late = reads_late(world.device, world.size)
    unchecked: _Loss | None = None  # of the last step, if losses are read late
    loaded: Generator[Any] | None = None  # the pass over the split, which has one at a time
    if start is not None:
        step, updates = start["step"], start["updates"]
        load_state(optimizer, start["optimizer"])
        precision.load(start["scaler"])

    def check(loss: _Loss) -> None:
        """Raise an error if a loss is not finite."""
        if math.isfinite(value := loss.read()):
            return
        if loaded is not None:
            loaded.close()
        epoch = (loss.step - 1) // per_epoch
        samples = [indices for indices in loss.samples if len(indices)]
        check_inputs(world, split, "train", samples, epochs_before + epoch)
        raise Diverged(
            f"the loss is {value} in step {loss.step} (epoch {epoch + 1}) at a learning rate of "
            f"{loss.lr:g}: lower optimizer.lr, warm up, or clip"
        )

    def state() -> dict[str, Any]:
        if unchecked is not None:
            check(unchecked)
        return {
            "step": step,
            "updates": updates,
            "optimizer": optimizer.state_dict(),
            "scaler": precision.state(),
            **({"reducer": reducer.state()} if reducer.keeps_state else {}),
        }

    def rank_state() -> dict[str, Any]:
        own: dict[str, Any] = {}
        if errors := reducer.rank_state():
            own["rank_reducer"] = errors
        if local_steps > 1 and world.rank > 0:  # rank 0's are those of `state`
            own.update(updates=updates, optimizer=optimizer.state_dict())
        return own

    def build_reducer() -> Reducer | LocalSteps:
        reducer = runtime.reducer(parameters, extras=3)
        if local_steps == 1:
            return reducer
        return LocalSteps(reducer, parameters, world, runtime.allreduce)

    per_sample = _units_per_sample(split, runtime)
    synchronized = SyncBatchNorm(world) if runtime.sync_batchnorm else None
    reducer = build_reducer()
    buffers = ForwardBuffers(model) if world.size > 1 else None
    loss_slot, request_slot, ignored_slot = reducer.extra.unbind()
    model.train()
    samples: list[Tensor] = []  # of this rank since the last loss that all ranks have
    try:
        for epoch in range(step // per_epoch, cfg.epochs):
            if freezing.begin_epoch(epoch):
                reducer.close()
                reducer = build_reducer()
                loss_slot, request_slot, ignored_slot = reducer.extra.unbind()
            if start is not None and "reducer" in start and reducer.keeps_state:
                reducer.load(start["reducer"], start.get("rank_reducer", {}))
            start = None
            run_epoch = epochs_before + epoch
            batches = global_batches(
                len(split), runtime.batch_size, runtime.seed, run_epoch, stream_of(split) is None
            )
            batches = batches[step % per_epoch :][: total - step]
            shares = [
                micro_batches(b, world.rank, world.size, cfg.accumulate, runtime.sync_batchnorm)
                for b in batches
            ]
            # An empty micro-batch is computed with a substitute, which does not count.
            order = [
                m if len(m) else _substitute(b, share[:number])
                for b, share in zip(batches, shares, strict=True)
                for number, m in enumerate(share)
            ]
            loaded = world.heartbeat.busy_until_first(split.batches(order, run_epoch))
            for batch, share in zip(batches, shares, strict=True):
                lr = schedule(updates)
                set_lr(optimizer, lr)
                _seed_step(runtime, epochs_before * per_epoch + step)
                if buffers is not None:
                    buffers.begin_step()
                reducer.zero_grad()
                epoch_ends = (step + 1) % per_epoch == 0 or step + 1 == total
                reducer.synchronizes = epoch_ends or (step % per_epoch + 1) % local_steps == 0
                requested = float(request())
                request_slot.fill_(requested)
                loss = torch.zeros((), device=world.device)
                full = len(batch) * per_sample  # units of loss, if no target is ignored
                ignored = 0.0  # of them, on this rank
                for number, indices in enumerate(share, start=1):
                    inputs, targets = next(loaded)
                    counted = task.units(targets) if len(indices) else 0
                    ignored += len(indices) * per_sample - counted
                    inputs, targets = runtime.place_batch(inputs, targets)
                    if synchronized is not None:
                        synchronized.counts = len(indices) > 0
                    with synchronized or nullcontext(), precision.autocast():
                        part = objective(model, inputs, targets, counted)
                    weight = counted * world.size / full
                    part = part if weight == 1 else part * weight
                    loss = part.detach() if number == 1 else loss + part.detach()
                    if number == len(share):
                        loss_slot.copy_(loss)
                        ignored_slot.fill_(ignored)
                        reducer.arm()
                    precision.backward(part)
                    world.heartbeat.beat()
                if not share:
                    loss_slot.zero_()
                    ignored_slot.zero_()
                reducer.finish()
                if late:
                    mean_request, mean_ignored = requested, float(ignored)
                    read_loss: Callable[[], float] = LateValue(loss_slot)
                else:
                    mean_loss, mean_request, mean_ignored = reducer.extra.tolist()
                    read_loss = partial(float, mean_loss)
                # So far the weights were those of a batch in which no target is ignored.
                counted = max(0, full - mean_ignored * world.size)
                if not task.fractional_units:
                    counted = round(counted)
                if counted not in (0, full):
                    read_loss = _scaled(read_loss, full / counted)
                # A rank that trains alone weights its gradients as if all shares were like its own.
                own = counted if local_steps == 1 else max(0, full - ignored * world.size)
                if own == 0:
                    reducer.zero_grad()
                elif own != full:
                    _multiply_gradients(parameters, full / own)
                samples += share
                if reducer.synchronizes:
                    if unchecked is not None:
                        check(unchecked)
                    unchecked = _Loss(read_loss, step + 1, lr, samples)
                    samples = []
                    if not late or epoch_ends:
                        check(unchecked)
                        unchecked = None
                if buffers is not None:
                    buffers.end_step()
                scale = precision.scale if reducer.keeps_state else 1.0
                update = precision.step(optimizer, parameters, cfg.clip)
                if reducer.keeps_state:
                    reducer.rescale(precision.scale / scale)
                reducer.end_step()
                step += 1
                updates += update.applied
                world.heartbeat.step = step
                world.heartbeat.beat()
                yield StepResult(
                    step=step,
                    total=total,
                    epoch=epoch,
                    epoch_ends=epoch_ends,
                    samples=len(batch),
                    targets=counted,
                    lr=lr,
                    applied=update.applied,
                    sent_bytes=reducer.sent_bytes,
                    requested=round(mean_request * world.size),
                    state=state,
                    read_loss=read_loss,
                    rank_state=rank_state,
                    synchronized=reducer.synchronizes,
                )
                if step == total:
                    return
    except (ConnectionError, TimeoutError):
        if buffers is not None:
            buffers.restore()
        raise
    finally:
        if loaded is not None:  # results of steps, which the caller may keep, refer to it
            loaded.close()
        reducer.close()
        freezing.release()


def micro_batches(
    batch: Tensor, rank: int, size: int, accumulate: int, together: bool = False
) -> list[Tensor]:
    """Cut a global batch into the micro-batches of one rank.

    Args:
        batch: Sample indices [n].
        rank: Which part of the batch to cut up.
        size: Number of ranks.
        accumulate: Maximum number of micro-batches.
        together: Whether the n-th micro-batches of all ranks form what would be the n-th of a
            single one, as synchronized batch norm needs it. Otherwise their sizes are more even.

    Returns:
        Non-empty index tensors; with `together` equally many on all ranks, of which some may be
        empty.
    """
    if together:
        whole = [piece for piece in batch.tensor_split(accumulate) if len(piece)]
        return [shard(piece, rank, size) for piece in whole]
    pieces = shard(batch, rank, size).tensor_split(accumulate)
    return [piece for piece in pieces if len(piece)]


def _substitute(batch: Tensor, before: list[Tensor]) -> Tensor:
    """A sample that was read last, or else one before all others, so that streams run forwards."""
    return next((m[-1:] for m in reversed(before) if len(m)), batch[:1])


def _units_per_sample(split: Split, runtime: Runtime) -> int:
    """Units of loss of the first sample, if no target is ignored; the same on all ranks."""
    with runtime.world.heartbeat.busy():
        ((_, targets),) = split.batches([torch.tensor([0])], None)
    return max(1, runtime.task.full_units(targets))


def _scaled(read: Callable[[], float], factor: float) -> Callable[[], float]:
    return lambda: read() * factor


def _multiply_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def _seed_step(runtime: Runtime, step: int) -> None:
    """Seed dropout with (seed, step of the run, rank), so that a resumed run repeats its draws."""
    mixed = mix(runtime.seed, step, runtime.world.rank)
    torch.default_generator.manual_seed(mixed)
    if runtime.world.device.type == "cuda":
        torch.cuda.manual_seed(mixed)
