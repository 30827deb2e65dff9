"""What the phases of an experiment leave, stage by stage: dense, pruned, shared, quantized."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import ConfigError
from trainer.phases.base import Phase


@dataclass(frozen=True)
class Stage:
    """A stretch of phases after which the weights have the same properties."""

    made: frozenset[str]  # such as {"zeros", "sharing"}; empty: dense
    phase: int  # index of its last phase; -1: there is none, the initial weights are meant


def stages(phases: Mapping[str, Phase]) -> list[Stage]:
    """The stages in order; the first one is the dense baseline."""
    found = [Stage(frozenset(), -1)]
    for index, phase in enumerate(phases.values()):
        stage = Stage(found[-1].made | phase.makes, index)
        if stage.made == found[-1].made:
            found[-1] = stage
        else:
            found.append(stage)
    return found


def teacher_phase(phases: Mapping[str, Phase], going_on: int) -> int | None:
    """Index of the phase that left the dense model which those from `going_on` on want; -1: the
    initial weights.

    None where no phase wants it, or where it is what the run goes on from anyway.
    """
    baseline = stages(phases)[0].phase
    if baseline >= going_on - 1:
        return None
    left = list(phases.values())[going_on:]
    return baseline if any(phase.wants_dense for phase in left) else None


def check_teachers(phases: Mapping[str, Phase], initialised: bool) -> None:
    """Refuse distillation where there is no dense model to learn from yet.

    Args:
        initialised: the initial weights are trained ones.

    Raises:
        ConfigError: names the phase.
    """
    baseline = stages(phases)[0].phase
    for index, (name, phase) in enumerate(phases.items()):
        if phase.fit.distill.weight and (index <= baseline or (baseline < 0 and not initialised)):
            raise ConfigError(
                f"phases.{name}.fit.distill.weight={phase.fit.distill.weight}: there is no dense "
                "model to learn from before this phase; the teacher is what the last phase before "
                "the first compressing one left, or init_from"
            )
