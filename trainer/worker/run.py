"""One experiment, phase by phase: the body that every worker executes (SPMD).

Every rank runs the same lines on the same bits. A phase enters, trains, leaves; the model between
two phases is plain weights. What a watcher should know is yielded as messages; only rank 0's reach
the driver, so that the body needs no rank-specific branches.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.compress.counts import counts
from trainer.compress.rewrite import restore
from trainer.compress.state import load_state, model_state
from trainer.config import CheckpointConfig, Config
from trainer.data.split import Splits
from trainer.engine.cost import macs
from trainer.engine.evaluate import Metrics, evaluate
from trainer.engine.loop import StepResult, fit, steps_in
from trainer.engine.objective import Distilled, Objective, supervised
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.errors import ConfigError, Diverged, RunError
from trainer.messages import (
    Checkpoint,
    Message,
    PhaseEnded,
    PhaseRecord,
    PhaseStarted,
    RoundEnded,
    RoundRecord,
    RunStarted,
    RunStopped,
)
from trainer.parts import build_data, build_model, build_runtime
from trainer.phases import Phase, build_phases
from trainer.phases.stages import stages, teacher_phase
from trainer.store.checkpoints import Point
from trainer.store.serialization import check_state, metadata, pack, to_bytes, unpack
from trainer.worker.clock import PhaseClock
from trainer.worker.preflight import check_match

GO_ON, KEEP, STOP = 0, 1, 2  # what rank 0 may ask of all ranks after a step


LOSS_SCALE = "loss_scale"  # metadata of the weights at the end of a phase


@dataclass(frozen=True)
class Start:
    """Where a run goes on."""

    phase: int  # index of the first phase to run
    weights: bytes | None = None  # what the phase before it left; None: the initial weights
    within: bytes | None = None  # `Checkpoint.content` of that phase; None: from its beginning
    baseline: bytes | None = None  # what the dense stage left; None: `weights`, or still to come


def start_at(cfg: Config, point: Point, ended: Callable[[int], bytes]) -> Start:
    """Where a run of `cfg` goes on.

    Args:
        point: the last checkpoint.
        ended: the weights that a phase left, by its index; -1: the initial ones.

    Raises:
        RunError: what it needs is gone, or damaged.
    """
    if cfg.init_from and point.weights is None:
        raise RunError("the initial weights in checkpoints/ are damaged: resume the run")
    if point.phase == 0:  # no phase has left anything yet
        return Start(0, point.weights, point.within)
    taught_by = teacher_phase(build_phases(cfg.phases), point.phase)
    baseline = None if taught_by is None else ended(taught_by)
    return Start(point.phase, point.weights, point.within, baseline)


def experiment(world: World, cfg: Config, start: Start) -> Iterator[Message]:
    """Run the phases of `cfg` on this worker, without touching the test set."""
    world.heartbeat.begin("at the start", 0)  # a warm worker was elsewhere
    with world.heartbeat.busy():
        torch.manual_seed(cfg.seed)
        data = build_data(cfg)
        phases = build_phases(cfg.phases)
        runtime = build_runtime(world, cfg)
        model = runtime.place(build_model(cfg))
        check_state(model)
        check_phases(phases, model)
        to_come = list(phases.values())[start.phase :]
        check_match(model, data, runtime, [phase.fit for phase in to_come])
        teacher = None
        if start.baseline is not None:
            teacher = restore(copy.deepcopy(model), safetensors.torch.load(start.baseline))
        if start.weights is not None:
            restore(model, safetensors.torch.load(start.weights))
            if LOSS_SCALE in (entries := metadata(start.weights)):
                runtime.mixed_precision.load(json.loads(entries[LOSS_SCALE]))
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
    baseline = stages(phases)[0].phase
    for index, (name, phase) in enumerate(phases.items()):
        if index >= start.phase:
            if should_stop(world):
                yield RunStopped()
                return
            later = list(phases.values())[index + 1 :]
            if index == baseline + 1 and (
                phase.fit.distill.weight or any(p.wants_dense for p in later)
            ):
                teacher = copy.deepcopy(model)  # the dense one
            within = unpack(start.within) if start.within and index == start.phase else None
            run = _PhaseRun(
                index, name, phase, model, teacher, data, runtime, epochs_before, cfg.checkpoint
            )
            yield from run.messages(within)
            if run.stopped:
                return
        epochs_before += phase.fit.epochs * phase.most_rounds


@dataclass
class _PhaseRun:
    """One phase of a run: entered, trained, left; most phases once, some in several rounds."""

    index: int
    name: str
    phase: Phase
    model: nn.Module
    teacher: nn.Module | None  # the dense model, where the phase wants it
    data: Splits
    runtime: Runtime
    epochs_before: int
    checkpoint: CheckpointConfig
    stopped: bool = False
    learnable: int = 0  # of the last round
    last: StepResult | None = None  # likewise

    def messages(self, within: Mapping[str, Any] | None) -> Iterator[Message]:
        """Run the phase and say how it goes.

        Args:
            within: go on from this state (of `_keep`); None: begin.
        """
        world, phase, model = self.runtime.world, self.phase, self.model
        clock = PhaseClock(world, time.monotonic())
        rounds: list[RoundRecord] = []
        if within is not None:
            clock.load(within["clock"])
            phase.load(within["phase"])
            rounds = [RoundRecord(**record) for record in within["rounds"]]
        while True:
            yield from self._round(clock, rounds, within)
            if self.stopped:
                return
            left = counts(model)
            metrics = self._measure(model)  # of the plain weights
            if self.last:
                shown = self._shown(self.last, len(rounds))
                yield clock.epoch(self.name, shown, metrics, left.sparsity)
            judged = phase.judge(model, world, metrics)
            if judged is None:
                break
            rounds.append(judged)
            yield RoundEnded(self.name, judged)
            if judged.stopped:
                left, metrics = counts(model), self._measure(model)
                break
            within = None
        self._check_finite(metrics)
        steps = self._steps_of_a_round() * max(1, len(rounds))
        record = PhaseRecord(
            name=self.name,
            kind=phase.kind,
            seconds=clock.seconds(),
            steps=steps,
            train_loss=clock.train_loss,
            accuracy=metrics.accuracy,
            loss=metrics.loss,
            parameters=left.parameters,
            learnable=self.learnable,
            nonzero=left.nonzero,
            sparsity=left.sparsity,
            sent_bytes_per_step=self.last.sent_bytes if self.last else 0,
            images_per_second=clock.overall(),
            macs=self._macs(),
            rounds=rounds,
        )
        with world.heartbeat.busy():
            scale = self.runtime.mixed_precision.state()  # where the next phase starts
            entries = {LOSS_SCALE: json.dumps(scale)} if scale else {}
            weights = to_bytes(model_state(model), entries) if world.rank == 0 else b""
            yield PhaseEnded(index=self.index, record=record, weights=weights)

    def _round(
        self, clock: PhaseClock, rounds: list[RoundRecord], within: Mapping[str, Any] | None
    ) -> Iterator[Message]:
        """Plan, enter, train, leave."""
        model, phase, cfg, world = self.model, self.phase, self.phase.fit, self.runtime.world
        number = len(rounds)
        step_before = within["fit"]["step"] if within else 0
        world.heartbeat.begin(f"in phase {self.name}", self.index, step_before)
        with world.heartbeat.busy():
            if within is None:
                phase.plan(model, world, self._measure, self.teacher)
            phase.enter(model, world)
            if within is not None:
                load_state(model, within["model"])
        entered = counts(model)
        self.learnable = entered.learnable
        if within is not None or not rounds:
            yield PhaseStarted(
                index=self.index,
                name=self.name,
                kind=phase.kind,
                epochs=cfg.epochs * phase.most_rounds,
                steps=self._steps_of_a_round() * phase.most_rounds,
                learnable=entered.learnable,
                sparsity=entered.sparsity,
            )
        self.last = None
        try:
            for step in fit(
                model,
                self.data.train,
                cfg,
                self.runtime,
                self.epochs_before + number * cfg.epochs,
                within and within["fit"],
                lambda: self._request(clock),
                self._objective(),
            ):
                self.last = step
                phase.after_step(model, world, step.step, step.total)
                clock.count(step)
                if clock.progress_due():
                    shown = self._shown(step, number)
                    yield clock.progress(self.name, cfg.epochs * phase.most_rounds, shown)
                if step.step == step.total:
                    continue
                if step.epoch_ends:
                    clock.end_epoch()
                    metrics = self._measure(model)
                    shown = self._shown(step, number)
                    yield clock.epoch(self.name, shown, metrics, counts(model).sparsity)
                every = self.checkpoint.every_steps
                if step.requested != GO_ON or (every and step.step % every == 0):
                    with world.heartbeat.busy():
                        yield self._keep(step, clock, rounds)
                    clock.kept = time.monotonic()
                if step.requested == STOP:
                    self.stopped = True
                    yield RunStopped()
                    return
        except Diverged as error:
            raise Diverged(f"phase {self.name}: {error}") from error
        if self.last:
            clock.end_epoch()
        with world.heartbeat.busy():
            phase.leave(model)

    def _check_finite(self, metrics: Metrics) -> None:
        """Refuse what the last update left: the loss before each update is checked by the loop."""
        if math.isfinite(metrics.loss):
            return
        message = f"phase {self.name}: the validation loss is {metrics.loss} at its end"
        if self.last:
            message += f", after step {self.last.step} at a learning rate of {self.last.lr:g}"
        raise Diverged(f"{message}: lower optimizer.lr, warm up, or clip")

    def _measure(self, model: nn.Module) -> Metrics:
        return evaluate(model, self.data.validation, self.runtime)

    def _steps_of_a_round(self) -> int:
        return steps_in(len(self.data.train), self.runtime.batch_size, self.phase.fit)[1]

    def _shown(self, step: StepResult, number: int) -> StepResult:
        """A step as it is told: counted from the beginning of the phase, over all its rounds."""
        if self.phase.most_rounds == 1:
            return step
        return dataclasses.replace(
            step,
            step=number * step.total + step.step,
            total=self.phase.most_rounds * step.total,
            epoch=number * self.phase.fit.epochs + step.epoch,
        )

    def _objective(self) -> Objective:
        distill = self.phase.fit.distill
        if not distill.weight:
            return supervised
        assert self.teacher is not None  # check_teachers
        return Distilled(self.teacher, distill.weight, distill.temperature)

    def _request(self, clock: PhaseClock) -> int:
        """What this rank asks: rank 0 hears the driver and watches the time."""
        world, every = self.runtime.world, self.checkpoint.every_seconds
        if world.rank != 0:
            return GO_ON
        if world.stop.is_set():
            return STOP
        return KEEP if every and time.monotonic() - clock.kept >= every else GO_ON

    def _macs(self) -> int:
        order = iter([torch.zeros(1, dtype=torch.long)])
        inputs, _ = self.runtime.place_batch(*next(self.data.validation.batches(order, None)))
        with self.runtime.mixed_precision.autocast():
            return macs(self.model, inputs)

    def _keep(self, step: StepResult, clock: PhaseClock, rounds: list[RoundRecord]) -> Checkpoint:
        """All that is needed to go on after `step`. A collective call."""
        told, clocked = self._shown(step, len(rounds)).step, clock.state()
        content = b""
        if self.runtime.world.rank == 0:
            state = {
                "model": model_state(self.model),
                "clock": clocked,
                "fit": step.state(),
                "phase": self.phase.state(),
                "rounds": [dataclasses.asdict(record) for record in rounds],
            }
            content = pack(state)
        return Checkpoint(phase=self.index, step=told, content=content)


def check_phases(phases: Mapping[str, Phase], model: nn.Module) -> None:
    """Hold the phases' settings against the model. Raises ConfigError."""
    for name, phase in phases.items():
        try:
            phase.check(model)
        except ConfigError as error:
            raise ConfigError(f"phases.{name}: {error}") from error


def should_stop(world: World) -> bool:
    """Whether rank 0 was asked to stop; the same answer on all ranks."""
    asked = torch.tensor(int(world.rank == 0 and world.stop.is_set()), device=world.device)
    world.all_reduce(asked)
    return bool(asked)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that must have the same bits on every rank."""
    yield from model.parameters()
    yield from model.buffers()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
