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
from trainer.engine.finite import check_samples
from trainer.engine.freeze import Freezing
from trainer.engine.late import LateValue, reads_late
from trainer.engine.local import LocalSteps
from trainer.engine.objective import Objective, Supervised
from trainer.engine.optim import load_state, set_lr
from trainer.engine.reducer import Reducer
from trainer.engine.runtime import Runtime
from trainer.engine.schedules import build_schedule
from trainer.errors import Diverged
from trainer.imports import collector_paused

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
    _, total = steps_in(len(split), runtime.batch_size, cfg)
    if total == 0:
        return
    fitting = _Fit(
        model, split, cfg, runtime, epochs_before, start, request, objective, local_steps
    )
    try:
        fitting.load_reducer(start or {})
        while fitting.step < total:
            yield from fitting.run_epoch()
    except (ConnectionError, TimeoutError):
        fitting.restore_buffers()
        raise
    finally:
        fitting.close()


class _Fit:
    """What `fit` keeps from step to step; `fit` explains the arguments."""

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        cfg: FitConfig,
        runtime: Runtime,
        epochs_before: int,
        start: Mapping[str, Any] | None,
        request: Request,
        objective: Objective | None,
        local_steps: int,
    ) -> None:
        world = runtime.world
        self.model, self.split, self.cfg, self.runtime = model, split, cfg, runtime
        self.world, self.precision = world, runtime.mixed_precision
        self.epochs_before, self.request = epochs_before, request
        self.objective = objective or Supervised(runtime.task)
        self.local_steps = local_steps if world.size > 1 else 1
        self.per_epoch, self.total = steps_in(len(split), runtime.batch_size, cfg)
        self.units_per_sample = _units_per_sample(split, runtime)
        self.freezing = Freezing(model, cfg.freeze, cfg.epochs)
        self.parameters = self.freezing.trained
        # torch imports its compiler for the first optimizer.
        with world.heartbeat.busy(), collector_paused():
            self.optimizer = runtime.optimizer.build(self.parameters, model)
        peak = cfg.lr if cfg.lr is not None else runtime.optimizer.lr
        self.schedule = build_schedule(cfg, peak, self.total, self.per_epoch)
        self.step = self.updates = 0  # steps done, and how many of them were applied
        if start is not None:
            self.step, self.updates = start["step"], start["updates"]
            load_state(self.optimizer, start["optimizer"])
            self.precision.load(start["scaler"])
        self.late = reads_late(world.device, world.size)
        self.unchecked: _Loss | None = None  # the last loss that all ranks have
        self.samples: list[Tensor] = []  # of this rank since that loss
        self.loaded: Generator[Any] | None = None  # the pass over the split, one at a time
        self.synchronized = SyncBatchNorm(world) if runtime.sync_batchnorm else None
        self.buffers = ForwardBuffers(model) if world.size > 1 else None
        model.train()
        self.freezing.begin_epoch(self.step // self.per_epoch)
        self.reducer = self.build_reducer()

    def build_reducer(self) -> Reducer | LocalSteps:
        """A reducer of the parameters that require a gradient now."""
        reducer = self.runtime.reducer(self.parameters, extras=3)
        if self.local_steps == 1:
            return reducer
        return LocalSteps(reducer, self.parameters, self.world, self.runtime.allreduce)

    def load_reducer(self, start: Mapping[str, Any]) -> None:
        """Let the reducer continue from the state of another fit, if it keeps one."""
        if "reducer" in start and self.reducer.keeps_state:
            self.reducer.load(start["reducer"], start.get("rank_reducer", {}))

    def run_epoch(self) -> Iterator[StepResult]:
        """Take the remaining steps of the present epoch."""
        epoch = self.step // self.per_epoch
        if self.freezing.begin_epoch(epoch):
            self.reducer.close()
            self.reducer = self.build_reducer()
        runtime, world, cfg = self.runtime, self.world, self.cfg
        run_epoch = self.epochs_before + epoch
        shuffled = stream_of(self.split) is None
        batches = global_batches(
            len(self.split), runtime.batch_size, runtime.seed, run_epoch, shuffled
        )
        batches = batches[self.step % self.per_epoch :][: self.total - self.step]
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
        self.loaded = world.heartbeat.busy_until_first(self.split.batches(order, run_epoch))
        for batch, share in zip(batches, shares, strict=True):
            yield self.take_step(epoch, len(batch), share)

    def take_step(self, epoch: int, samples: int, share: list[Tensor]) -> StepResult:
        """Take an optimizer step.

        Args:
            epoch: Of the fit; 0 is the first.
            samples: Size of the global batch.
            share: This rank's micro-batches of it, as sample indices.
        """
        step, reducer = self.step + 1, self.reducer
        in_epoch = self.step % self.per_epoch + 1
        epoch_ends = in_epoch == self.per_epoch or step == self.total
        reducer.synchronizes = epoch_ends or in_epoch % self.local_steps == 0
        lr = self.schedule(self.updates)
        set_lr(self.optimizer, lr)
        _seed_step(self.runtime, self.epochs_before * self.per_epoch + self.step)
        if self.buffers is not None:
            self.buffers.begin_step()
        read_loss, requested, counted = self.compute_gradients(samples, share)
        self.samples += share
        if reducer.synchronizes:
            self.check_loss()
            self.unchecked = _Loss(read_loss, step, lr, self.samples)
            self.samples = []
            if not self.late or epoch_ends:
                self.check_loss()
        if self.buffers is not None:
            self.buffers.end_step()
        applied = self.update_weights()
        self.step = step
        self.updates += applied
        self.world.heartbeat.step = step
        self.world.heartbeat.beat()
        return StepResult(
            step=step,
            total=self.total,
            epoch=epoch,
            epoch_ends=epoch_ends,
            samples=samples,
            targets=counted,
            lr=lr,
            applied=applied,
            sent_bytes=reducer.sent_bytes,
            requested=requested,
            state=self.state,
            read_loss=read_loss,
            rank_state=self.rank_state,
            synchronized=reducer.synchronizes,
        )

    def compute_gradients(
        self, samples: int, share: list[Tensor]
    ) -> tuple[Callable[[], float], int, float]:
        """Give the parameters the gradient of the mean loss over the units of the global batch.

        Args:
            samples: As for `take_step`.
            share: Likewise.

        Returns:
            What reads the loss, the sum of the ranks' requests, and the units of loss.
        """
        reducer, ranks = self.reducer, self.world.size
        reducer.zero_grad()
        loss_slot, request_slot, ignored_slot = reducer.extra.unbind()
        request_slot.fill_(request := float(self.request()))
        full = samples * self.units_per_sample  # units of loss, if no target is ignored
        ignored = self.run_backward(share, full, loss_slot, ignored_slot)
        reducer.finish()
        if self.late:
            read_loss: Callable[[], float] = LateValue(loss_slot)
            mean_request, mean_ignored = request, ignored
        else:
            mean_loss, mean_request, mean_ignored = reducer.extra.tolist()
            read_loss = partial(float, mean_loss)
        # So far the weights were those of a batch in which no target is ignored.
        counted = max(0, full - mean_ignored * ranks)
        if not self.runtime.task.fractional_units:
            counted = round(counted)
        if counted not in (0, full):
            read_loss = _scaled(read_loss, full / counted)
        # A rank that trains alone weights its gradients as if all shares were like its own.
        own = counted if self.local_steps == 1 else max(0, full - ignored * ranks)
        if own == 0:
            reducer.zero_grad()
        elif own != full:
            _multiply_gradients(self.parameters, full / own)
        return read_loss, round(mean_request * ranks), counted

    def run_backward(
        self, share: list[Tensor], full: int, loss_slot: Tensor, ignored_slot: Tensor
    ) -> float:
        """Run the forward and backward passes of this rank's micro-batches.

        The reducer is armed, and its slots are set, before the last backward pass.

        Args:
            share: As for `take_step`.
            full: Units of loss of the global batch, if no target is ignored.
            loss_slot: Gets the weighted sum of the losses.
            ignored_slot: Gets the units of loss that are missing, since targets are ignored.

        Returns:
            The units of loss that are missing.
        """
        task, ignored = self.runtime.task, 0.0
        loss_slot.zero_()
        ignored_slot.zero_()
        assert self.loaded is not None
        for number, indices in enumerate(share, start=1):
            inputs, targets = next(self.loaded)
            units = task.units(targets) if len(indices) else 0
            ignored += len(indices) * self.units_per_sample - units
            inputs, targets = self.runtime.place_batch(inputs, targets)
            if self.synchronized is not None:
                self.synchronized.counts = len(indices) > 0
            with self.synchronized or nullcontext(), self.precision.autocast():
                part = self.objective(self.model, inputs, targets, units)
            weight = units * self.world.size / full
            part = part if weight == 1 else part * weight
            loss_slot += part.detach()
            if number == len(share):
                ignored_slot.fill_(ignored)
                self.reducer.arm()
            self.precision.backward(part)
            self.world.heartbeat.beat()
        return ignored

    def update_weights(self) -> bool:
        """Let the optimizer update the weights; returns whether it did (`Precision.step`)."""
        reducer, precision = self.reducer, self.precision
        scale = precision.scale if reducer.keeps_state else 1.0
        update = precision.step(self.optimizer, self.parameters, self.cfg.clip)
        if reducer.keeps_state:
            reducer.rescale(precision.scale / scale)
        reducer.end_step()
        return update.applied

    def check_loss(self) -> None:
        """Raise an error if the last loss that all ranks have is unchecked, and is not finite."""
        loss, self.unchecked = self.unchecked, None
        if loss is None or math.isfinite(value := loss.read()):
            return
        if self.loaded is not None:
            self.loaded.close()
        epoch = (loss.step - 1) // self.per_epoch
        samples = [indices for indices in loss.samples if len(indices)]
        epoch_of_run = self.epochs_before + epoch
        target = check_samples(self.world, self.split, "train", samples, epoch_of_run)
        advice = f"; {target}: the loss must leave it out" if target else ""
        raise Diverged(
            f"the loss is {value} in step {loss.step} (epoch {epoch + 1}) at a learning rate of "
            f"{loss.lr:g}: lower optimizer.lr, warm up, or clip{advice}"
        )

    def state(self) -> dict[str, Any]:
        """`StepResult.state`: after the last step, whichever step is asked."""
        self.check_loss()
        return {
            "step": self.step,
            "updates": self.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.state(),
            **({"reducer": self.reducer.state()} if self.reducer.keeps_state else {}),
        }

    def rank_state(self) -> dict[str, Any]:
        """`StepResult.rank_state`."""
        own: dict[str, Any] = {}
        if errors := self.reducer.rank_state():
            own["rank_reducer"] = errors
        if self.local_steps > 1 and self.world.rank > 0:  # rank 0's are those of `state`
            own.update(updates=self.updates, optimizer=self.optimizer.state_dict())
        return own

    def restore_buffers(self) -> None:
        """Undo what the forward passes of a step that failed did to the model's buffers."""
        if self.buffers is not None:
            self.buffers.restore()

    def close(self) -> None:
        """End the pass over the split, close the reducer and unfreeze what was frozen."""
        if self.loaded is not None:  # results of steps, which the caller may keep, refer to it
            self.loaded.close()
        self.reducer.close()
        self.freezing.release()


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
