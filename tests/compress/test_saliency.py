"""Pruning by the inputs of layers: which weights stay, and how much outputs change."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer.compress import layer_inputs
from trainer.compress.masks import largest
from trainer.compress.saliency import Target, magnitude_mask, prune_by_inputs
from trainer.compress.select import weights


def pruned(model: nn.Module, x: Tensor, target: Target, saliency: str) -> nn.Module:
    """A copy of a model, pruned; a target in [0, 1) is a fraction."""
    model = copy.deepcopy(model)
    places = weights(model)
    prune_by_inputs(model, places, dict.fromkeys(places, target), x.split(16), saliency)
    return model


def correlated(*shape: int) -> Tensor:
    """Inputs [n, features, ...] of which a few directions explain most, and some are larger."""
    torch.manual_seed(0)
    x = torch.randn(*shape).movedim(1, -1)
    x = x @ torch.randn(shape[1], 3) @ torch.randn(3, shape[1]) + 0.3 * x
    return (x * torch.linspace(0.1, 3, shape[1])).movedim(-1, 1)


def test_wanda_keeps_the_same_number_for_each_output() -> None:
    x = correlated(64, 24)
    layer = nn.Linear(24, 5)
    found = pruned(layer, x, 52, "wanda").weight.detach()
    assert found.count_nonzero(1).sort().values.tolist() == [10, 10, 10, 11, 11]
    score = layer.weight.detach().abs() * x.norm(dim=0)
    for row, scores in zip(found, score, strict=True):
        assert scores[row != 0].min() > scores[row == 0].max()
    assert torch.equal(found[found != 0], layer.weight.detach()[found != 0])


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(24, 10), (96, 24)),
        (lambda: nn.Conv2d(16, 8, 3, groups=2, padding=1), (64, 16, 6, 6)),
        (lambda: nn.Conv1d(140, 6, 2).bfloat16(), (200, 140, 5)),  # errors of several blocks
    ],
)
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_outputs_change_less_than_by_magnitude(
    build: Callable[[], nn.Module], shape: tuple[int, ...], pattern: tuple[int, int] | None
) -> None:
    x = correlated(*shape)
    layer = build()
    x = x.to(layer.weight.dtype)
    total = layer.weight.numel()
    target = pattern or total // 2
    with torch.no_grad():
        exact = layer(x)
        errors = []
        for saliency in ("wanda", "sparsegpt"):
            net = pruned(layer, x, target, saliency)
            assert net.weight.count_nonzero() == total // 2
            if pattern:
                groups = net.weight.movedim(1, -1).unflatten(-1, (-1, 4))
                assert bool((groups.count_nonzero(-1) == 2).all())
            errors.append((net(x) - exact).float().norm())
        by_magnitude = copy.deepcopy(layer)
        by_magnitude.weight *= magnitude_mask(layer.weight, target)
        error = (by_magnitude(x) - exact).float().norm()
    assert errors[1] < 0.8 * errors[0] < 0.8 * error


def test_a_pattern_holds_where_the_columns_take_several_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layer_inputs, "_MAX_COLUMNS", 40)
    layer, x = nn.Conv2d(15, 4, 3), correlated(8, 15, 5, 5)
    found = pruned(layer, x, (1, 3), "sparsegpt").weight.detach()
    assert bool((found.movedim(1, -1).unflatten(-1, (-1, 3)).count_nonzero(-1) == 1).all())


def test_zeros_stay_and_layers_without_inputs_of_their_own_are_pruned_by_magnitude() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    net.register_module("unused", nn.Linear(6, 6))
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))  # type: ignore[method-assign]
    with torch.no_grad():
        net[1].weight[:, :2] = 0
    tokens = torch.randint(9, (40, 3))
    found = weights(pruned(net, tokens, 20, "sparsegpt"))
    counts = {name: int(places[0].value.count_nonzero()) for name, places in found.items()}
    assert counts == {"0.weight": 20, "1.weight": 20, "3.weight": 20, "unused.weight": 20}
    assert not found["1.weight"][0].value[:, :2].any()
    for name, module in (("0.weight", net[0]), ("unused.weight", net.unused)):
        assert torch.equal(found[name][0].value != 0, largest(module.weight, 20))


def test_weights_of_inputs_that_are_always_zero_go_first() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 8), 0.03 * torch.randn(64, 20)
    x[:, 10:] = 0
    with torch.no_grad():
        found = pruned(layer, x, 80, "sparsegpt")
        error = (found(x) - layer(x)).norm() / (layer(x) - layer.bias).norm()
    assert error < 0.1


def test_a_transformer_is_pruned_by_padded_inputs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    padding = torch.tensor([[False, False, True]]).expand(4, 3)
    inputs = {"src": torch.randn(4, 3, 8), "src_key_padding_mask": padding}
    places = weights(model)
    halves: dict[str, Target] = {
        name: found[0].value.numel() // 2 for name, found in places.items()
    }
    prune_by_inputs(model, places, halves, [inputs], "wanda")
    for found in places.values():
        assert int((found[0].value == 0).sum()) == found[0].value.numel() // 2
    assert torch.backends.mha.get_fastpath_enabled()


class OneByOne(nn.Module):
    """Calls its layer with each sample, without a dimension for samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(sample) for sample in x])


@pytest.mark.parametrize(
    ("build", "shape"),
    [(lambda: nn.Linear(24, 10), (64, 24)), (lambda: nn.Conv2d(16, 8, 3), (16, 16, 10, 10))],
)
def test_layers_may_be_called_without_a_dimension_for_samples(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    x = correlated(*shape)  # seeds the weights
    layer = build()
    found = pruned(OneByOne(layer), x, 100, "wanda").state_dict()
    expected = pruned(nn.Sequential(layer), x, 100, "wanda").state_dict()
    for actual, wanted in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(actual, wanted)
