"""One phase of a run: enter, train, leave; some phases repeat this in several rounds."""

import contextlib
import dataclasses
import gc
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.compress.counts import Counts, counts
from trainer.compress.state import load_state, model_state
from trainer.config import CheckpointConfig
from trainer.data.mixed import MixedSplit
from trainer.data.order import permutation
from trainer.data.split import Split, Splits
from trainer.data.streams import apart, stream_of
from trainer.engine.average import WeightAverage
from trainer.engine.compiled import compiled
from trainer.engine.cost import macs
from trainer.engine.evaluate import Metrics, evaluate
from trainer.engine.freeze import frozen_values
from trainer.engine.loop import StepResult, fit, steps_in
from trainer.engine.objective import Distilled, Mixed, Objective, Penalized, Supervised
from trainer.engine.profile import (
    Profile,
    ProfiledObjective,
    ProfiledRuntime,
    ProfiledSplit,
    all_profiles,
)
from trainer.engine.recompute import recomputed
from trainer.engine.runtime import Runtime
from trainer.errors import ConfigError, Diverged
from trainer.messages import (
    STEP_COMPLETE,
    STEP_COUNTED,
    STEP_UPDATED,
    Checkpoint,
    Handover,
    Message,
    Notice,
    PhaseEnded,
    PhaseRecord,
    PhaseStarted,
    RoundEnded,
    RoundRecord,
    RunStopped,
    Traced,
)
from trainer.models.copying import copy_model
from trainer.phases import Phase, RoundPhase, StructuralPhase
from trainer.phases.structure import StructureChange, class_path, to_metadata
from trainer.store.directory import as_json, from_json
from trainer.store.serialization import pack, to_bytes, unpack
from trainer.worker.clock import PhaseClock
from trainer.worker.energy import READ_EVERY_S, EnergyMeter
from trainer.worker.selection import Selection

LOSS_SCALE = "loss_scale"
"""Key of the loss scale, with which the next phase starts, in the metadata of the weights."""

CONTINUE, SAVE, STOP, CHANGE = range(4)  # requests that rank 0 may send to all ranks after a step

Position = tuple[int, int, int]
"""Phase, step and stage, as in `Handover.position`."""

_PLAIN_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(StepResult)
    if field.name not in ("requested", "state", "read_loss", "rank_state")
)


def observed(split: Split, samples: int, runtime: Runtime) -> list[Any]:
    """The inputs that `Phase.observe` gets: batches on the device, the same on all ranks."""
    shuffled = stream_of(split) is None
    split = apart(split, most_workers=1)  # enough for a few batches
    order = permutation(len(split), runtime.seed, 0, shuffled)[:samples].split(runtime.batch_size)
    return [runtime.place_batch(*batch)[0] for batch in split.batches(order, None)]


class _Interrupted(Exception):
    """Raised where a phase that is tried is requested to stop."""

    def __init__(self, changes_members: bool) -> None:
        super().__init__()
        self.changes_members = changes_members


class _Leave(Exception):
    """Raised at the position at which this group of workers ends."""


