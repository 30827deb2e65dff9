"""The phase entropy: the trained model, and the effect of lambda on its size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.entropy import entropy_coded
from trainer.engine.objective import Penalized, Supervised
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.experiment import check_order
from trainer.phases import EntropyPenalty, Prune, Retrain, Share
from trainer.tasks import Classification

WORLD = World.single(torch.device("cpu"))
STEPS = 60


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


def train(phase: EntropyPenalty, model: nn.Module) -> list[float]:
    """Train on labels that the first inputs decide; returns lambda after each step."""
    torch.manual_seed(1)
    inputs = torch.randn(256, 20)
    targets = inputs[:, :4].argmax(1)
    objective = Penalized(Supervised(Classification()), phase.penalty)
    phase.enter(model, WORLD)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    weights = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        objective(model, inputs, targets, len(targets)).backward()
        optimizer.step()
        phase.after_step(model, WORLD, step, STEPS)
        weights.append(next(float(coded.weight) for coded, _ in entropy_coded(model)))
    phase.leave(model)
    return weights


def size(model: nn.Module) -> int:
    return len(artifact.encode(model.state_dict()))


def test_a_larger_weight_of_the_size_makes_the_file_smaller() -> None:
    sizes, errors = [], []
    for weight in (0.0, 1.0, 10.0):
        model = make_model()
        train(EntropyPenalty(weight, vectors=True, epochs=1), model)
        sizes.append(size(model))
        inputs = torch.randn(500, 20)
        errors.append(float((model(inputs).argmax(1) != inputs[:, :4].argmax(1)).float().mean()))
    assert sizes[0] > 1.3 * sizes[1] > 1.6 * sizes[2]
    assert errors[1] < 0.25


def test_what_it_leaves_is_plain_and_written_as_integers_times_a_step() -> None:
    model = make_model()
    train(EntropyPenalty(1.0, vectors=True, epochs=1), model)
    assert list(model.state_dict()) == list(make_model().state_dict())
    content = artifact.encode(model.state_dict())
    decoded = artifact.loads(content)
    for name, tensor in model.state_dict().items():
        assert torch.equal(decoded[name], tensor)
        assert not bool((tensor.view(torch.int32) == -(1 << 31)).any())  # minus zero
    kinds = {layer["name"]: layer["kind"] for layer in artifact.describe(content).layers}
    assert kinds["0.weight"] == kinds["2.weight"] == "uniform"


def test_lambda_grows_along_the_ramp() -> None:
    weights = train(EntropyPenalty(8.0, ramp=0.5, epochs=1), make_model())
    assert weights[14] == pytest.approx(0.5e-3)
    assert weights[29] == weights[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize(("target", "grows"), [(10, True), (100_000, False)])
def test_lambda_follows_the_size_of_the_file(target: int, grows: bool) -> None:
    weights = train(EntropyPenalty(1.0, bytes=target, epochs=1), make_model())
    assert sorted(weights, reverse=not grows) == weights
    assert (weights[-1] > 2 / 8000) == grows
    assert (weights[-1] < 0.5 / 8000) != grows


def test_a_file_may_be_larger_than_the_target_at_first() -> None:
    at_once = train(EntropyPenalty(1.0, bytes=300, ramp=0.0, epochs=1), make_model())
    later = train(EntropyPenalty(1.0, bytes=300, ramp=0.5, epochs=1), make_model())
    assert later[4] < at_once[4]
    assert later[4] < later[-1]


def test_pruned_weights_stay_zero_unless_they_may_grow_back() -> None:
    for keep in (["zeros"], []):
        model = make_model()
        prune = Prune(0.8)
        prune.enter(model, WORLD)
        prune.leave(model)
        pruned = model[0].weight == 0
        train(EntropyPenalty(0.0, keep=keep, epochs=1), model)
        assert bool((model[0].weight[pruned] == 0).all()) == bool(keep)


def test_units_end_up_sorted_and_the_model_computes_the_same() -> None:
    models = []
    for sort in (False, True):
        model, inputs = make_model(), torch.randn(9, 20)
        phase = EntropyPenalty(1.0, sort_units=sort, epochs=1)
        assert phase.samples == 2 * sort
        if sort:
            phase.observe(model, WORLD, [inputs])
        train(phase, model)
        models.append(model)
    assert torch.allclose(models[0](inputs), models[1](inputs), atol=1e-5)
    full = models[1][0].weight.count_nonzero(1) + models[1][2].weight.count_nonzero(0)
    full += models[1][0].bias.count_nonzero() // 30
    assert full.tolist() == sorted(full.tolist(), reverse=True)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_orders_that_would_destroy_something_are_refused() -> None:
    phase = EntropyPenalty(epochs=1)
    check_order({"prune": Prune(0.5), "entropy": phase})
    check_order({"entropy": phase, "retrain": Retrain(["zeros", "sharing"], epochs=1)})
    with pytest.raises(ConfigError, match=r"'entropy' .* destroy the sharing made by 'share'"):
        check_order({"share": Share(), "entropy": phase})
    with pytest.raises(ConfigError, match=r"destroy the zeros made by 'prune'"):
        check_order({"prune": Prune(0.5), "entropy": replace(phase, keep=[])})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size_weight": -1.0}, "size_weight=-1.0: it must be at least 0"),
        ({"bytes": 3000, "size_weight": 0.0}, "bytes=3000 with size_weight=0: .* above 0"),
        ({"refresh": 0}, "refresh=0"),
        ({"keep": ["sharing"]}, "keep=sharing: it must be one of zeros"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EntropyPenalty(**settings)  # type: ignore[arg-type]


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="'fc9' matches no weight"):
        EntropyPenalty(exempt=["fc9"]).check_model(make_model())


def test_a_penalty_counts_once_whatever_the_share_of_a_batch() -> None:
    model = make_model()
    penalized = Penalized(
        Supervised(Classification()), lambda model: model[0].weight.square().sum()
    )
    inputs, targets = torch.randn(6, 20), torch.zeros(6, dtype=torch.long)

    def loss(rows: slice) -> Tensor:
        return penalized(model, inputs[rows], targets[rows], len(targets[rows]))

    parts = loss(slice(0, 2)) * 2 / 6 + loss(slice(2, 6)) * 4 / 6  # as trainer.engine.loop weights
    assert torch.allclose(parts, loss(slice(0, 6)))
