"""Building phases from settings: refused ones and their messages."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch import nn

from tests.experiments import experiment
from trainer.config import FitConfig
from trainer.errors import ConfigError
from trainer.experiment import check_order
from trainer.phases import (
    AutoPrune,
    EntropyPenalty,
    EntropyRound,
    Phase,
    Prune,
    Quantize,
    Retrain,
    Share,
    StructuredPrune,
    Train,
)

CONF = Path(__file__).parents[2] / "conf" / "phase"
TRAINING = FitConfig(epochs=1)


@dataclass
class Own(Phase):
    kind: ClassVar[str] = "own"

    strength: float = 1.0

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"sharing"})


def shipped(name: str) -> dict[str, Any]:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert isinstance(settings, dict)
    assert settings.pop("enabled") is True  # trainer.config sees to it
    return settings


KINDS = {
    "train": Train,
    "prune": Prune,
    "auto_prune": AutoPrune,
    "retrain": Retrain,
    "share": Share,
    "quantize": Quantize,
    "entropy": EntropyPenalty,
    "entropy_round": EntropyRound,
    "structured_prune": StructuredPrune,
}


def test_there_is_a_file_for_every_phase() -> None:
    assert {file.stem for file in CONF.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_shipped_phases_state_every_field_with_its_default(name: str) -> None:
    settings = shipped(name)
    kind = KINDS[name]
    assert set(settings) == {*(field.name for field in fields(kind) if field.init), "_target_"}
    assert set(settings["fit"]) == {field.name for field in fields(FitConfig)}
    if name == "auto_prune":
        settings["max_drop"] = 0.1
        assert _built(name, settings) == AutoPrune(max_drop=0.1)
    else:
        assert _built(name, settings) == kind()
    assert kind.kind == name


def _built(name: str, settings: dict[str, Any]) -> Phase:
    before = {"train": shipped("train")} if name == "auto_prune" else {}
    return experiment(phases={**before, name: settings}).phases[name]


def test_epochs_and_lr_are_shorthands_for_those_of_fit() -> None:
    phase = Prune(0.5, epochs=3, lr=0.1)
    assert phase.fit == FitConfig(epochs=3, lr=0.1)
    assert (phase.epochs, phase.lr) == (3, 0.1)
    changed = replace(phase, sparsity=0.6)
    assert (changed.sparsity, changed.fit) == (0.6, phase.fit)
    assert Train(fit=FitConfig(epochs=5, clip=1.0), lr=0.2).fit.clip == 1.0


def test_auto_is_a_shorthand_for_auto_prune() -> None:
    settings = {**shipped("prune"), "sparsity": "auto", "max_drop": 0.1, "fit": {"epochs": 2}}
    made = experiment(phases={"train": shipped("train"), "prune": settings}).phases["prune"]
    assert made == AutoPrune(max_drop=0.1, epochs=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"phases\.prune.*sparsity=1.0: it must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"overrides": {"fc1": 2}}, "overrides.fc1=2.0: it must be at least 0 and below 1"),
        (
            {"sparsity": 0.95, "min_density": 0.1},
            "sparsity=0.95: it keeps less than min_density=0.1",
        ),
        ({"min_density": 1.5}, "min_density=1.5: it must be between 0 and 1"),
        ({"scope": "model"}, "scope=model: it must be one of layer, global"),
        ({"schedule": "linear"}, "schedule=linear: it must be one of oneshot, cubic"),
        ({"begin": 0.5, "end": 0.5}, "begin=0.5, end=0.5: they must satisfy"),
        ({"end": 1.1}, "end=1.1"),
        ({"interval": 0}, "interval=0: it must be at least 1 step"),
        ({"saliency": "norm"}, "saliency=norm: it must be one of magnitude, wanda, sparsegpt"),
        ({"saliency": "wanda"}, "saliency=wanda with samples=0: it needs inputs; set samples=128"),
        ({"samples": 8}, "samples=8 with saliency=magnitude"),
        ({"saliency": "wanda", "samples": 8, "scope": "global"}, "set schedule=oneshot, scope=la"),
        ({"schedule": "cubic", "fit": {"epochs": 0}}, "schedule=cubic with fit.epochs=0"),
        ({"speed": 1}, r"phases\.prune\.speed: .*known keys: .*sparsity, scope"),
        ({"fit": {"epochs": -1}}, r"phases\.prune\.fit\.epochs=-1: it must be at least 0"),
        ({"fit": {"epoch": 1}}, r"phases\.prune\.fit\.epoch: .*known keys: epochs, lr"),
        ({"fit": {"epochs": 1.5}}, r"phases\.prune\.fit\.epochs=1\.5: .* a whole number"),
        ({"interval": 2.5}, r"phases\.prune\.interval=2\.5: .* a whole number"),
        ({"exempt": "fc1"}, r"phases\.prune\.exempt"),
        ({"overrides": None}, r"phases\.prune\.overrides"),
        ({"fit": 3}, r"phases\.prune\.fit=3: it must be a mapping"),
        ({"fit": {"epochs": 2, "warmup_epochs": 100}}, "fit.warmup_epochs=100 with fit.epochs=2"),
        ({"_target_": "trainer.phases.Pruner"}, r"phases\.prune\._target_=trainer\.phases\.Pruner"),
        ({"_target_": "torch.nn.Identity"}, "a phase is a dataclass that derives from Phase"),
    ],
)
def test_wrong_settings_name_the_key_and_what_is_right(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(phases={"prune": {**shipped("prune"), **change}})


def test_no_phases() -> None:
    with pytest.raises(ConfigError, match="there are none"):
        experiment(phases={})


def test_a_phase_of_your_own() -> None:
    settings = {"_target_": f"{__name__}.Own", "fit": {"epochs": 2}, "strength": 3.0}
    made = experiment(phases={"own": settings}).phases["own"]
    assert made.fit == FitConfig(epochs=2)
    assert made.kind == "own"


def test_order() -> None:
    train, retrain = Train(fit=TRAINING), Retrain(fit=TRAINING)
    prune, at_once = Prune(0.5, fit=TRAINING), Prune(0.5, fit=FitConfig())
    check_order(
        {"train": train, "prune": prune, "retrain": retrain, "again": at_once, "r": retrain}
    )
    check_order(
        {"prune": prune, "idle": Train(fit=FitConfig())}
    )  # trains nothing, destroys nothing
    for maker in (prune, at_once):
        with pytest.raises(
            ConfigError,
            match=r"phase 'train2' \(train\) would destroy the zeros made by 'prune': use retrain",
        ):
            check_order({"train": train, "prune": maker, "r": retrain, "train2": train})
    with pytest.raises(ConfigError, match="'own'"):
        check_order({"prune": prune, "own": Own(fit=TRAINING)})
    check_order({"prune": prune, "own": Own(fit=FitConfig())})
    with pytest.raises(ConfigError, match=r"'own' .* destroy the sharing made by 'share', even"):
        check_order({"share": Share(fit=FitConfig()), "own": Own(fit=FitConfig())})


def test_a_phase_without_a_kind_is_refused():
    with pytest.raises(ConfigError, match=r"phases.own has no _target_.*; \+phase@phases.own=KIND"):
        experiment(phases={"own": {"sparsity": 0.5}})
    train = {"_target_": "trainer.phases.Train", "fit": {"epochs": 1}}
    with pytest.raises(ConfigError, match=r"phases.trian has .* does; did you mean phases.train\?"):
        experiment(phases={"train": train, "trian": {"fit": {"freeze": {"conv1": 1}}}})


@pytest.mark.parametrize(
    ("first", "second", "advice"),
    [
        (Prune(0.5), Train(epochs=1), "use retrain instead, or move it"),
        (Share(4), Train(epochs=1), r"use retrain with keep=\[zeros,sharing\] instead, or move it"),
        (Share(4), Retrain(epochs=1), r"set its keep=\[zeros,sharing\], or move it"),
        (Share(4), Quantize(), r"training: set its keep=\[zeros,sharing\], or move it"),
        (Share(4), EntropyPenalty(), "training: move it"),
        (Quantize(), Quantize(), "training: move it"),
        (Quantize(), Train(epochs=1), "'first': move it"),
        (Quantize(), Retrain(epochs=1), "'first': move it"),
    ],
)
def test_the_advice_for_a_refused_order_works(first, second, advice):
    with pytest.raises(ConfigError, match=f"{advice} before 'first'$"):
        check_order({"first": first, "second": second})


def test_settings_are_checked_against_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to("meta")
    Prune(0.5, fit=TRAINING, overrides={"0": 0.2}, exempt=["1"]).check_model(model)
    for phase, message in [
        (
            Prune(0.5, fit=TRAINING, overrides={"fc": 0.1}),
            r"'fc' matches no weight; there are 0\.weight",
        ),
        (Prune(0.5, fit=TRAINING, overrides={"1": 0.1}, exempt=["1"]), "'1' matches no weight"),
        (Prune(0.5, fit=TRAINING, exempt=["conv*"]), r"'conv\*' matches no weight"),
        (Prune(0.5, fit=TRAINING, exempt=["*"]), "no weight is left"),
        (Prune(0.95, "global", fit=TRAINING), "sparsity=0.95 keeps 1 of these weights, fewer than"),
    ]:
        with pytest.raises(ConfigError, match=message):
            phase.check_model(model)
