"""One experiment, phase by phase: the body that every worker executes (SPMD).

Every rank runs the same lines on the same bits. A phase enters, trains, leaves; the model between
two phases is plain weights. What a watcher should know is yielded as messages; only rank 0's reach
the driver, so that the body needs no rank-specific branches.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainer.build import build
from trainer.compress.counts import counts
from trainer.config import Config
from trainer.data.split import Splits
from trainer.engine.checkpoint import to_bytes
from trainer.engine.evaluate import Metrics, evaluate
from trainer.engine.loop import StepResult, fit, steps_in
from trainer.engine.precision import Precision
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.messages import (
    EpochEnded,
    Message,
    PhaseEnded,
    PhaseRecord,
    PhaseStarted,
    Progress,
    RunEnded,
    RunStarted,
)
from trainer.phases import Phase, build_phases

PROGRESS_EVERY_S = 0.2


def experiment(world: World, cfg: Config) -> Iterator[Message]:
    """Run all phases of `cfg` on this worker and measure the result on the test set."""
    torch.manual_seed(cfg.seed)
    data = build_data(cfg)
    phases = build_phases(cfg.phases)
    runtime = Runtime(
        world=world,
        precision=Precision(cfg.precision, world.device),
        allreduce=cfg.allreduce,
        optimizer=cfg.optimizer,
        batch_size=int(cfg.data["batch_size"]),
        seed=cfg.seed,
        channels_last=cfg.channels_last,
    )
    model = runtime.place(build_model(cfg))
    world.broadcast(_tensors(model))
    yield RunStarted(
        workers=world.size,
        device=_device_name(world.device),
        parameters=counts(model).parameters,
        train=len(data.train),
        validation=len(data.validation),
        test=len(data.test),
    )
    epochs_before = 0
    for index, (name, phase) in enumerate(phases.items()):
        yield from _run_phase(index, name, phase, model, data, runtime, epochs_before)
        epochs_before += phase.fit.epochs
    metrics = evaluate(model, data.test, runtime)
    yield RunEnded(accuracy=metrics.accuracy, loss=metrics.loss)


def _run_phase(
    index: int,
    name: str,
    phase: Phase,
    model: nn.Module,
    data: Splits,
    runtime: Runtime,
    epochs_before: int,
) -> Iterator[Message]:
    """Enter, train, leave one phase, and say how it went."""
    world, cfg = runtime.world, phase.fit
    started = time.monotonic()
    phase.enter(model, world)
    entered = counts(model)
    _, total = steps_in(len(data.train), runtime.batch_size, cfg)
    yield PhaseStarted(
        index=index,
        name=name,
        kind=phase.kind,
        epochs=cfg.epochs,
        steps=total,
        learnable=entered.learnable,
        sparsity=entered.sparsity,
    )
    clock = _Clock(world)
    last: StepResult | None = None
    for last in fit(model, data.train, cfg, runtime, epochs_before):
        phase.after_step(model, world, last.step, last.total)
        clock.count(last)
        if clock.progress_due():
            yield clock.progress(name, cfg.epochs, last)
        if last.epoch_ends and last.step < last.total:
            clock.end_epoch()
            metrics = evaluate(model, data.validation, runtime)
            yield clock.epoch(name, last, metrics, counts(model).sparsity)
    if last:
        clock.end_epoch()
    phase.leave(model)
    left = counts(model)
    metrics = evaluate(model, data.validation, runtime)  # of the plain weights that stay
    if last:
        yield clock.epoch(name, last, metrics, left.sparsity)
    yield PhaseEnded(
        index=index,
        record=PhaseRecord(
            name=name,
            kind=phase.kind,
            seconds=time.monotonic() - started,
            steps=last.step if last else 0,
            train_loss=clock.train_loss,
            accuracy=metrics.accuracy,
            loss=metrics.loss,
            parameters=left.parameters,
            learnable=entered.learnable,
            nonzero=left.nonzero,
            sparsity=left.sparsity,
            sent_bytes_per_step=last.sent_bytes if last else 0,
            images_per_second=clock.overall(),
        ),
        weights=to_bytes(model.state_dict()) if world.rank == 0 else b"",
    )


class _Clock:
    """Loss and speed of the epoch that runs. Evaluation does not count as training time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.train_loss: float | None = None
        self._speed = 0.0
        self._skipped = 0
        self._all_samples = 0
        self._all_seconds = 0.0
        self._said = time.monotonic()
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self._samples = 0
        self._applied = 0
        self._steps = 0
        self._started = time.monotonic()

    def count(self, step: StepResult) -> None:
        """Add one step."""
        self._loss += step.loss * step.samples
        self._samples += step.samples
        self._steps += 1
        self._applied += step.applied

    def progress_due(self) -> bool:
        """Whether the last progress was said long enough ago."""
        now = time.monotonic()
        if now - self._said < PROGRESS_EVERY_S:
            return False
        self._said = now
        return True

    def progress(self, phase: str, epochs: int, step: StepResult) -> Progress:
        """Where this worker is now."""
        return Progress(
            phase=phase,
            epoch=step.epoch + 1,
            epochs=epochs,
            step=step.step,
            steps=step.total,
            loss=step.loss.item(),
            lr=step.lr,
            images_per_second=self._samples / max(time.monotonic() - self._started, 1e-9),
        )

    def end_epoch(self) -> None:
        """Close the epoch: its mean loss over all workers. A collective call."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._all_samples += self._samples
        self._all_seconds += seconds
        self._speed = self._samples / seconds
        self._skipped = self._steps - self._applied
        self.world.all_reduce(self._loss)
        self.train_loss = self._loss.item() / (self._samples * self.world.size)
        self._start_epoch()

    def epoch(
        self, phase: str, step: StepResult, validation: Metrics, sparsity: float
    ) -> EpochEnded:
        """The epoch that was closed last, and the start of the next one's time."""
        self._started = time.monotonic()
        assert self.train_loss is not None
        return EpochEnded(
            phase=phase,
            epoch=step.epoch + 1,
            step=step.step,
            train_loss=self.train_loss,
            loss=validation.loss,
            accuracy=validation.accuracy,
            lr=step.lr,
            sparsity=sparsity,
            images_per_second=self._speed,
            skipped=self._skipped,
        )

    def overall(self) -> float | None:
        """Samples per second of the whole phase; None where nothing was trained."""
        return self._all_samples / self._all_seconds if self._all_seconds else None


def build_data(cfg: Config) -> Splits:
    """The three splits. Raises ConfigError where the settings or the data are wrong."""
    settings = {key: value for key, value in cfg.data.items() if key != "batch_size"}
    return build("data", settings, Splits, seed=cfg.seed)


def build_model(cfg: Config) -> nn.Module:
    """The model, weights drawn from the random state as it is. Raises ConfigError."""
    return build("model", cfg.model, nn.Module)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that must have the same bits on every rank."""
    yield from model.parameters()
    yield from model.buffers()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