@dataclass
class PhaseRun:
    """Runs one phase on this worker."""

    index: int
    name: str
    phase: Phase
    model: nn.Module
    dense: nn.Module | None  # the dense model, if the phase needs one
    data: Splits
    runtime: Runtime
    epochs_before: int  # epochs of earlier phases
    checkpoint: CheckpointConfig
    changes: list[StructureChange]  # structural changes so far; a structural phase adds its own
    earlier: Handover | None = None  # the state with which the phase begins, if it is known
    profile: bool = False  # whether to measure the steps
    elastic: bool = False  # the members of the group may change at any step
    leave_at: Position | None = None  # where the group ends, to continue with other members
    stopped: bool = False  # the run was requested to stop within this phase
    trainable: int = 0  # trainable values in the last round
    last: StepResult | None = None  # last step of the last round
    omitted: int = 0  # steps of all rounds that early stopping left out
    average: WeightAverage | None = None  # of the weights in the present round

    def __post_init__(self) -> None:
        train = self.data.train
        self._stream = stream_of(train)
        self.clock = PhaseClock(time.monotonic(), lambda: getattr(train, "waited_s", 0.0))
        self.meter = EnergyMeter(self.runtime.world.device)
        self.rounds: list[RoundRecord] = []
        self.selection = Selection(self.phase.fit)  # in the present round
        self._profile = Profile(self.runtime.world.device) if self.profile else None
        self._step: StepResult | None = None  # the last step whose update was applied to the model
        self._stage = STEP_COMPLETE  # of that step
        self._ended = 0.0  # when the last epoch was over

    def messages(self, resumed: Mapping[str, Any] | None) -> Iterator[Message]:
        """Run the phase and yield its reports.

        Args:
            resumed: State of a checkpoint within this phase to resume from; None: start the phase.
        """
        world, phase, model = self.runtime.world, self.phase, self.model
        rounds = self.rounds
        if resumed is not None:
            self._load_state(resumed)
        try:
            with self.clock.paused():
                for line in self._prepare(resumed):
                    yield Notice(f"phase {self.name}: {line}")
        except _Interrupted as request:
            yield from self._stop(changes_members=request.changes_members)
            return
        while True:
            yield from self._round(resumed)
            if self.stopped:
                return
            after = counts(model)
            metrics = self._evaluate(model)  # of the plain weights
            if self.last:
                shown = self._over_rounds(self.last, len(rounds))
                usage = self.meter.total(world)
                yield self.clock.epoch(self.name, shown, metrics, after.sparsity, usage)
            if not isinstance(phase, RoundPhase):
                break
            rounds.append(phase.end_round(model, world, metrics))
            yield RoundEnded(self.name, rounds[-1])
            if rounds[-1].stopped:
                after, metrics = counts(model), self._evaluate(model)
                break
            resumed = None
        self._check_finite(metrics)
        yield from self._end(metrics, after)

    def handover(self) -> Handover | None:
        """The latest state that this rank can hand over; None if it has none.

        It is valid also after a collective has failed: see `fit` and `Phase.after_step`.
        """
        if self._step is None:
            return self.earlier
        content = self._content(self._step, self._stage)
        return Handover(self._as_checkpoint(self._step, content), self._stage)

    def _load_state(self, resumed: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of this phase, as far as no round is concerned."""
        samples = len(self.data.train)
        if (before := resumed.get("samples", samples)) != samples:
            raise ConfigError(
                f"data: the training set has {samples} samples, but {before} when the run was "
                "interrupted: resume it with the same data, or start a new run"
            )
        self.clock.load(resumed["clock"])
        # One rank stands for all. Earlier versions did not measure energy.
        world = self.runtime.world
        share = resumed.get("workers", world.size) / world.size
        self.meter.load(resumed.get("energy", {}), share)
        self.rounds.extend(from_json(RoundRecord, record) for record in resumed["rounds"])
        self.phase.load_state(resumed["phase"])
        self.omitted = resumed.get("omitted", 0)  # earlier versions always trained all steps
        if self._stream is not None and (state := resumed.get("stream")):
            self._stream.load_state(state)

    def _prepare(self, resumed: Mapping[str, Any] | None) -> Iterator[str]:
        """Let the phase observe the model, choose its settings and change the structure.

        Yields:
            What is chosen, in lines for the user.

        Raises:
            _Interrupted: The run was requested to stop meanwhile.
        """
        world, phase, model = self.runtime.world, self.phase, self.model
        with world.heartbeat.busy():
            if phase.samples:
                world.barrier()  # no rank that is a thread may call a model while another traces
                phase.observe(model, world, observed(self.data.train, phase.samples, self.runtime))
            if resumed is None:
                yield from phase.search(model, world, self._evaluate, self.dense)
            if isinstance(phase, StructuralPhase):
                self._change_structure(phase, resumed)

    def _end(self, metrics: Metrics, after: Counts) -> Iterator[Message]:
        """Report the phase, what the user should know about it, and its weights."""
        world, phase, model, clock = self.runtime.world, self.phase, self.model, self.clock
        profile = None
        if self._profile is not None:
            profile, traces = all_profiles(self._profile, world)
            yield Traced(self.index, self.name, traces)
        record = PhaseRecord(
            name=self.name,
            kind=phase.kind,
            seconds=clock.seconds(),
            steps=self._steps_per_round() * max(1, len(self.rounds)) - self.omitted,
            train_loss=clock.train_loss,
            metrics=metrics.values,
            loss=metrics.loss,
            parameters=after.parameters,
            learnable=self.trainable,
            nonzero=after.nonzero,
            sparsity=after.sparsity,
            sent_bytes_per_step=self.last.sent_bytes if self.last else 0,
            images_per_second=clock.overall(),
            data_wait=clock.data_wait(),
            macs=self._macs(),
            rounds=self.rounds,
            usage=self.meter.total(world),
            profile=profile,
        )
        if self._local_steps < self.runtime.allreduce.local_steps and self.last and world.size > 1:
            yield Notice(
                f"phase {self.name}: gradients were averaged in each step, since {phase.kind} "
                "changes the model after each step; allreduce.local_steps is for other phases"
            )
        if notice := clock.data_notice():
            yield Notice(f"phase {self.name}: {notice}")
        with world.heartbeat.busy():
            metadata = to_metadata(self.changes)
            if scale := self.runtime.mixed_precision.state():
                metadata[LOSS_SCALE] = json.dumps(scale)
            weights = to_bytes(model_state(model), metadata) if world.rank == 0 else b""
            yield PhaseEnded(index=self.index, record=record, weights=weights)

    def _change_structure(self, phase: StructuralPhase, resumed: Mapping[str, Any] | None) -> None:
        """Plan the phase's permanent change, or take it from the checkpoint, and make it."""
        if resumed is not None:
            change = dict(resumed["change"])
        else:
            change = phase.plan_change(self.model, self.runtime.world)
        phase.apply_change(self.model, change)
        self.changes.append(StructureChange(class_path(type(phase)), change))

    def _round(self, resumed: Mapping[str, Any] | None) -> Iterator[Message]:
        """Plan, enter, train, leave."""
        clock, rounds = self.clock, self.rounds
        model, phase, fit_config = self.model, self.phase, self.phase.fit
        world, number = self.runtime.world, len(rounds)
        step_before = resumed["fit"]["step"] if resumed else 0
        world.heartbeat.begin(f"in phase {self.name}", self.index, step_before)
        with world.heartbeat.busy():
            if resumed is None and isinstance(phase, RoundPhase):
                phase.plan_round(model, world, self._evaluate, self.dense)
            phase.enter(model, world)
            if resumed is not None:
                load_state(model, resumed["model"])
            self._begin_round(resumed)
        entered = counts(model)
        self.trainable = entered.learnable - frozen_values(model, fit_config)
        if resumed is not None or not rounds:
            yield PhaseStarted(
                index=self.index,
                name=self.name,
                kind=phase.kind,
                epochs=fit_config.epochs * self._max_rounds,
                steps=self._steps_per_round() * self._max_rounds,
                learnable=self.trainable,
                sparsity=entered.sparsity,
            )
        self.last = None
        try:
            yield from self._train(number, resumed)
        except _Leave:
            yield from self._stop(changes_members=True)
        except Diverged as error:
            raise Diverged(f"phase {self.name}: {error}") from error
        if self.stopped:
            return
        if self.last:
            # From here on the model changes, and a rank may be lost meanwhile.
            self.earlier, self._step = self._needed_handover(), None
            clock.end_epoch(self._ended)
            yield from self._choose_weights(self.last)
        with world.heartbeat.busy():
            phase.leave(model)

    def _train(self, number: int, resumed: Mapping[str, Any] | None) -> Iterator[Message]:
        """Take the steps of a round; evaluate, report and save between them."""
        clock, model, world = self.clock, self.model, self.runtime.world
        every = self.checkpoint.every_steps
        due = False  # a checkpoint, once all ranks have the same weights
        for step in self._steps(number, resumed):
            self.last = step
            self.meter.read(READ_EVERY_S)
            if clock.progress_due():
                shown = self._over_rounds(step, number)
                yield clock.progress(self.name, self.phase.fit.epochs * self._max_rounds, shown)
            if step.epoch_ends:
                self._ended = time.monotonic()
            if step.step == step.total:
                continue
            if step.epoch_ends:
                # A rank may be lost meanwhile: the epoch is incomplete.
                with self.average.applied() if self.average else contextlib.nullcontext():
                    metrics = self._evaluate(model)
                    if self.selection.add(step.epoch, metrics, model):
                        break
                usage = self.meter.total(world)  # likewise
                clock.end_epoch(self._ended)
                shown = self._over_rounds(step, number)
                yield clock.epoch(self.name, shown, metrics, counts(model).sparsity, usage)
            self._reach(STEP_COMPLETE)
            due = due or step.requested != CONTINUE or bool(every and step.step % every == 0)
            if due and step.synchronized:
                due = False
                with world.heartbeat.busy():
                    yield self._checkpoint(step)
                clock.checkpointed = time.monotonic()
            if step.requested in (STOP, CHANGE):
                yield from self._stop(changes_members=step.requested == CHANGE)
                return

    def _begin_round(self, resumed: Mapping[str, Any] | None) -> None:
        """Begin the average and the selection of weights, or continue those of the checkpoint."""
        decay = self.phase.fit.ema
        self.average = WeightAverage(self.model, decay) if decay else None
        self.selection = Selection(self.phase.fit)
        if resumed is not None:
            self.selection.load(resumed.get("selection", {}))  # earlier versions had none
            if self.average:
                self.average.load(resumed["average"])

    def _choose_weights(self, last: StepResult) -> Iterator[Message]:
        """Give the model the weights with which the round ends, still as they are trained."""
        omitted = last.total - last.step
        self.omitted += omitted
        if self.average:
            self.average.apply()
        if self.phase.fit.keep_best and self.selection.evaluated < last.epoch:
            self.selection.add(last.epoch, self._evaluate(self.model), self.model)
        self.selection.restore(self.model)
        metric = self.runtime.task.first_metric
        if notice := self.selection.notice(last.epoch, omitted > 0, metric):
            yield Notice(f"phase {self.name}: {notice}")

    def _steps(self, number: int, resumed: Mapping[str, Any] | None) -> Iterator[StepResult]:
        """The steps of a round, each yielded after the phase has done its work for the step.

        If a step was not finished before the group was reformed, it is the first one.
        """
        phase, fit_config = self.phase, self.phase.fit
        if resumed is not None and (unfinished := resumed["unfinished"]) is not None:
            step = StepResult(
                **unfinished["step"],
                requested=CONTINUE,
                state=lambda: dict(resumed["fit"]),
                read_loss=partial(float, unfinished["loss"]),
            )
            yield self._finish_step(step, unfinished["stage"])
        train, runtime = self._train_split(), self.runtime
        objective: Objective = Penalized(self._objective(), phase.penalty)
        if self._profile is not None:
            train = ProfiledSplit(train, self._profile)
            runtime = ProfiledRuntime.of(runtime, self._profile)
            objective = ProfiledObjective(objective, self._profile)
        with (
            recomputed(self.model, runtime.recompute),
            compiled(self.model, runtime.compile, runtime.world.heartbeat),
            contextlib.closing(self._profile) if self._profile else contextlib.nullcontext(),
        ):
            for step in fit(
                self.model,
                train,
                fit_config,
                runtime,
                self.epochs_before + number * fit_config.epochs,
                resumed and self._start(resumed),
                lambda: self._request(self.clock),
                objective,
                self._local_steps,
            ):
                yield self._finish_step(step, STEP_UPDATED)

    def _finish_step(self, step: StepResult, stage: int) -> StepResult:
        """Do the phase's work after a step."""
        self._step = step
        self._reach(stage)
        if stage == STEP_UPDATED:
            self.phase.after_step(self.model, self.runtime.world, step.step, step.total)
            self.clock.count(step)
            if self.average and step.applied:
                self.average.update()
            self._reach(STEP_COUNTED)
        return step

    def _reach(self, stage: int) -> None:
        """A stage of the current step is done. Raises _Leave if the group ends here."""
        assert self._step is not None
        self._stage = stage
        step = self._over_rounds(self._step, len(self.rounds)).step
        if self.leave_at == (self.index, step, stage):
            raise _Leave

    def _stop(self, *, changes_members: bool) -> Iterator[Message]:
        """End the run on this worker; the state for continuing stays in its memory."""
        self.stopped = True
        with self.runtime.world.heartbeat.busy():
            handover = self.handover()
        if handover is not None and (changes_members or self.runtime.world.size > 1):
            yield handover
        yield RunStopped(changes_members)

    @property
    def _local_steps(self) -> int:
        """Steps between two averages of weights; 1 if the phase needs equal ones in each step."""
        works_after_steps = type(self.phase).after_step is not Phase.after_step
        return 1 if works_after_steps else self.runtime.allreduce.local_steps

    @property
    def _max_rounds(self) -> int:
        return self.phase.max_rounds if isinstance(self.phase, RoundPhase) else 1

    def _check_finite(self, metrics: Metrics) -> None:
        """Refuse a model that the last update made NaN; the loop checks only earlier ones."""
        if math.isfinite(metrics.loss):
            return
        message = f"phase {self.name}: the validation loss is {metrics.loss} at its end"
        if self.last:
            message += f", after step {self.last.step} at a learning rate of {self.last.lr:g}"
        raise Diverged(f"{message}: lower optimizer.lr, warm up, or clip")

    def _evaluate(self, model: nn.Module, after: Phase | None = None) -> Metrics:
        """See `trainer.phases.Evaluate`."""
        if after is None:
            return evaluate(model, self.data.validation, self.runtime)
        scale = self.runtime.mixed_precision.state()
        trial = dataclasses.replace(
            self,
            phase=after,
            model=copy_model(model),
            data=dataclasses.replace(self.data, train=apart(self.data.train)),
            changes=[*self.changes],
            checkpoint=CheckpointConfig(every_steps=None, every_seconds=None),
            earlier=None,
            profile=False,
            leave_at=None,
        )
        trial.meter = self.meter
        try:
            with self.runtime.world.heartbeat.watched():
                for message in trial.messages(None):
                    if isinstance(message, RunStopped):
                        raise _Interrupted(message.changes_members)
            return self._evaluate(trial.model)
        finally:
            self.runtime.mixed_precision.load(scale)
            del trial
            gc.collect()  # the loop of a trial refers to itself, and holds a model and loaders
            self.runtime.release_memory()

    def _steps_per_round(self) -> int:
        return steps_in(len(self.data.train), self.runtime.batch_size, self.phase.fit)[1]

    def _over_rounds(self, step: StepResult, number: int) -> StepResult:
        """A step counted from the beginning of the phase, over all its rounds.

        Args:
            number: Of the round; 0 is the first.
        """
        if self._max_rounds == 1:
            return step
        return dataclasses.replace(
            step,
            step=number * step.total + step.step,
            total=self._max_rounds * step.total,
            epoch=number * self.phase.fit.epochs + step.epoch,
        )

    def _train_split(self) -> Split:
        fit_config, run = self.phase.fit, self.runtime
        if not fit_config.mixes:
            return self.data.train
        return MixedSplit(
            self.data.train, fit_config.mixup, fit_config.cutmix, run.seed, run.batch_size
        )

    def _objective(self) -> Objective:
        distill = self.phase.fit.distill
        task = Mixed(self.runtime.task) if self.phase.fit.mixes else self.runtime.task
        if not distill.weight:
            return Supervised(task)
        assert self.dense is not None  # Experiment has checked that there is one
        return Distilled(task, self.dense, distill.weight, distill.temperature)

    def _request(self, clock: PhaseClock) -> int:
        """The request of this rank after the step. Only rank 0 receives the driver's requests."""
        world, every = self.runtime.world, self.checkpoint.every_seconds
        if world.rank != 0:
            return CONTINUE
        if world.stop.is_set():
            return STOP
        if world.change.is_set():
            return CHANGE
        return SAVE if every and time.monotonic() - clock.checkpointed >= every else CONTINUE

    def _macs(self) -> int:
        order = iter([torch.zeros(1, dtype=torch.long)])
        inputs, _ = self.runtime.place_batch(*next(self.data.validation.batches(order, None)))
        return macs(self.model, inputs, self.runtime.task.call)

    def _checkpoint(self, step: StepResult) -> Checkpoint:
        """The state after a complete step; on ranks other than 0 without its content.

        A collective call if ranks have a state of their own.
        """
        world, content = self.runtime.world, b""
        ranks = []
        differ = self.runtime.allreduce.feeds_back or self._local_steps > 1
        if differ and world.size > 1 and not self.elastic:
            ranks = world.gather(pack(step.rank_state()))
        if world.rank == 0:
            content = self._content(step, STEP_COMPLETE, [unpack(state) for state in ranks])
        return self._as_checkpoint(step, content)

    def _start(self, resumed: Mapping[str, Any]) -> dict[str, Any]:
        """The state from which `fit` continues on this rank.

        With another number of ranks than before, no rank has a state of its own.
        """
        world, ranks = self.runtime.world, resumed.get("ranks", [])
        return {**resumed["fit"], **(ranks[world.rank] if len(ranks) == world.size else {})}

    def _as_checkpoint(self, step: StepResult, content: bytes) -> Checkpoint:
        shown = self._over_rounds(step, len(self.rounds)).step
        return Checkpoint(phase=self.index, step=shown, content=content)

    def _needed_handover(self) -> Handover | None:
        """As `handover`; None in a group of one, as there is nobody to hand over to."""
        if self.runtime.world.size == 1:
            return None
        with self.runtime.world.heartbeat.busy():
            return self.handover()

    def _content(
        self, step: StepResult, stage: int, ranks: Sequence[Mapping[str, Any]] = ()
    ) -> bytes:
        """The state of this rank after a step, of which `stage` is done.

        Args:
            ranks: What the ranks do not have in common, in their order; () if it is unknown.
        """
        phase = self.phase
        unfinished = None
        if stage != STEP_COMPLETE:
            plain = {name: getattr(step, name) for name in _PLAIN_FIELDS}
            unfinished = {"step": plain, "loss": step.loss, "stage": stage}
        state = {
            "model": model_state(self.model),
            "clock": self.clock.state(),
            "energy": self.meter.state(),
            "workers": self.runtime.world.size,
            "samples": len(self.data.train),
            "fit": step.state(),
            "unfinished": unfinished,
            "phase": phase.state(),
            "rounds": [as_json(record) for record in self.rounds],
            "omitted": self.omitted,
            "selection": self.selection.state(),
            "average": self.average.state() if self.average else {},
        }
        if ranks:
            state["ranks"] = list(ranks)
        if self._stream is not None:
            state["stream"] = self._stream.state()
        if isinstance(phase, StructuralPhase):
            state["change"] = self.changes[-1].change
        return pack(state)
