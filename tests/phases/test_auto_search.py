"""Settings that are searched for: bits of each layer and units, within a share of the limit."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from trainer.compress.allocation import bit_allocations
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError, Diverged
from trainer.experiment import Experiment
from trainer.metrics import MAXIMIZE
from trainer.phases import Phase, Prune, Quantize, Share, StructuredPrune, Train
from trainer.phases.auto import search_bits

PLAIN: Any = {"rounding": "nearest", "correct_bias": False}
WORLD = World.single(torch.device("cpu"))


def test_the_cheapest_bit_goes_first() -> None:
    rises = {
        "large": {8: 0.0, 7: 0.1, 6: 0.05, 5: 4.0},  # a rise that falls is noise
        "small": {8: 0.0, 7: 0.01, 6: 0.1},
        "fixed": {8: 0.0},
    }
    found = bit_allocations({"large": 100, "small": 1, "fixed": 10}, rises)
    assert [(each["large"], each["small"]) for each in found] == [
        *[(8, 8), (6, 8), (6, 7), (5, 7), (5, 6)],
    ]
    assert {each["fixed"] for each in found} == {8}


def scripted(worth: Mapping[str, float], limit: float) -> dict[str, int]:
    """The bits that a search chooses if each bit below 8 of a layer costs `worth`."""

    def measure(bits: Mapping[str, int]) -> Metrics:
        lost = sum(worth[name] * (8 - number) for name, number in bits.items())
        return Metrics(loss=lost, values={"accuracy": 1 - lost})

    found, line = search_bits(dict.fromkeys(worth, 10), 1, measure, limit)
    assert line.startswith("bits of each layer: a ")
    return found


def test_the_smallest_allocation_within_the_limit_is_found() -> None:
    assert scripted({"a": 0.01, "b": 0.1}, limit=0.7) == {"a": 1, "b": 6}
    assert scripted({"a": 0.01, "b": 0.1}, limit=2.0) == {"a": 8, "b": 8}  # out of reach
    assert scripted({"a": 0.0, "b": 0.0}, limit=1.0) == {"a": 1, "b": 1}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4)
    )


class Distance:
    """Evaluates how far the outputs are from those of the model at the start."""

    def __init__(self) -> None:
        self.inputs = torch.randn(64, 6)
        self.exact = net()(self.inputs)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Metrics:
        error = float((model(self.inputs) - self.exact).norm() / self.exact.norm())
        return Metrics(loss=error, values={"accuracy": 1 - error})


@pytest.mark.parametrize(
    "phase",
    [
        Share("auto", {"4": 7}, max_drop=0.05),
        Quantize("auto", {"4": 7}, max_drop=0.05, samples=64, epochs=0, **PLAIN),
        Quantize("auto", {"4": 7}, max_drop=0.05, samples=64, epochs=0),
        Quantize("auto", {"4": 7}, max_drop=0.05, activations=None, epochs=0),
    ],
)
def test_bits_are_within_the_limit_and_the_model_stays(phase: Any) -> None:
    distance, model = Distance(), net()
    before = copy.deepcopy(model.state_dict())
    phase = copy.deepcopy(phase)
    phase.observe(model, WORLD, [distance.inputs])
    (line,) = phase.search(model, WORLD, distance, None)
    assert "on average; before training, accuracy is " in line
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    found = phase.state()["bits"]
    assert found.keys() == {"0.weight", "2.weight"}
    assert 2 < min(found.values()) < 8
    resumed = copy.deepcopy(phase)
    resumed.load_state({})
    resumed.load_state(phase.state())
    phase.enter(model, WORLD)
    reached = distance(model).first
    assert reached >= 0.95
    # What the search has measured is what the phase begins with.
    assert f"accuracy is {reached:.2%}, the limit 95.00%" in line
    again = net()
    resumed.observe(again, WORLD, [distance.inputs])
    resumed.enter(again, WORLD)
    assert torch.equal(again(distance.inputs), model(distance.inputs))


def test_units_are_removed_within_the_limit() -> None:
    distance, model = Distance(), net()
    with torch.no_grad():
        model[0].weight[10:30] *= 1e-3  # units that compute next to nothing
        model[0].bias[10:30] *= 1e-3
        distance.exact = model(distance.inputs)
    phase = StructuredPrune("auto", max_drop=0.02)
    phase.observe(model, WORLD, [distance.inputs])
    (line,) = phase.search(model, WORLD, distance, None)
    assert "of 60 units removed" in line
    phase.apply_change(model, phase.plan_change(model, WORLD))
    assert distance(model).first >= 0.98
    assert 15 <= 40 - model[0].out_features <= 22
    fresh = StructuredPrune("auto", max_drop=0.02)
    fresh.observe(model, WORLD, [distance.inputs])
    assert fresh.plan_change(model, WORLD)["removed"] == []  # nothing was searched for


def removed_by(phase: StructuredPrune) -> int:
    """How many of the 60 units of `net` a phase removes."""
    model = net()
    phase.observe(model, WORLD, [torch.zeros(2, 6)])
    phase.apply_change(model, phase.plan_change(model, WORLD))
    return 60 - model[0].out_features - model[2].out_features


class Trained:
    """Evaluates models by the number of units that a phase removes before it trains them."""

    def __init__(self, accuracy: Callable[[int], float]) -> None:
        self.accuracy = accuracy
        self.removed: list[int] = []

    def __call__(self, model: nn.Module, after: Phase | None = None) -> Metrics:
        if after is None:
            return Metrics(0.0, {"accuracy": 1.0}, MAXIMIZE)
        assert isinstance(after, StructuredPrune)
        removed = removed_by(after)
        self.removed.append(removed)
        return Metrics(0.0, {"accuracy": self.accuracy(removed)}, MAXIMIZE)


def search_with_training(evaluate: Trained) -> tuple[list[str], int]:
    """The lines of a search, and how many units it removes."""
    phase, model = StructuredPrune("auto", max_drop=0.02, epochs=1), net()
    phase.observe(model, WORLD, [torch.randn(8, 6)])
    lines = list(phase.search(model, WORLD, evaluate, None))
    assert len(lines) == len(evaluate.removed) + 1
    assert len({*evaluate.removed}) == len(evaluate.removed)  # each model is trained once
    return lines, removed_by(phase)


def test_a_trial_that_diverges_is_beyond_the_limit() -> None:
    def accuracy(removed: int) -> float:
        if removed > 20:
            raise Diverged("phase p0: the loss is nan in step 7")
        return 0.99

    evaluate = Trained(accuracy)
    lines, removed = search_with_training(evaluate)
    assert removed == max(number for number in evaluate.removed if number <= 20) > 10
    assert re.match(
        r"trying \d+ of 60 units removed, .* remain: phase p0: the loss is nan", lines[0]
    )
    assert lines[-1].endswith("accuracy 99.00% after training, the limit is 98.00%")


def test_if_no_smaller_model_is_within_the_limit_nothing_is_removed() -> None:
    lines, removed = search_with_training(Trained(lambda removed: 0.9))
    assert removed == 0
    assert lines[-1] == (
        "no unit is removed: no smaller model that was tried is within the limit, 98.00%, after "
        "training"
    )


def drops(limits: Mapping[str, Any], *phases: Phase) -> list[Any]:
    """The `max_drop` of each phase in an experiment."""
    chain = {"train": Train(epochs=1)} | {f"p{n}": phase for n, phase in enumerate(phases)}
    data = torch.randn(8, 6), torch.zeros(8, dtype=torch.long)
    made = Experiment(model=net, data=(data, data, data), phases=chain, limits=limits).phases
    return [getattr(made[f"p{n}"], "max_drop", None) for n in range(len(phases))]


def test_each_search_has_a_share_of_the_limit() -> None:
    chain = (
        *(StructuredPrune("auto", max_drop=0.1), Prune("auto", epochs=1), Prune(0.5)),
        *(Share("auto"), Quantize("auto", keep=["zeros", "sharing"], per_channel=False)),
    )
    assert drops({"max_accuracy_drop": 0.03}, *chain) == pytest.approx(
        [0.1, 0.01, None, 0.02, 0.03], nan_ok=True
    )
    assert drops({"max_drop": "3%"}, *chain[1:]) == ["1%", None, "2%", "3%"]
    with pytest.raises(ConfigError, match=r"phases\.p0\.max_drop=null: set how much worse"):
        drops({}, Share("auto"))
    with pytest.raises(ConfigError, match=r"may lose more than limits\.max_accuracy_drop"):
        drops({"max_accuracy_drop": 0.01}, Share("auto", max_drop=0.02))


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (Share, {"bits": "few"}, "bits='few': it must be a number or auto"),
        (Share, {"bits": "4"}, "bits='4': it must be a number or auto"),
        (Quantize, {"bits": "few"}, "bits='few': it must be a number or auto"),
        (StructuredPrune, {"remaining": "half"}, "remaining='half': it must be a number or auto"),
        (Share, {"bits": "auto", "max_drop": -1}, "max_drop=-1: it must be a number of at least 0"),
    ],
)
def test_wrong_settings_are_refused(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kind(**settings)
