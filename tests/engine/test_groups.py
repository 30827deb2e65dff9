"""Groups of parameters: which settings each parameter is trained with."""

import copy

import pytest
import torch
from torch import nn

from tests.engine import bodies
from trainer.compress.codebooks import codebook_of
from trainer.compress.install import install
from trainer.compress.parametrize import Packed, Shared
from trainer.config import FitConfig
from trainer.data.order import global_batches
from trainer.engine.groups import check_groups
from trainer.engine.loop import fit
from trainer.engine.optim import parse_optimizer
from trainer.engine.world import World
from trainer.errors import ConfigError

ALONE = World.single(torch.device("cpu"))
SGD = {"_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.1}
GROUPS = {
    "plain": {"kind": "vectors", "weight_decay": 0},
    "head": {"params": "2", "lr_factor": 0.5},
}


def decays(model, groups=GROUPS):
    """(learning rate's factor, weight decay) of each parameter, in the order of the model."""
    optimizer = parse_optimizer({**SGD, "groups": groups}).build(model.parameters(), model)
    found = {
        id(p): (group.get("lr_factor", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return [found[id(p)] for p in model.parameters()]


def test_it_trains_as_a_hand_written_loop_does():
    split, model = bodies.problem()
    optimizer = torch.optim.SGD(
        [
            {"params": [model[0].weight]},
            {"params": [model[0].bias], "weight_decay": 0},
            {"params": [model[2].weight], "lr": 0.1},
            {"params": [model[2].bias], "weight_decay": 0, "lr": 0.1},
        ],
        lr=0.2,
        momentum=0.9,
        weight_decay=0.1,
        fused=True,
    )
    for epoch in range(2):
        for batch in global_batches(len(split), 16, 5, epoch):
            model.zero_grad()
            nn.functional.cross_entropy(model(split.inputs[batch]), split.targets[batch]).backward()
            optimizer.step()
    settings = {"epochs": 2, "schedule": "constant"}
    ((weights, *_),) = bodies.train(ALONE, settings, optimizer={**SGD, "groups": GROUPS})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_groups_hold_for_what_compression_trains_in_place_of_a_weight():
    model = bodies.problem()[1]
    assert decays(model) == [(1, 0.1), (1, 0), (0.5, 0.1), (0.5, 0)]
    model[0].weight.data[:, 2:4] = 0
    model[2].weight.data.copy_(model[2].weight.data.sign())
    install(
        model,
        {
            "0.weight": Packed(model[0].weight, model[0].weight != 0),
            "2.weight": Shared(model[2].weight, codebook_of(model[2].weight)),
        },
    )
    shapes = {p.shape: own for p, own in zip(model.parameters(), decays(model), strict=True)}
    assert shapes == {(32,): (1, 0.1), (2,): (0.5, 0.1), (8,): (1, 0), (3,): (0.5, 0)}


def test_the_last_group_that_has_a_setting_decides_on_it():
    groups = {**GROUPS, "more": {"params": ["*.bias"], "weight_decay": 0.3}}
    assert decays(bodies.problem()[1], groups) == [(1, 0.1), (1, 0.3), (0.5, 0.1), (0.5, 0.3)]


def test_a_resumed_training_ends_in_the_same_bits():
    def train(model, until=None, start=None):
        split, _ = bodies.problem()
        run = bodies.runtime(ALONE, optimizer={**SGD, "groups": GROUPS})
        for step in fit(model, split, FitConfig(epochs=2), run, 0, start):
            if step.step == until:
                return copy.deepcopy((model.state_dict(), step.state()))
        return model.state_dict(), None

    whole, _ = train(bodies.problem()[1])
    weights, state = train(bodies.problem()[1], 3)
    model = bodies.problem()[1]
    model.load_state_dict(weights)
    resumed, _ = train(model, start=state)
    assert all(torch.equal(whole[key], value) for key, value in resumed.items())


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (3, "optimizer.groups=3: it must be a mapping"),
        ({"a": 3}, r"optimizer\.groups\.a=3: it must be a mapping"),
        ({"a": {"params": "*"}}, r"groups\.a: it changes nothing"),
        ({"a": {"params": [], "weight_decay": 0}}, r"groups\.a\.params=\[\]: it must be a pattern"),
        ({"a": {"kind": "norms", "weight_decay": 0}}, r"kind=norms: it must be one of all"),
        ({"a": {"lr_factor": -1}}, r"groups\.a\.lr_factor=-1: it must be at least 0"),
        ({"a": {"lr_factor": "x"}}, r"lr_factor='x': it must be a number"),
        ({"a": {"lr": 0.1}}, r"groups\.a\.lr=0\.1: .*set lr_factor"),
        ({"a": {"weight_decai": 0}}, r"groups\.a\.weight_decai: unknown; SGD takes .*weight_decay"),
        ({"a": {"weight_decay": -1}}, r"optimizer\.groups\.a: .*weight_decay"),
    ],
)
def test_wrong_settings_are_named(groups, said):
    with pytest.raises(ConfigError, match=said):
        parse_optimizer({**SGD, "groups": groups})


def test_a_pattern_that_matches_nothing_is_refused_with_the_closest_names():
    spec = parse_optimizer({**SGD, "groups": {"head": {"params": ["head"], "lr_factor": 2}}})
    few = bodies.problem()[1]
    with pytest.raises(ConfigError, match=r"groups\.head\.params: 'head' .* 0\.weight, 0\.bias"):
        check_groups(few, spec.groups)
    many = nn.ModuleDict({f"layer{n}": nn.Linear(2, 2) for n in range(9)} | {"heat": few})
    with pytest.raises(ConfigError, match=r"'head' matches no trainable .* names are heat"):
        check_groups(many.to("meta"), spec.groups)
    vectors = parse_optimizer({**SGD, "groups": GROUPS}).groups[:1]
    with pytest.raises(ConfigError, match="matches no vector; there are none"):
        check_groups(nn.Linear(2, 2, bias=False), vectors)
