"""The contract of a phase (trainer.phases.Phase): what it may do to a model, and what it leaves."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from trainer import artifact
from trainer.compress.codebooks import codebook_of
from trainer.compress.quantize import WeightQuantizer, is_quantizer_entry
from trainer.compress.rewrite import skeleton
from trainer.compress.select import weights
from trainer.compress.state import model_state
from trainer.config import CheckpointConfig
from trainer.engine.world import World
from trainer.errors import ConfigError, first_line
from trainer.experiment import Experiment
from trainer.messages import Checkpoint, PhaseStarted
from trainer.phases import Phase, Prune, Share, StructuralPhase
from trainer.phases.structure import StructureChange, from_metadata, to_metadata
from trainer.store.serialization import unpack
from trainer.testing.ranks import run_ranks
from trainer.worker.phase import PhaseRun

_CPU = torch.device("cpu")
_SAMPLES, _BATCH = 24, 8

Data = tuple[Tensor, Tensor]


class ExampleNet(nn.Module):
    """The model on which phases are checked by default: convolution, batch norm, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(54, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 4] of images [n, 2, 6, 6]."""
        hidden = nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        output: Tensor = self.fc2(self.fc1(hidden).relu())
        return output


def check_phase(
    phase: Phase,
    model: Callable[[], nn.Module] = ExampleNet,
    data: Data | None = None,
    refused: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Check that a phase keeps its contract on a small model.

    The phase is executed as in a run, by one worker and by two. The weights must be the same on
    both workers after every step and at the end; a run that is resumed in the middle must end with
    the same bits; what the phase leaves must be plain weights that a checkpoint and a model file
    hold, and a fresh model that loads them must compute the same. `makes`, `keeps` and `destroys`
    must describe what it does to zeros and to shared weights. Weights that it keeps are pruned and
    shared before it begins.

    Args:
        phase: The phase with its settings. It is copied. With `fit.epochs: 0` no training is
            checked; several epochs take longer, but show more.
        model: Builds a model with random weights, to which the settings apply.
        data: Inputs [n, ...] and targets [n] for that model, at least 24 samples; None: those of
            `ExampleNet`.
        refused: Settings each of which the phase must refuse, such as `[{"strength": -1}]`.

    Raises:
        AssertionError: The phase does not keep the contract; the text says in what.
    """
    _check_class(phase, refused)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        case = _Case(phase, model, data or _example_data())
        _check_on_meta(case)
        single = _run(case, 1)[0]
        _check_left(case, single)
        _check_loaded(case, single)
        _check_properties(case, single)
        _check_ranks(case)
        _check_resumed(case, single)


def check_structural_phase(
    phase: StructuralPhase,
    model: Callable[[], nn.Module] = ExampleNet,
    data: Data | None = None,
    refused: Sequence[Mapping[str, Any]] = (),
) -> None:
    """As `check_phase`, for a phase that changes the structure of a model permanently.

    What it decides must be plain values that JSON keeps. Deciding must not change the model, and
    the change must give a freshly built model the same structure.

    Args:
        phase: As for `check_phase`; it must change the structure of the model.
        model: As for `check_phase`.
        data: As for `check_phase`.
        refused: As for `check_phase`.

    Raises:
        AssertionError: The phase does not keep the contract; the text says in what.
    """
    kind = type(phase).__name__
    if not isinstance(phase, StructuralPhase):
        raise AssertionError(f"{kind} does not derive from StructuralPhase")
    check_phase(phase, model, data, refused)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        case = _Case(phase, model, data or _example_data())
        decided = _run(case, 1)[0]
        if _shapes(case.fresh(decided.changes)) == _shapes(case.start):
            raise AssertionError(f"{kind}: apply_change leaves the structure as it is")
        model_before = copy.deepcopy(case.start)
        planning = copy.deepcopy(phase)
        if planning.samples:
            planning.observe(model_before, World.single(_CPU), [case.data[0][:_BATCH]])
        planning.plan_change(model_before, World.single(_CPU))
        if _difference(model_state(model_before), model_state(case.start)) is not None:
            raise AssertionError(f"{kind}: plan_change changes the model; apply_change must do it")


@dataclass
class _Trace:
    """The states and messages of one rank."""

    model: nn.Module
    changes: list[StructureChange]
    steps: list[dict[str, Tensor]]  # state after each step but the last of a round
    checkpoints: list[bytes]
    trainable: int  # values that the optimizer saw


