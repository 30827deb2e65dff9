"""The phase share: shared values, their training, and refused settings."""

import copy

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.counts import counts
from trainer.compress.select import weights
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.experiment import check_order
from trainer.phases import Phase, Prune, Retrain, Share

WORLD = World.single(torch.device("cpu"))
TRAINING = FitConfig(epochs=1)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.BatchNorm1d(30), nn.Linear(30, 10))
    nn.init.normal_(made[2].weight)  # as after some training: no few values to keep
    nn.init.normal_(made[2].bias)
    Prune(0.5, fit=FitConfig(), exempt=["3"]).enter(made, WORLD)
    return made


def distinct(model: nn.Module) -> dict[str, int]:
    found = {name: places[0].value.unique() for name, places in weights(model).items()}
    return {name: int((values != 0).sum()) for name, values in found.items()}


def run(phase: Phase, model: nn.Module, steps: int) -> None:
    phase.enter(model, WORLD)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    phase.leave(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 0}, "bits=0: it must be 1 to 16 bits"),
        ({"bits": 17}, "bits=17"),
        ({"overrides": {"fc*": 0}}, "overrides.fc\\*=0"),
        ({"clusters": {"fc": 0}}, "clusters.fc=0: it must be 1 to 65535 clusters"),
        ({"clusters": {"fc": 65536}}, "clusters.fc=65536"),
        ({"init": "kmeans++"}, "init=kmeans\\+\\+: it must be one of linear, density, random"),
        ({"rate": -0.1}, "rate=-0.1: it must be at least 0"),
        ({"rate": float("nan")}, "rate=nan"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Share(fit=FitConfig(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["overrides", "clusters"])
def test_a_pattern_that_matches_nothing_is_refused(model: nn.Module, key: str) -> None:
    with pytest.raises(ConfigError, match="'conv' matches no weight"):
        Share(fit=FitConfig(), **{key: {"conv": 2}}).check_model(model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no weight is left"):
        Share(fit=FitConfig(), exempt=["*"]).check_model(model)
    Share(fit=FitConfig(), **{key: {"0": 2, "3.*": 3}}).check_model(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": 3}, [8, 8]),
        ({"bits": 3, "overrides": {"3": 2}}, [8, 4]),
        ({"bits": 3, "clusters": {"0": 5}}, [5, 8]),
        ({"bits": 3, "overrides": {"*": 4}, "clusters": {"*": 6, "3": 1}}, [6, 1]),
        ({"bits": 3, "exempt": ["3"]}, [8, 300]),
        ({"bits": 3, "include": ["3"]}, [300, 8]),
        ({"bits": 16}, [300, 300]),
    ],
)
def test_each_weight_has_the_number_of_clusters_that_was_set(
    model: nn.Module, settings: dict[str, object], expected: list[int]
) -> None:
    Share(fit=FitConfig(), init="density", **settings).enter(model, WORLD)  # type: ignore[arg-type]
    assert list(distinct(model).values()) == expected


@pytest.mark.parametrize("init", ["linear", "density", "random", "exact"])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_without_a_fit_only_weights_change_and_zeros_stay(
    model: nn.Module, init: str, rate: float
) -> None:
    before = copy.deepcopy(model)
    phase = Share(4, fit=FitConfig(), init=init, rate=rate)
    run(phase, model, 0)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for name, value in model.state_dict().items():
        old = before.state_dict()[name]
        if value.ndim == 2:
            assert torch.equal(value == 0, old == 0)
            assert 1 <= len(value[value != 0].unique()) <= 16
            assert float((value - old).square().mean() / old.var()) < 0.2
        else:
            assert torch.equal(value, old)


def test_a_fit_learns_codebooks_biases_and_norms_alone(model: nn.Module) -> None:
    phase = Share(3, fit=TRAINING, init="density", exempt=["3"])
    start = copy.deepcopy(model)
    phase.enter(start, WORLD)
    assert counts(start).learnable == 8 + 30 + 60 + 300 + 10  # one layer exempt, without zeros
    Share(3, fit=FitConfig(), init="density").enter(again := copy.deepcopy(model), WORLD)
    assert counts(again).learnable == 8 + 30 + 60 + 8 + 10
    phase.leave(start)
    trained = copy.deepcopy(model)
    run(phase, trained, 5)
    old, new = start[0].weight, trained[0].weight  # type: ignore[union-attr]
    for value in old.unique():  # whoever was together is together
        assert len(new[old == value].unique()) == 1
    assert torch.equal(new == 0, old == 0)
    assert not torch.equal(new, old)
    assert not torch.equal(trained[3].weight, start[3].weight)  # type: ignore[arg-type]


def test_exempt_weights_keep_their_zeros_in_the_fit(model: nn.Module) -> None:
    zeros = model[0].weight == 0  # type: ignore[union-attr, index]
    run(Share(3, fit=TRAINING, exempt=["0"]), model, 4)
    assert torch.equal(model[0].weight == 0, zeros)  # type: ignore[union-attr, index]


def test_it_can_be_entered_again_from_its_start(model: nn.Module) -> None:
    start = copy.deepcopy(model)
    Share(4, fit=TRAINING).enter(model, WORLD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    Share(4, fit=TRAINING).enter(start, WORLD)
    start.load_state_dict(model.state_dict())
    x = torch.randn(4, 20)
    assert torch.equal(start(x), model(x))


def test_every_rank_takes_the_codebook_of_rank_0(model: nn.Module) -> None:
    class Follower(World):
        def broadcast(self, tensors: object) -> None:
            for tensor in tensors:  # type: ignore[attr-defined]
                if tensor.dtype == torch.int32:
                    tensor.clamp_(max=2)  # other codes, and fewer values than here
                elif tensor.ndim == 1:
                    tensor.fill_(torch.nan)[:2] = torch.tensor([-1.5, 2.5])

    phase = Share(4, fit=FitConfig())
    phase.enter(model, Follower.single(torch.device("cpu")))
    phase.leave(model)
    for places in weights(model).values():
        assert set(places[0].value.unique().tolist()) <= {-1.5, 0.0, 2.5}


def test_a_recurrent_matrix_with_its_gates_and_a_tied_weight_are_one_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Embedding(9, 5)
            self.lstm = nn.LSTM(5, 5)
            self.decoder = nn.Linear(5, 9)
            self.decoder.weight = self.encoder.weight

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.decoder(self.lstm(self.encoder(x))[0])
            return output

    net = Net()
    phase = Share(2, fit=TRAINING, init="density")
    phase.enter(net, WORLD)
    biases = sum(p.numel() for n, p in net.named_parameters() if "bias" in n)
    assert counts(net).learnable == 3 * 4 + biases
    net(torch.randint(9, (4, 2))).sum().backward()
    phase.leave(net)
    assert net.decoder.weight is net.encoder.weight
    assert set(distinct(net).values()) == {4}


# --- what comes after ---


def test_retrain_keeps_sharing_if_set(model: nn.Module) -> None:
    Share(3, fit=FitConfig(), init="density").enter(model, WORLD)
    Share(3, fit=FitConfig()).leave(model)
    shared = copy.deepcopy(model)
    phase = Retrain(fit=TRAINING, keep=["zeros", "sharing"])
    phase.enter(model, WORLD)
    assert counts(model).learnable == 8 + 30 + 60 + 8 + 10
    phase.leave(model)
    assert torch.equal(model[0].weight, shared[0].weight)  # type: ignore[union-attr, index]
    run(phase, model, 3)
    assert list(distinct(model).values()) == [8, 8]
    zeros = shared[0].weight == 0  # type: ignore[union-attr, index]
    assert torch.equal(model[0].weight == 0, zeros)  # type: ignore[union-attr, index]
    run(Retrain(fit=TRAINING), model, 3)
    assert min(distinct(model).values()) > 100
    assert torch.equal(model[0].weight == 0, zeros)  # type: ignore[union-attr, index]


def test_training_that_would_destroy_the_sharing_is_refused() -> None:
    share = Share(4, fit=FitConfig())
    with pytest.raises(ConfigError, match=r"'after' \(retrain\) would destroy the sharing made by"):
        check_order({"share": share, "after": Retrain(fit=TRAINING)})
    check_order({"share": share, "after": Retrain(fit=TRAINING, keep=["zeros", "sharing"])})
    check_order({"share": share, "after": Share(3, fit=TRAINING)})
    with pytest.raises(ConfigError, match="keep=values: it must be one of zeros, sharing"):
        Retrain(fit=TRAINING, keep=["values"])
