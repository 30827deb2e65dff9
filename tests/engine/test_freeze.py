"""Frozen layers: what is trained when, on any number of ranks, from any checkpoint."""

import copy

import pytest
import torch
from torch import nn

from tests.engine import bodies
from trainer.compress.install import fold, install
from trainer.compress.parametrize import Packed
from trainer.config import FitConfig
from trainer.data.order import global_batches
from trainer.engine.freeze import check_freeze, frozen_values
from trainer.engine.loop import fit
from trainer.engine.world import World
from trainer.errors import ConfigError

ALONE = World.single(torch.device("cpu"))
DECAY = {"_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.1}


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_it_trains_as_a_hand_written_loop_does():
    split, model = bodies.problem()
    first, rest = (
        torch.optim.SGD(layer.parameters(), 0.2, momentum=0.9, weight_decay=0.1, fused=True)
        for layer in (model[0], model[2])
    )
    for epoch in range(3):
        model[0].requires_grad_(epoch >= 1)
        for batch in global_batches(len(split), 16, 5, epoch):
            model.zero_grad()
            nn.functional.cross_entropy(model(split.inputs[batch]), split.targets[batch]).backward()
            first.step()
            rest.step()
    settings = {"epochs": 3, "schedule": "constant", "freeze": {"0": 1}}
    ((weights, *_),) = bodies.train(ALONE, settings, optimizer=DECAY)
    assert same(model.state_dict(), weights)


@pytest.mark.parametrize("freeze", [{"0": None}, {"0.*": 1, "*.bias": None}])
def test_ranks_agree_and_only_what_is_trained_is_sent(ranks, freeze):
    settings = {"epochs": 2, "freeze": freeze}

    def body(world):
        ((weights, losses, sent, _),) = bodies.train(world, settings, optimizer=DECAY)
        return weights, losses, sent

    alone = body(ALONE)
    results = ranks(2, body)
    for weights, losses, _ in results:
        assert losses == pytest.approx(alone[1], rel=1e-5)
        assert same(results[0][0], weights)
        for key, value in alone[0].items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)
    everything = ranks(2, lambda world: next(bodies.train(world, {"epochs": 2}))[2])
    assert results[0][2] < everything[0]


def test_a_resumed_training_ends_in_the_same_bits():
    settings = FitConfig(epochs=3, freeze={"0": 1})

    def train(model, until=None, start=None):
        split, _ = bodies.problem()
        for step in fit(model, split, settings, bodies.runtime(ALONE, optimizer=DECAY), 0, start):
            if step.step == until:
                return copy.deepcopy((model.state_dict(), step.state()))
        return model.state_dict(), None

    whole, _ = train(bodies.problem()[1])
    for until in (3, 5, 8):  # before, at and after the end of the first epoch
        weights, state = train(bodies.problem()[1], until)
        model = bodies.problem()[1]
        model.load_state_dict(weights)
        resumed, _ = train(model, start=state)
        assert same(whole, resumed)


def test_a_frozen_batch_norm_keeps_its_statistics_until_it_is_unfrozen():
    split, _ = bodies.problem()
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    steps = fit(model, split, FitConfig(epochs=2, freeze={"0": 1}), bodies.runtime(ALONE))
    means = [model[0].running_mean.abs().sum().item() for _ in steps]
    assert means[:5] == [0] * 5
    assert means[5] > 0
    assert all(p.requires_grad for p in model.parameters())


def test_packed_weights_can_be_frozen():
    split, model = bodies.problem()
    before = model[0].weight.detach().clone()
    before[:, 2:4] = 0
    model[0].weight.data.copy_(before)
    install(model, {name: Packed(model.get_parameter(name), model.get_parameter(name) != 0)
                    for name in ("0.weight", "2.weight")})  # fmt: skip
    fit_config = FitConfig(epochs=2, freeze={"0": None})
    assert frozen_values(model, fit_config) == 8 * 4 + 8
    for _ in fit(model, split, fit_config, bodies.runtime(ALONE, optimizer=DECAY)):
        assert not model[0].parametrizations.weight.original.requires_grad
    fold(model)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.requires_grad


def test_patterns_are_checked():
    _, model = bodies.problem()
    check_freeze(model, FitConfig(epochs=2, freeze={"0": 1}))
    with pytest.raises(ConfigError, match=r"fit.freeze: 'head' matches no .* 0\.weight, 0\.bias"):
        check_freeze(model, FitConfig(epochs=2, freeze={"head": 1}))
    with pytest.raises(ConfigError, match="freezes every parameter in the first epoch"):
        check_freeze(model, FitConfig(epochs=2, freeze={"*": 1}))
    check_freeze(model, FitConfig(epochs=2, freeze={"*": 1, "2": 0}))
    with pytest.raises(ConfigError, match=r"fit\.freeze\.0=-1: it must be at least 0"):
        FitConfig(freeze={"0": -1})