class _Case:
    """A phase, the model before it, and the data."""

    def __init__(self, phase: Phase, build: Callable[[], nn.Module], data: Data) -> None:
        self.phase = phase
        self.kind = type(phase).__name__
        self.data = data
        self.experiment = Experiment(
            model=build, data=(data, data, data), phases={"phase": phase}, batch_size=_BATCH, lr=0.1
        )
        self.start = self.experiment.build_model()
        world = World.single(_CPU)
        with torch.no_grad():
            for name, buffer in self.start.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(std=0.1)
        for what, earlier in (("zeros", Prune(0.5)), ("sharing", Share(3))):
            if what in phase.keeps:
                earlier.enter(self.start, world)
                earlier.leave(self.start)

    def fresh(self, changes: Sequence[StructureChange]) -> nn.Module:
        """A model with other weights and the structure that the phase gave it."""
        torch.manual_seed(1)
        model = self.experiment.build_model()
        self.experiment.apply_changes(model, changes)
        return model

    def error(self, what: str) -> AssertionError:
        return AssertionError(f"{self.kind}: {what}")


def _check_class(phase: Phase, refused: Sequence[Mapping[str, Any]]) -> None:
    kind = type(phase).__name__
    if not is_dataclass(phase) or "__dataclass_fields__" not in vars(type(phase)):
        raise AssertionError(
            f"{kind} needs the decorator @dataclass, or its settings are not found"
        )
    if not isinstance(getattr(phase, "kind", None), str):
        raise AssertionError(f'{kind} has no name for summary.json: set kind = "..."')
    try:
        cloudpickle.loads(cloudpickle.dumps(phase))
    except Exception as error:
        raise AssertionError(
            f"{kind} cannot be pickled, so no worker gets it: {_text(error)}"
        ) from error
    for settings in refused:
        try:
            replace(phase, **settings)
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(
                f"{kind}: {dict(settings)} raised {_text(error)}; raise ConfigError in "
                "check_settings"
            ) from error
        raise AssertionError(f"{kind}: {dict(settings)} is not refused")


def _check_on_meta(case: _Case) -> None:
    """check_model and notices work without values, and leave the model as it is."""
    model = skeleton(case.start)
    before = _shapes(model)
    try:
        case.phase.check_model(model)
        case.phase.notices(model)
    except Exception as error:
        raise case.error(
            f"check_model or notices fails on a model on the meta device: {_text(error)}"
        ) from error
    if _shapes(model) != before:
        raise case.error("check_model or notices changed the model")


def _check_left(case: _Case, run: _Trace) -> None:
    """`leave` turned everything into plain weights."""
    for name, module in run.model.named_modules():
        if is_parametrized(module) and not is_parametrized(_module(case.start, name)):
            raise case.error(f"leave left a parametrization on {name or 'the model'}")
    before, after = case.start.state_dict(), run.model.state_dict()
    added = [n for n in after if n not in before and not is_quantizer_entry(n)]
    lost = [name for name in before if name not in after]
    if added and not lost and not isinstance(case.phase, StructuralPhase):
        raise case.error(f"leave left {', '.join(added)} in the state_dict")
    for name, tensor in model_state(run.model).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise case.error(f"{name} is Inf or NaN after it")


def _check_loaded(case: _Case, run: _Trace) -> None:
    """A fresh model that gets the stored weights computes the same, bit for bit."""
    state = {name: tensor.clone() for name, tensor in model_state(run.model).items()}
    expected = _outputs(run.model, case)
    if not torch.equal(_outputs(copy.deepcopy(run.model), case), expected):
        raise case.error("a copy of the model that it leaves computes something else")
    changes = from_metadata(json.loads(json.dumps(to_metadata(run.changes))))
    torch.manual_seed(1)
    for source, tensors in (
        ("the weights", state),
        ("the model file", artifact.loads(artifact.encode(state, "fp32", "ans"))),
    ):
        try:
            loaded = case.experiment.load_model(tensors, changes)
        except Exception as error:
            raise case.error(
                f"{source} cannot be loaded into a fresh model: {_text(error)}"
            ) from error
        if not torch.equal(_outputs(loaded, case), expected):
            raise case.error(f"a fresh model that loads {source} computes something else")


