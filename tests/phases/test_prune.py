"""The phase prune: exact counts, the right weights, and regrowth during the ramp."""

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.counts import counts
from trainer.compress.select import weights
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases import Phase, Prune

WORLD = World.single(torch.device("cpu"))
TRAINING = FitConfig(epochs=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.fc1 = nn.Linear(36, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x).relu().flatten(1)
        output: Tensor = self.fc2(self.fc1(hidden).relu())
        return output


def kept(model: nn.Module) -> dict[str, int]:
    return {name: int(places[0].value.count_nonzero()) for name, places in weights(model).items()}


def run(phase: Phase, model: nn.Module, steps: int) -> list[dict[str, int]]:
    """Enter, train for `steps`, leave; what was kept after each step."""
    phase.enter(model, WORLD)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    x, y = torch.randn(16, 1, 5, 5), torch.randint(0, 10, (16,))
    history = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        phase.after_step(model, WORLD, step, steps)
        history.append(kept(model))
    phase.leave(model)
    return history


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def test_one_shot_per_layer_keeps_the_largest_of_each(model: Net) -> None:
    before = copy.deepcopy(model)
    phase = Prune(0.75, fit=FitConfig(), overrides={"fc*": 0.5, "fc2": 0.9}, exempt=["conv*"])
    phase.enter(model, WORLD)
    phase.leave(model)
    assert kept(model) == {"conv1.weight": 36, "fc1.weight": 360, "fc2.weight": 20}
    for name, places in weights(model).items():
        value, old = places[0].value, weights(before)[name][0].value
        assert torch.equal(value[value != 0], old[value != 0])
        lost, stays = old[value == 0].abs().tolist(), value[value != 0].abs().tolist()
        assert max(lost, default=0.0) <= min(stays)
    assert torch.equal(model.fc1.bias, before.fc1.bias)


@pytest.mark.parametrize(("sparsity", "min_density", "floor"), [(0.85, 0.1, 3), (0.9, 0.02, 1)])
def test_one_shot_over_all_layers_leaves_each_its_floor(
    model: Net, sparsity: float, min_density: float, floor: int
) -> None:
    with torch.no_grad():
        model.conv1.weight.mul_(1e-4)  # below every other weight
    phase = Prune(sparsity, "global", min_density, fit=FitConfig())
    phase.check_model(model)
    phase.enter(model, WORLD)
    assert sum(kept(model).values()) == round((1 - sparsity) * 956)
    assert kept(model)["conv1.weight"] == floor


def test_overrides_stand_alone_in_a_global_scope(model: Net) -> None:
    Prune(0.9, "global", fit=FitConfig(), overrides={"conv1": 0.5}).enter(model, WORLD)
    assert kept(model)["conv1.weight"] == 18
    assert sum(kept(model).values()) == 18 + 92


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_ramp_starts_at_the_present_and_ends_exactly(model: Net, scope: str) -> None:
    first = Prune(0.5, scope, fit=FitConfig())
    first.enter(model, WORLD)
    phase = Prune(0.9, scope, fit=TRAINING, schedule="cubic", begin=0.2, end=0.8, interval=2)
    history = [sum(k.values()) for k in run(phase, model, 20)]
    assert history[:3] == [478] * 3  # half of 956, until step 4
    assert history == sorted(history, reverse=True)
    assert 478 > history[7] > history[11] > history[15]
    assert history[6] == history[5]  # every second step
    final = {"conv1.weight": 4, "fc1.weight": 72, "fc2.weight": 20}
    assert history[15:] == [96] * 5
    assert sum(kept(model).values()) == 96
    if scope == "layer":
        assert kept(model) == final
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_weights_that_grow_return(model: Net) -> None:
    phase = Prune(0.5, fit=TRAINING, schedule="cubic", end=0.5, interval=1)
    phase.enter(model, WORLD)
    place = weights(model)["fc1.weight"][0]
    phase.after_step(model, WORLD, 4, 10)
    lost = (place.value == 0).nonzero()[0]
    with torch.no_grad():
        place.trainable[tuple(lost)] = 5.0  # the dense gradient reaches it
    assert place.value[tuple(lost)] == 0
    phase.after_step(model, WORLD, 5, 10)
    assert place.value[tuple(lost)] == 5.0
    assert int(place.value.count_nonzero()) == 360
    phase.after_step(model, WORLD, 6, 10)  # the masks rest
    with torch.no_grad():
        place.trainable.mul_(-1)
    phase.leave(model)
    assert model.fc1.weight[tuple(lost)] == -5.0
    assert kept(model) == {"conv1.weight": 18, "fc1.weight": 360, "fc2.weight": 100}


def test_the_dense_gradient_makes_them_grow(model: Net) -> None:
    phase = Prune(0.8, fit=TRAINING, schedule="cubic", end=1.0, interval=1)
    phase.enter(model, WORLD)
    pruned_once = torch.zeros(20, 36, dtype=torch.bool)
    returned = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, y = torch.randn(16, 1, 5, 5), torch.randint(0, 10, (16,))
    for step in range(1, 21):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        phase.after_step(model, WORLD, step, 20)
        zero = model.fc1.weight == 0
        returned += int((pruned_once & ~zero).sum())
        pruned_once |= zero
    assert returned > 0


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_fit_that_is_cut_short_still_ends_exactly(model: Net, scope: str) -> None:
    phase = Prune(0.9, scope, fit=TRAINING, schedule="cubic", interval=1)
    phase.enter(model, WORLD)
    phase.after_step(model, WORLD, 2, 100)
    phase.leave(model)
    assert sum(kept(model).values()) == 96


def test_one_shot_with_a_fit_trains_the_survivors_alone(model: Net) -> None:
    phase = Prune(0.9, fit=TRAINING)
    phase.enter(model, WORLD)
    inside = counts(model)
    assert inside.learnable == 96 + 4 + 20 + 10
    phase.leave(model)
    again = copy.deepcopy(model)
    run(phase, again, 5)
    for name, places in weights(model).items():
        assert torch.equal(places[0].value == 0, weights(again)[name][0].value == 0)
        assert not torch.equal(places[0].value, weights(again)[name][0].value)


def test_pruning_again_never_lowers_the_sparsity(model: Net) -> None:
    Prune(0.9, fit=FitConfig()).enter(model, WORLD)
    for phase in (
        Prune(0.5, fit=FitConfig()),
        Prune(0.5, fit=TRAINING, schedule="cubic"),
        Prune(0.95, fit=TRAINING, exempt=["fc1"], schedule="cubic"),
    ):
        run(phase, model, 8 if phase.fit.epochs else 0)
        now = kept(model)
        assert now["fc1.weight"] == 72
        assert now["conv1.weight"] <= 4
    assert now == {"conv1.weight": 2, "fc1.weight": 72, "fc2.weight": 10}


def test_a_layer_that_is_sparser_than_its_floor_stays_so(model: Net) -> None:
    Prune(0.99, fit=FitConfig(), min_density=0.0).enter(model, WORLD)
    before = kept(model)
    assert before["fc1.weight"] == 7
    run(Prune(0.9, "global", fit=TRAINING, min_density=0.05, schedule="cubic"), model, 8)
    assert kept(model) == before


def test_a_ramp_continues_from_its_checkpoint(model: Net) -> None:
    start = copy.deepcopy(model)
    phase = Prune(0.8, "global", fit=TRAINING, schedule="cubic", interval=1, end=1.0)
    phase.enter(model, WORLD)
    phase.after_step(model, WORLD, 3, 6)
    with torch.no_grad():
        model.fc1.parametrizations.weight.original.add_(0.01)
    saved = copy.deepcopy(model.state_dict())
    resumed = Prune(0.8, "global", fit=TRAINING, schedule="cubic", interval=1, end=1.0)
    resumed.enter(start, WORLD)
    start.load_state_dict(saved)
    assert torch.equal(start.fc1.weight, model.fc1.weight)
    for each, other in ((phase, model), (resumed, start)):
        each.after_step(other, WORLD, 4, 6)
        each.leave(other)
    for expected, value in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(expected, value)


def test_every_rank_takes_the_masks_of_rank_0(model: Net) -> None:
    class Follower(World):
        def broadcast(self, tensors: object) -> None:
            for mask in tensors:  # type: ignore[attr-defined]
                mask.zero_()
                mask.view(-1)[0] = True

    follower = Follower.single(torch.device("cpu"))
    for phase in (Prune(0.5, fit=FitConfig()), Prune(0.5, fit=TRAINING, schedule="cubic")):
        each = copy.deepcopy(model)
        phase.enter(each, follower)
        phase.after_step(each, follower, 1, 1)
        phase.leave(each)
        assert kept(each) == {"conv1.weight": 1, "fc1.weight": 1, "fc2.weight": 1}


def test_a_recurrent_matrix_with_its_gates_is_one_layer() -> None:
    lstm = nn.LSTM(4, 5)
    Prune(0.8, fit=FitConfig()).enter(lstm, WORLD)
    assert kept(lstm) == {"weight_ih_l0": 16, "weight_hh_l0": 20}


def test_a_tiny_layer_keeps_one_weight() -> None:
    layer = nn.Linear(2, 1)
    Prune(0.99, fit=FitConfig()).enter(layer, WORLD)
    assert kept(layer) == {"weight": 1}


def test_a_pattern_keeps_the_largest_of_each_group_of_inputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    before = copy.deepcopy(net)
    phase = Prune("2:4", epochs=1)
    phase.check_model(net)
    phase.enter(net, WORLD)
    assert counts(net).learnable == 6 * 72 // 2 + 5 * 12 + 11  # half of the weights, and biases
    phase.leave(net)
    for layer, old in ((net[0], before[0]), (net[2], before[2])):
        groups = layer.weight.detach().movedim(1, -1).unflatten(-1, (-1, 4))
        assert bool((groups.count_nonzero(-1) == 2).all())
        largest = old.weight.detach().movedim(1, -1).unflatten(-1, (-1, 4)).abs().topk(2, -1)
        assert torch.equal(groups.abs().topk(2, -1).values, largest.values)


def test_a_pattern_is_refused_where_it_does_not_fit(model: Net) -> None:
    with pytest.raises(ConfigError, match=r"inputs of conv1\.weight are no multiple of 4; set ex"):
        Prune("2:4").check_model(model)
    Prune("2:4", exempt=["conv1"]).check_model(model)
    with pytest.raises(ConfigError, match="all layers get the pattern at once"):
        Prune("2:4", scope="global")
    with pytest.raises(ConfigError, match='write a pattern in quotes: "2:4"'):
        Prune(124)
