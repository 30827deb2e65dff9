"""From settings to phases: what is refused, and how it is said."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch import nn

from trainer.config import FitConfig
from trainer.errors import ConfigError
from trainer.phases import Phase, Prune, Retrain, Share, Train, build_phases, check_order

CONF = Path(__file__).parents[2] / "conf" / "phase"
TRAINING = FitConfig(epochs=1)


@dataclass
class Own(Phase):
    kind: ClassVar[str] = "own"

    fit: FitConfig
    strength: float = 1.0

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"sharing"})


def shipped(name: str) -> dict[str, Any]:
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert isinstance(settings, dict)
    assert settings.pop("enabled") is True  # trainer.config sees to it
    if "max_drop" in settings:
        settings["max_drop"] = None  # follows limits.max_accuracy_drop in a whole configuration
    return settings


def test_shipped_phases_state_every_field() -> None:
    phases = build_phases({name: shipped(name) for name in ("train", "prune", "retrain")})
    assert [type(phase) for phase in phases.values()] == [Train, Prune, Retrain]
    for name, phase in phases.items():
        taken = [field.name for field in fields(type(phase)) if field.init]
        assert set(shipped(name)) == {*taken, "_target_"}
        assert set(shipped(name)["fit"]) == {field.name for field in fields(FitConfig)}
        assert phase.kind == name


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
        ({"schedule": "cubic", "fit": {"epochs": 0}}, "schedule=cubic with fit.epochs=0"),
        ({"speed": 1}, r"phases\.prune\.speed: .*known keys: fit, sparsity, scope"),
        ({"fit": {"epochs": -1}}, r"phases\.prune\.fit\.epochs=-1: it must be at least 0"),
        ({"fit": {"epoch": 1}}, r"phases\.prune\.fit\.epoch: .*known keys: epochs, lr"),
        ({"fit": {"epochs": 1.5}}, r"phases\.prune\.fit\.epochs: .*1.5"),
        ({"interval": 2.5}, r"phases\.prune\.interval: .*2.5"),
        ({"exempt": "fc1"}, r"phases\.prune\.exempt"),
        ({"overrides": None}, r"phases\.prune\.overrides"),
        ({"fit": 3}, r"phases\.prune\.fit=3: it must be a mapping"),
        ({"_target_": "trainer.phases.Pruner"}, r"phases\.prune\._target_=trainer\.phases\.Pruner"),
        ({"_target_": "torch.nn.Identity"}, "a phase is a dataclass that derives from Phase"),
    ],
)
def test_wrong_settings_name_the_key_and_what_is_right(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_phases({"prune": {**shipped("prune"), **change}})


def test_no_phases() -> None:
    with pytest.raises(ConfigError, match="there are none"):
        build_phases({})


def test_a_phase_of_your_own() -> None:
    settings = {"_target_": f"{__name__}.Own", "fit": {"epochs": 2}, "strength": 3.0}
    made = build_phases({"own": settings})["own"]
    assert made.fit == FitConfig(epochs=2)
    assert made.kind == "own"


def test_order() -> None:
    train, retrain = Train(TRAINING), Retrain(TRAINING)
    prune, at_once = Prune(TRAINING, 0.5), Prune(FitConfig(), 0.5)
    check_order(
        {"train": train, "prune": prune, "retrain": retrain, "again": at_once, "r": retrain}
    )
    check_order({"prune": prune, "idle": Train(FitConfig())})  # trains nothing, destroys nothing
    for maker in (prune, at_once):
        with pytest.raises(
            ConfigError,
            match=r"phase 'train2' \(train\) would destroy the zeros made by 'prune': use retrain",
        ):
            check_order({"train": train, "prune": maker, "r": retrain, "train2": train})
    with pytest.raises(ConfigError, match="'own'"):
        check_order({"prune": prune, "own": Own(TRAINING)})
    check_order({"prune": prune, "own": Own(FitConfig())})
    with pytest.raises(ConfigError, match=r"'own' .* destroy the sharing made by 'share', trained"):
        check_order({"share": Share(FitConfig()), "own": Own(FitConfig())})


def test_settings_are_checked_against_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to("meta")
    Prune(TRAINING, 0.5, overrides={"0": 0.2}, exempt=["1"]).check(model)
    for phase, message in [
        (
            Prune(TRAINING, 0.5, overrides={"fc": 0.1}),
            r"'fc' matches no weight; there are 0\.weight",
        ),
        (Prune(TRAINING, 0.5, overrides={"1": 0.1}, exempt=["1"]), "'1' matches no weight"),
        (Prune(TRAINING, 0.5, exempt=["conv*"]), r"'conv\*' matches no weight"),
        (Prune(TRAINING, 0.5, exempt=["*"]), "no weight is left"),
        (Prune(TRAINING, 0.95, "global"), "sparsity=0.95 keeps 1 of these weights, fewer than"),
    ]:
        with pytest.raises(ConfigError, match=message):
            phase.check(model)
