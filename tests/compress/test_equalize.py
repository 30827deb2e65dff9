"""Cross-layer equalization: which pairs are found, and that outputs stay."""

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.equalize import equalize
from trainer.compress.quantize import WeightQuantizer
from trainer.compress.select import weights
from trainer.models import ResNetCifar


class Depthwise(nn.Module):
    """The block of a MobileNet, with a second reader of its hidden channels."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.project, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x).relu()).relu()
        x = self.project(x).relu() + self.other(x)
        y: Tensor = self.fc(nn.functional.max_pool2d(x, 2).flatten(1))
        return y


def linear(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 5))


@pytest.mark.parametrize(
    ("model", "shape", "pairs"),
    [
        (linear(nn.ReLU()), (6,), 1),
        (linear(nn.LeakyReLU(0.1)), (6,), 1),
        (linear(nn.Identity()), (6,), 1),
        (linear(nn.GELU()), (6,), 0),
        (linear(nn.ReLU6()), (6,), 0),
        (linear(nn.LayerNorm(12)), (6,), 0),
        (Depthwise(), (3, 6, 6), 2),  # two layers compute the summands: not the inputs of fc
        (ResNetCifar(8, in_channels=3), (3, 8, 8), 0),  # batch norm is not folded
    ],
)
@torch.no_grad()
def test_pairs_are_found_and_outputs_stay(
    model: nn.Module, shape: tuple[int, ...], pairs: int
) -> None:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    x = torch.randn(1, *shape)
    found = weights(model)
    for places in found.values():
        value = places[0].value
        value.mul_(torch.randn(len(value), *[1] * (value.ndim - 1)).exp())
    before = {name: places[0].value.clone() for name, places in found.items()}
    expected = model.eval()(x)
    assert equalize(model, x, found) == pairs
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    changed = [
        name for name, value in before.items() if not torch.equal(value, found[name][0].value)
    ]
    assert bool(changed) == bool(pairs)
    assert equalize(model, x, ()) == 0


@torch.no_grad()
def test_both_layers_have_the_same_size_and_round_with_less_error() -> None:
    torch.manual_seed(0)
    model, x = linear(nn.ReLU()), torch.randn(64, 6)
    factors = torch.logspace(-2, 2, 12)
    model[0].weight *= factors.unsqueeze(1)
    model[0].bias *= factors
    model[2].weight /= factors
    model[0].weight[5] = 0  # nothing to equalize
    model[2].weight[:, 6:8] = 0

    def error() -> float:
        net = linear(nn.ReLU())
        net.load_state_dict(model.state_dict())
        for layer in (net[0], net[2]):
            quantizer = WeightQuantizer(4)
            quantizer.calibrate(layer.weight)
            layer.weight.copy_(quantizer(layer.weight))
        return float((net(x) - model(x)).norm() / model(x).norm())

    before = error()
    assert equalize(model, x, ["0.weight", "2.weight"]) == 1
    sizes = model[0].weight.abs().amax(1), model[2].weight.abs().amax(0)
    clear = (sizes[0] > 0) & (sizes[1] > 0)
    assert int(clear.sum()) == 9
    torch.testing.assert_close(sizes[0][clear], sizes[1][clear])
    assert error() < 0.5 * before
