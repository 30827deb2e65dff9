"""Which phase ends which stage, and who may learn from the dense model."""

import pytest

from trainer.config import DistillConfig, FitConfig
from trainer.errors import ConfigError
from trainer.phases import Phase, Prune, Retrain, Share, Train
from trainer.phases.stages import Stage, check_teachers, stages

FIT = FitConfig(epochs=1)
TAUGHT = FitConfig(epochs=1, distill=DistillConfig(weight=0.5))
ZEROS = frozenset({"zeros"})
BOTH = frozenset({"zeros", "sharing"})


def named(*phases: Phase) -> dict[str, Phase]:
    return {f"{index}-{phase.kind}": phase for index, phase in enumerate(phases)}


def test_a_stage_ends_with_the_last_phase_that_adds_nothing() -> None:
    whole = named(Train(FIT), Train(FIT), Prune(FIT, 0.5), Retrain(FIT), Prune(FIT, 0.9))
    assert stages(whole) == [Stage(frozenset(), 1), Stage(ZEROS, 4)]
    shared = named(Train(FIT), Prune(FIT, 0.5), Retrain(FIT), Share(FIT), Retrain(FIT))
    assert stages(shared) == [Stage(frozenset(), 0), Stage(ZEROS, 2), Stage(BOTH, 4)]


def test_without_a_dense_phase_the_initial_weights_are_the_baseline() -> None:
    assert stages(named(Share(FIT))) == [Stage(frozenset(), -1), Stage(frozenset({"sharing"}), 0)]
    assert stages({}) == [Stage(frozenset(), -1)]


def test_only_phases_after_the_dense_model_have_a_teacher() -> None:
    check_teachers(named(Train(FIT), Prune(TAUGHT, 0.5), Share(TAUGHT)), False)
    check_teachers(named(Prune(TAUGHT, 0.5)), True)
    for phases, initialised, name in (
        (named(Train(TAUGHT), Prune(FIT, 0.5)), False, "0-train"),
        (named(Train(TAUGHT), Prune(FIT, 0.5)), True, "0-train"),
        (named(Train(FIT), Train(TAUGHT), Prune(FIT, 0.5)), False, "1-train"),
        (named(Prune(FIT, 0.5), Retrain(TAUGHT)), False, "1-retrain"),
    ):
        with pytest.raises(ConfigError, match=rf"phases\.{name}\.fit\.distill\.weight=0\.5"):
            check_teachers(phases, initialised)
