"""The phases of an experiment in order: the function that every worker executes (SPMD).

Every rank executes the same lines on the same weights. Between two phases the model consists of
plain weights. Reports are yielded as messages. Only rank 0's messages reach the driver, so this
code needs no branches for it.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.compress.counts import counts
from trainer.compress.rewrite import restore
from trainer.compress.state import model_state
from trainer.data.datasets import preserved_generators
from trainer.data.split import Splits
from trainer.engine.loop import steps_in
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError, described, first_line
from trainer.experiment import Experiment, check_phases
from trainer.messages import (
    STEP_COMPLETE,
    Checkpoint,
    Handover,
    Message,
    Notice,
    RunStarted,
    RunStopped,
)
from trainer.models.copying import copy_model
from trainer.phases import Phase, RoundPhase
from trainer.phases.structure import StructureChange, from_metadata
from trainer.store.checkpoints import ResumePoint
from trainer.store.serialization import check_state, from_bytes, to_bytes, unpack
from trainer.worker.phase import (
    CHANGE,
    CONTINUE,
    LOSS_SCALE,
    STOP,
    PhaseRun,
    Position,
)
from trainer.worker.preflight import check_compatible


@dataclass(frozen=True)
class Start:
    """The point at which a run starts or resumes."""

    phase: int  # index of the first phase to run
    weights: bytes | None = None  # after the phase before it; None: draw the initial weights
    checkpoint: bytes | None = None  # `Checkpoint.content` of that phase; None: from its beginning
    dense: bytes | None = None  # of the dense model; None: `weights`, or not trained yet
    step: int = 0  # of the checkpoint


def start_at(experiment: Experiment, point: ResumePoint, saved: Callable[[int], bytes]) -> Start:
    """The point at which a run of `experiment` resumes.

    Args:
        point: The last checkpoint.
        saved: Returns the weights that a phase left, by its index; -1 for the initial ones.

    Raises:
        RunError: Weights that are needed are missing or damaged.
    """
    if experiment.has_initial_weights and point.weights is None:
        raise RunError("the initial weights in checkpoints/ are damaged: resume the run")
    if point.phase == 0:  # no phase has ended yet
        return Start(0, point.weights, point.checkpoint, step=point.step)
    dense = experiment.dense_phase_needed(point.phase)
    content = None if dense is None else saved(dense)
    return Start(point.phase, point.weights, point.checkpoint, content, point.step)


def run_phases(
    world: World,
    experiment: Experiment,
    start: Start,
    continues: bool = False,
    leave_at: Position | None = None,
) -> Iterator[Message]:
    """Run the phases of an experiment on this worker. The test set is not used.

    If another rank is lost or the members of the group change, the last message but RunStopped is
    a `Handover`, unless there is no state yet.

    Args:
        world: The group of workers.
        experiment: The experiment to run.
        start: Where to start.
        continues: Whether rank 0 has a later state of the phase in which to start, in
            `World.kept`, from which all ranks continue.
        leave_at: Where to stop, as if the members of the group changed there; None: nowhere.
    """
    handover: Handover | None = None
    if start.checkpoint is not None and not continues:
        checkpoint = Checkpoint(start.phase, start.step, start.checkpoint)
        handover = Handover(checkpoint, STEP_COMPLETE)
    run: PhaseRun | None = None
    try:
        world.heartbeat.begin("at the start", 0)  # a warm worker may have run something else before
        with world.heartbeat.busy():
            if continues:
                handover = _receive_state(world)
            is_new = start.phase == 0 and handover is None
            built = _build(world, experiment, start, is_new)
        yield built.started(world)
        if is_new:
            yield from built.notices()
        phases, model, runtime, dense = built.phases, built.model, built.runtime, built.dense
        epochs_before = 0
        last_dense = experiment.stages[0].phase
        for index, (name, phase) in enumerate(phases.items()):
            if index >= start.phase:
                current = handover if index == start.phase else None
                begins = (index, 0) if current is None else None
                request = request_of_all(world)
                if request != CONTINUE or (leave_at and leave_at[:2] == begins):
                    if current is not None:
                        yield current
                    yield RunStopped(changes_members=request != STOP)
                    return
                rest = list(phases.values())[index:]
                if index == last_dense + 1 and any(p.needs_dense_model for p in rest):
                    dense = copy_model(model)
                run = PhaseRun(
                    index=index,
                    name=name,
                    phase=phase,
                    model=model,
                    dense=dense,
                    data=built.data,
                    runtime=runtime,
                    epochs_before=epochs_before,
                    checkpoint=experiment.config.checkpoint,
                    changes=built.changes,
                    earlier=handover,
                    profile=experiment.config.profile,
                    elastic=experiment.config.cluster.is_elastic,
                    leave_at=leave_at,
                )
                runtime.release_memory()
                content = None if current is None else unpack(bytes(current.checkpoint.content))
                yield from run.messages(content)
                if run.stopped:
                    return
                handover = run.handover()
            epochs_before += total_epochs(phase)
    except (ConnectionError, TimeoutError):
        if world.size > 1:
            with world.heartbeat.busy():
                latest = handover if run is None else run.handover()
                if latest is not None:
                    yield latest
        raise


@dataclass
class _Built:
    """What a worker builds of an experiment before the first phase."""

    phases: dict[str, Phase]
    runtime: Runtime
    model: nn.Module  # with the weights with which the run starts
    dense: nn.Module | None  # the dense model, if it is known and a phase needs it
    data: Splits
    target_shape: tuple[int, ...]  # of one sample
    changes: list[StructureChange]  # of the phases before the first one

    def started(self, world: World) -> RunStarted:
        """The report that the run has started."""
        data, task = self.data, self.runtime.task
        return RunStarted(
            workers=world.size,
            device=_device_name(world.device),
            parameters=counts(self.model).parameters,
            train=len(data.train),
            validation=len(data.validation),
            test=len(data.test),
            phase_steps=tuple(
                planned_steps(phase, len(data.train), self.runtime.batch_size)
                for phase in self.phases.values()
            ),
            sequence_targets=task.kind == "classification" and len(self.target_shape) == 1,
            task=task.kind,
            directions=task.directions,
        )

    def notices(self) -> Iterator[Notice]:
        """What the user should know before a new run."""
        batch_size, samples = self.runtime.batch_size, len(self.data.train)
        if batch_size > samples:
            yield Notice(
                f"data.batch_size={batch_size} is larger than the training set of {samples} "
                "samples, which is one batch"
            )
        for name, phase in self.phases.items():
            yield from (Notice(f"phases.{name}: {line}") for line in phase.notices(self.model))


def _build(world: World, experiment: Experiment, start: Start, is_new: bool) -> _Built:
    """Build and check model, data and phases, and load the weights. A collective call.

    Args:
        world: The group of workers.
        experiment: The experiment to run.
        start: Where it starts.
        is_new: Whether nothing of the run has been done yet; the checks that take longest are for
            new runs.
    """
    torch.manual_seed(experiment.config.seed)
    data = experiment.build_data()
    phases = copy.deepcopy(experiment.phases)  # phases have state, experiments have none
    runtime = experiment.build_runtime(world)
    model = runtime.place(experiment.build_model())
    check_state(model)
    if is_new and world.rank == 0:
        _check_restorable(experiment, model)
    check_phases(experiment, model)
    fits = [phase.fit for phase in list(phases.values())[start.phase :]]
    data, target_shape = check_compatible(model, data, runtime, fits)
    if is_new:
        _check_inputs(model, data, runtime, phases)
    dense = None
    if start.dense is not None:
        _restore(dense := copy_model(model), experiment, start.dense)
    changes: list[StructureChange] = []
    if start.weights is not None:
        metadata = _restore(model, experiment, start.weights)
        changes = from_metadata(metadata)
        if LOSS_SCALE in metadata:
            runtime.mixed_precision.load(json.loads(metadata[LOSS_SCALE]))
    world.broadcast(_tensors(model))
    return _Built(phases, runtime, model, dense, data, target_shape, changes)


def _check_inputs(
    model: nn.Module, data: Splits, runtime: Runtime, phases: Mapping[str, Phase]
) -> None:
    """Let the phases that look at inputs refuse settings, before anything is trained."""
    for name, phase in phases.items():
        if phase.samples:
            order = torch.arange(2) % len(data.train)
            ((inputs, targets),) = data.train.batches([order], None)
            inputs, _ = runtime.place_batch(inputs, targets)
            try:
                phase.check_inputs(model, inputs)
            except ConfigError as error:
                raise ConfigError(f"phases.{name}: {error}") from error


def total_epochs(phase: Phase) -> int:
    """The number of epochs that a phase takes at most."""
    return phase.fit.epochs * (phase.max_rounds if isinstance(phase, RoundPhase) else 1)


def planned_steps(phase: Phase, samples: int, batch_size: int) -> int:
    """The number of steps that a phase takes at most."""
    _, steps = steps_in(samples, batch_size, phase.fit)
    return steps * (phase.max_rounds if isinstance(phase, RoundPhase) else 1)


def request_of_all(world: World) -> int:
    """The request that rank 0 has received: CONTINUE, STOP or CHANGE. A collective call.

    Returns:
        The same answer on all ranks.
    """
    request = CONTINUE
    if world.rank == 0:
        request = STOP if world.stop.is_set() else CHANGE if world.change.is_set() else CONTINUE
    shared = torch.tensor(request, device=world.device)
    world.all_reduce(shared)
    return int(shared)


def _receive_state(world: World) -> Handover:
    """Give all ranks the state that rank 0 keeps. A collective call.

    Ranks of the previous group have equal parameters, but their own buffers, such as running
    statistics of batch norm; a new rank has neither.
    """
    kept = world.kept
    if world.size == 1:
        assert kept is not None
        return kept
    head = torch.zeros(4, dtype=torch.int64)
    content = torch.empty(0, dtype=torch.uint8)
    if kept is not None:
        content = torch.frombuffer(bytearray(kept.checkpoint.content), dtype=torch.uint8)
        head = torch.tensor([*kept.position, len(content)])
    world.broadcast([head])
    phase, step, stage, length = head.tolist()
    if kept is None:
        content = torch.empty(length, dtype=torch.uint8)
    world.broadcast([content])
    return Handover(Checkpoint(phase, step, content.numpy().tobytes()), stage)


def _restore(model: nn.Module, experiment: Experiment, content: bytes) -> dict[str, str]:
    """Load structure and weights of a safetensors file into a fresh model; return its metadata.

    Raises ConfigError if they do not fit.
    """
    weights, metadata = from_bytes(content)
    experiment.apply_changes(model, from_metadata(metadata))
    try:
        restore(model, weights)
    except RuntimeError as error:
        raise ConfigError(
            f"model: {type(model).__name__} does not fit the weights with which the run continues: "
            f"{first_line(error)}; resume with the model with which the run was started"
        ) from error
    return metadata


def _check_restorable(experiment: Experiment, model: nn.Module) -> None:
    """Refuse a model whose weights cannot be loaded into a fresh one, as happens after training.

    Raises:
        ConfigError: Loading them fails, or leaves other values than were stored; or the model
            cannot be copied, which many phases do.
    """
    try:
        copy_model(model)
    except Exception as error:  # of the user's own code
        raise ConfigError(
            f"model: {type(model).__name__} cannot be copied (copy.deepcopy): {described(error)}; "
            "remove what cannot be copied from its attributes, or define __deepcopy__"
        ) from error
    stored = to_bytes(model_state(model))
    try:
        with preserved_generators():
            fresh = experiment.load_model(from_bytes(stored)[0])
    except Exception as error:  # of the user's own code
        raise ConfigError(
            f"model: a fresh {type(model).__name__} cannot load the weights of another one: "
            f"{described(error)}"
        ) from error
    if to_bytes(model_state(fresh)) != stored:
        raise ConfigError(
            f"model: a fresh {type(model).__name__} that loads the weights of another one has "
            "other weights afterwards; correct its load_state_dict"
        )


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything that must be the same on every rank."""
    yield from model.parameters()
    yield from model.buffers()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