def _check_properties(case: _Case, run: _Trace) -> None:
    """`makes`, `keeps` and `destroys` say what happened to the weights."""
    phase = case.phase
    before, after = weights(case.start), weights(run.model)
    kept = phase.keeps - phase.destroys
    for name, places in before.items():
        old, found = places[0].value.detach(), after.get(name)
        if found is None or found[0].value.shape != old.shape:
            continue
        new = found[0].value.detach()
        if "zeros" in kept and bool((new[old == 0] != 0).any()):
            raise case.error(f"keeps says zeros, but zeros of {name} are lost")
        if "sharing" in kept and len(new.unique()) > len(old.unique()):
            raise case.error(f"keeps says sharing, but {name} has more distinct values than before")
    values = [places[0].value.detach() for places in after.values()]
    made = {
        "zeros": lambda: any(bool((value == 0).any()) for value in values),
        "sharing": lambda: any(codebook_of(value, any_repeat=True) for value in values),
        "quantization": lambda: any(isinstance(m, WeightQuantizer) for m in run.model.modules()),
    }
    for what in sorted(phase.makes & made.keys()):
        if not made[what]():
            raise case.error(f"makes says {what}, but there is none in the weights it leaves")


def _check_ranks(case: _Case) -> None:
    """Two workers have the same parameters after each step, and the same state at the end."""
    one, two = _run(case, 2)
    if one.trainable != two.trainable:
        raise case.error(
            f"two workers train {one.trainable} and {two.trainable} values: enter must do the same "
            "on all of them"
        )
    if one.changes != two.changes:
        raise case.error("plan_change returns different changes on two workers")
    for number, (left, right) in enumerate(zip(one.steps, two.steps, strict=True), start=1):
        name = _difference(left, right)
        # Without synchronized batch norm, running statistics are those of each worker's samples.
        if name is not None and name in dict(one.model.named_parameters()):
            raise case.error(f"two workers have different weights {name} after step {number}")
    ends = [dict(trace.model.named_parameters()) for trace in (one, two)]
    if (name := _difference(*ends)) is not None:
        raise case.error(f"two workers have different weights {name} after leave")


def _check_resumed(case: _Case, whole: _Trace) -> None:
    """Resumed in the middle, the phase ends with the same bits."""
    if not whole.checkpoints:
        return
    middle = len(whole.checkpoints) // 2
    torch.manual_seed(2)  # a resumed process has other random numbers
    resumed = _run(case, 1, whole.checkpoints[middle])[0]
    if resumed.changes != whole.changes:
        raise case.error("a resumed run makes another change of the structure")
    name = _difference(model_state(whole.model), model_state(resumed.model))
    if name is not None:
        raise case.error(f"a run that is resumed within it ends with a different {name}")


def _run(case: _Case, size: int, checkpoint: bytes | None = None) -> list[_Trace]:
    """Execute the phase on `size` ranks; what each of them saw."""

    def body(world: World) -> _Trace:
        model = copy.deepcopy(case.start)
        phase = copy.deepcopy(case.phase)
        trace = _Trace(model, [], [], [], 0)
        run = PhaseRun(
            index=0,
            name="phase",
            phase=phase,
            model=model,
            dense=copy.deepcopy(model) if phase.needs_dense_model else None,
            data=case.experiment.build_data(),
            runtime=case.experiment.build_runtime(world),
            epochs_before=0,
            checkpoint=CheckpointConfig(every_steps=1, every_seconds=None),
            changes=trace.changes,
        )
        for message in run.messages(None if checkpoint is None else unpack(checkpoint)):
            if isinstance(message, PhaseStarted):
                trace.trainable = message.learnable
            elif isinstance(message, Checkpoint):
                state = model_state(model)
                trace.steps.append({name: tensor.clone() for name, tensor in state.items()})
                trace.checkpoints.append(bytes(message.content))
        return trace

    try:
        return [body(World.single(_CPU))] if size == 1 else run_ranks(size, body)
    except Exception as error:
        when = "resumed, it" if checkpoint is not None else "it"
        raise case.error(
            f"with {size} {'worker' if size == 1 else 'workers'} {when} raised {_text(error)}"
        ) from error


def _example_data() -> Data:
    return torch.randn(_SAMPLES, 2, 6, 6), torch.arange(_SAMPLES) % 4


def _outputs(model: nn.Module, case: _Case) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(case.data[0][:_BATCH])
    return output


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str | None:
    """The first name at which two states differ; None: they are equal bit for bit."""
    for name in [*left, *right]:
        if name not in left or name not in right:
            return name
        if left[name].shape != right[name].shape or not torch.equal(left[name], right[name]):
            return name
    return None


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return nn.Module()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
