"""Builds the phases of an experiment from settings, and validates them and their order."""

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from trainer.config import LimitsConfig, to_dataclass
from trainer.config.drop import exceeds, part_of
from trainer.config.instantiate import OBJECT, Factory, locate
from trainer.engine.schedules import check_schedule
from trainer.errors import ConfigError
from trainer.phases import Phase, StructuralPhase
from trainer.phases.auto_prune import expand
from trainer.phases.base import STRUCTURE
from trainer.tasks import Task


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of phases after which the weights have the same properties."""

    properties: frozenset[str]  # such as {"zeros", "sharing"}; empty: dense
    phase: int  # index of its last phase; -1: no phase, the initial weights


def stages_of(phases: Mapping[str, Phase]) -> list[Stage]:
    """The stages that the phases lead through; the first one is the dense model."""
    found = [Stage(frozenset(), -1)]
    for index, phase in enumerate(phases.values()):
        stage = Stage(found[-1].properties | phase.makes, index)
        if stage.properties == found[-1].properties:
            found[-1] = stage
        else:
            found.append(stage)
    return found


def build_phases(
    settings: Mapping[str, Mapping[str, Any]], limit: Any, objects: Mapping[str, Any]
) -> dict[str, Phase]:
    """The phases by name, with their shares of the limit.

    The n-th of N phases that search without a `max_drop` of their own may end at n/N of the limit
    below the dense model, so that each can spend 1/N, and what earlier ones have not spent.
    """
    if not settings:
        raise ConfigError("phases: there are none; an experiment needs at least one, such as train")
    for name, chosen in settings.items():
        if "_target_" not in chosen and OBJECT not in chosen:
            close = difflib.get_close_matches(
                name, [other for other in settings if other != name], 1
            )
            hint = f"did you mean phases.{close[0]}? " if close else ""
            raise ConfigError(
                f"phases.{name} has no _target_, so it is unknown what it does; "
                f"{hint}+phase@phases.{name}=KIND adds a phase of a kind, such as prune"
            )
    found = {name: _build_phase(name, chosen, objects) for name, chosen in settings.items()}
    sharing = [
        name
        for name, phase in found.items()
        if phase.searches and cast(Any, phase).max_drop is None
    ]
    if sharing and limit is None:
        raise ConfigError(
            f"phases.{sharing[0]}.max_drop=null: set how much worse the first metric may become, "
            "such as limits.max_accuracy_drop=0.002 or limits.max_drop=5%, of which each phase "
            "with auto gets a share"
        )
    for number, name in enumerate(sharing, start=1):
        drop = part_of(limit, number / len(sharing))
        found[name] = dataclasses.replace(found[name], max_drop=drop)  # type: ignore[call-arg]
    return found


def _build_phase(name: str, settings: Mapping[str, Any], objects: Mapping[str, Any]) -> Phase:
    key = f"phases.{name}"
    if OBJECT in settings:
        return Factory(key, settings, Phase, objects).build()
    fit = settings.get("fit", {})
    if not isinstance(fit, Mapping):
        raise ConfigError(f"{key}.fit={fit}: it must be a mapping, such as {{epochs: 0}}")
    kind = locate(key, settings, objects)
    if not (isinstance(kind, type) and issubclass(kind, Phase) and dataclasses.is_dataclass(kind)):
        raise ConfigError(
            f"{key}._target_={settings['_target_']}: a phase is a dataclass that derives from Phase"
        )
    own = {field: value for field, value in settings.items() if field != "_target_"}
    phase: Phase = to_dataclass(kind, own, key)
    try:
        return expand(phase)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from error


def check_order(phases: Mapping[str, Phase]) -> None:
    """Refuse an order in which a phase destroys what an earlier one made.

    Raises:
        ConfigError: Names both phases and what to do.
    """
    made: dict[str, str] = {}
    for name, phase in phases.items():
        for what, maker in made.items():
            if what == STRUCTURE:
                continue
            if what in phase.destroys or (phase.fit.epochs > 0 and what not in phase.keeps):
                untrained = ", even without training" if what in phase.destroys else ""
                raise ConfigError(
                    f"phase {name!r} ({phase.kind}) would destroy the {what} made by {maker!r}"
                    f"{untrained}: {_remedy(phase, what)}move it before {maker!r}"
                )
        made.update(dict.fromkeys(phase.makes, name))


def _remedy(phase: Phase, what: str) -> str:
    """How to keep a property that the phase would destroy, followed by "or"; "": not at all."""
    if hasattr(phase, "keep"):
        keeping = copy.copy(phase)
        keeping.keep = ["zeros", "sharing"]
        if what in keeping.keeps - keeping.destroys:
            return "set its keep=[zeros,sharing], or "
    elif what not in phase.destroys and what != "quantization":
        sharing = " with keep=[zeros,sharing]" if what == "sharing" else ""
        return f"use retrain{sharing} instead, or "
    return ""


def check_limits(limits: LimitsConfig, task: Task, has_dense_model: bool) -> None:
    """Raise ConfigError for a limit that cannot be applied."""
    if limits.drop is None:
        return
    key = "max_accuracy_drop" if limits.max_drop is None else "max_drop"
    if not has_dense_model:
        raise ConfigError(
            f"limits.{key}={limits.drop}: there is no dense model to compare with; put a train "
            "phase first, or set init_from"
        )
    first = task.first_metric
    if limits.max_drop is None and first != "accuracy":
        raise ConfigError(
            f"limits.max_accuracy_drop={limits.drop}: the first metric of the task is {first}; "
            "set limits.max_drop, which limits any metric"
        )


def check_schedules(phases: Mapping[str, Phase], lr: float) -> None:
    """Refuse a schedule of the learning rate that cannot be computed.

    Args:
        phases: By name.
        lr: Peak learning rate of phases that set none.
    """
    for name, phase in phases.items():
        try:
            check_schedule(phase.fit, phase.fit.lr or lr)
        except ConfigError as error:
            raise ConfigError(f"phases.{name}.{error}") from error


def check_mixing(phases: Mapping[str, Phase], task: Task) -> None:
    """Refuse mixup and cutmix for a task whose targets cannot be mixed."""
    for name, phase in phases.items():
        if phase.fit.mixes and task.kind not in ("classification", "multilabel"):
            key = "cutmix" if phase.fit.cutmix else "mixup"
            raise ConfigError(
                f"phases.{name}.fit.{key}={getattr(phase.fit, key):g}: it mixes the classes of "
                f"two samples, which {type(task).__name__} does not have; set it to 0"
            )


def check_averages(phases: Mapping[str, Phase], local_steps: int) -> None:
    """Refuse averages over steps of weights that differ between the workers."""
    for name, phase in phases.items():
        if phase.fit.ema and local_steps > 1:
            raise ConfigError(
                f"phases.{name}.fit.ema={phase.fit.ema} with allreduce.local_steps={local_steps}: "
                "the workers have different weights in most steps; set fit.ema=null, or "
                "allreduce.local_steps=1"
            )


def check_distillation(phases: Mapping[str, Phase], task: Task, has_initial_weights: bool) -> None:
    """Refuse distillation in a phase before which there is no dense model to learn from."""
    dense = stages_of(phases)[0].phase
    for index, (name, phase) in enumerate(phases.items()):
        weight = phase.fit.distill.weight
        if weight and not task.can_distill:
            raise ConfigError(
                f"phases.{name}.fit.distill.weight={weight}: {type(task).__name__} does "
                "not define how far two predictions are apart (`Task.divergence`); choose "
                "another task, or set distill.weight=0"
            )
        if weight and (index <= dense or (dense < 0 and not has_initial_weights)):
            raise ConfigError(
                f"phases.{name}.fit.distill.weight={weight}: there is no dense model to learn "
                "from before this phase; the teacher is what the last phase before the first "
                "compressing one left, or init_from"
            )


def check_max_drops(phases: Mapping[str, Phase], limits: LimitsConfig) -> None:
    """Refuse a search that may lose more than the result is allowed to."""
    limit = limits.drop
    for name, phase in phases.items():
        # What is trained afterwards may lose more at first.
        final = phase.searches and not isinstance(phase, StructuralPhase)
        drop = cast(Any, phase).max_drop if final else None
        if limit is not None and drop is not None and exceeds(drop, limit):
            key = "max_accuracy_drop" if limits.max_drop is None else "max_drop"
            raise ConfigError(
                f"phases.{name}.max_drop={drop}: the search may lose more than "
                f"limits.{key}={limit} allows; lower it, a little below the limit"
            )
