"""The contract suites of samplers and pruners accept correct ones and find errors in others."""

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import NSGAIISampler, RandomSampler, TPESampler

import trainer
from trainer.errors import ConfigError
from trainer.sweeps.algorithms import SamplerStudy
from trainer.sweeps.plan import Plan
from trainer.testing import check_pruner, check_sampler

PAGE = (Path(__file__).parents[2] / "docs" / "own-sampler.md").read_text()
(SOURCE,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "class BetterHalf" in b)


@pytest.mark.parametrize(
    "sampler", [RandomSampler(0), TPESampler(seed=0, n_startup_trials=4), NSGAIISampler(seed=0)]
)
def test_shipped_samplers_keep_the_contract(sampler: Any) -> None:
    check_sampler(sampler)


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize(
    "pruner", [MedianPruner(2), SuccessiveHalvingPruner(1, 3), HyperbandPruner(1, 5, 2)]
)
def test_shipped_pruners_keep_the_contract(pruner: Any) -> None:
    check_pruner(pruner)


class Low(RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        value = super().sample_independent(study, trial, name, distribution)
        return 4 if name == "width" else value


class OffStep(RandomSampler):
    def sample_independent(self, study, trial, name, distribution):
        value = super().sample_independent(study, trial, name, distribution)
        return 0.2 if name == "sparsity" else value


class FirstOnly(RandomSampler):
    def after_trial(self, study, trial, state, values):
        raise ZeroDivisionError(values[0])


class Always(BasePruner):
    def prune(self, study, trial):
        return True


class Unsure(BasePruner):
    def prune(self, study, trial):
        return None


class Fragile(BasePruner):
    def prune(self, study, trial):
        return study.best_value > trial.intermediate_values[1]


@pytest.mark.parametrize(
    ("sampler", "found"),
    [
        (Low(0), "width: the sampler drew 4, which is outside the range"),
        (OffStep(0), "sparsity: the sampler drew 0.2, which is not on a step"),
        (FirstOnly(0), "after_trial raised ZeroDivisionError"),
        (object(), "object must be a subclass of optuna.samplers.BaseSampler"),
    ],
)
def test_a_broken_sampler_is_found(sampler: Any, found: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(found)):
        check_sampler(sampler)


@pytest.mark.parametrize(
    ("pruner", "found"),
    [
        (Always(), "stopped every trial"),
        (Unsure(), "trial 0, epoch 1: prune returned None, not True or False"),
        (Fragile(), "trial 0, epoch 1: prune raised ValueError"),
        (object(), "object must be a subclass of optuna.pruners.BasePruner"),
    ],
)
def test_a_broken_pruner_is_found(pruner: Any, found: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(found)):
        check_pruner(pruner)


def plan(**sweep: Any) -> Plan:
    overrides = [f"sweep.{key}={value}" for key, value in sweep.items()]
    experiment = trainer.compose("sweep_smoke", *overrides)
    return Plan(experiment.config, OmegaConf.create(experiment.settings()))


def test_the_classes_of_the_page_keep_the_contract_and_are_selected(monkeypatch, tmp_path) -> None:
    (tmp_path / "halves.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import halves

    check_sampler(halves.BetterHalf(seed=0))
    check_sampler(halves.BetterHalf(seed=0), objectives=2)
    check_pruner(halves.Hopeless())
    made = plan(
        sampler="{_target_: halves.BetterHalf, explore: 0.5}",
        pruner="{_target_: halves.Hopeless}",
    )
    assert isinstance(made.sampler, halves.BetterHalf)
    assert made.sampler.explore == 0.5
    assert isinstance(made.pruner, halves.Hopeless)
    study = SamplerStudy(made.cfg.sweep, made.space, 0, made.sampler)
    drawn = [study.draw(number).params for number in range(6)]
    assert len({str(params) for params in drawn}) > 1


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("sampler", "{_target_: optuna.pruners.NopPruner}", "sweep.sampler"),
        ("pruner", "{_target_: nowhere.Pruner}", "sweep.pruner"),
        ("sampler", "{_target_: optuna.samplers.TPESampler, sed: 1}", "sed"),
        ("sampler", "tpee", "tpe"),
    ],
)
def test_other_classes_are_refused(key: str, value: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        plan(**{key: value})


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_any_of_optunas_can_be_selected() -> None:
    made = plan(
        sampler="{_target_: optuna.samplers.QMCSampler}",
        pruner="{_target_: optuna.pruners.PercentilePruner, percentile: 25.0}",
    )
    assert isinstance(made.sampler, optuna.samplers.QMCSampler)
    assert isinstance(made.pruner, optuna.pruners.PercentilePruner)
