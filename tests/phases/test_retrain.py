"""The phase retrain: the trained weights, and that others do not change."""

import copy

import pytest
import torch
from torch import nn

from trainer.compress.counts import counts
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.phases import Prune, Retrain, Train

WORLD = World.single(torch.device("cpu"))
TRAINING = FitConfig(epochs=1)


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.BatchNorm1d(30), nn.Linear(30, 10))
    Prune(0.9, fit=FitConfig(), exempt=["3"]).enter(model, WORLD)
    return model


def test_only_survivors_biases_norms_and_dense_weights_are_learnt() -> None:
    model = pruned()
    phase = Retrain(fit=TRAINING)
    phase.enter(model, WORLD)
    assert counts(model).learnable == 60 + 30 + 60 + 300 + 10
    assert [tuple(p.shape) for p in model.parameters()][-1] != (30, 20)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5, fused=True)
    model(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()
    moments = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert moments == 2 * counts(model).learnable


@pytest.mark.parametrize("kind", [Train, Retrain])
def test_training_keeps_or_loses_zeros_as_declared(kind: type[Train] | type[Retrain]) -> None:
    model = pruned()
    zeros = model[0].weight == 0
    phase = kind(fit=TRAINING)
    phase.enter(model, WORLD)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    phase.leave(model)
    assert bool((model[0].weight == 0)[zeros].all()) == ("zeros" in phase.keeps)
    assert (model[0].weight[~zeros] != 0).all()


def test_sharing_is_kept_in_a_sparse_layer_and_found_in_no_other() -> None:
    """60 survivors in 32 clusters: more than half as many values as survivors."""
    model = pruned()
    with torch.no_grad():
        model[0].weight[model[0].weight != 0] = torch.randn(32)[torch.arange(60) % 32]
        model[2].weight[:10] = 0.5  # norms of dead channels are alike, and not shared
        model[2].weight[10:] = torch.rand(20)
    Retrain(fit=TRAINING, keep=["zeros", "sharing"]).enter(model, WORLD)
    assert counts(model).learnable == 32 + 30 + 60 + 300 + 10


def test_leave_changes_no_output() -> None:
    model = pruned().eval()
    keys = list(model.state_dict())
    x = torch.randn(4, 20)
    before = model(x)
    phase = Retrain(fit=TRAINING)
    phase.enter(model, WORLD)
    assert torch.equal(model(x), before)
    phase.leave(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


def test_a_phase_can_be_entered_again_from_its_start() -> None:
    model = pruned()
    start = copy.deepcopy(model)
    Retrain(fit=TRAINING).enter(model, WORLD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    Retrain(fit=TRAINING).enter(start, WORLD)
    start.load_state_dict(model.state_dict())
    x = torch.randn(4, 20)
    assert torch.equal(start(x), model(x))
