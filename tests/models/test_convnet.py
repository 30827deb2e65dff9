"""The network that sweeps search: drawn settings work, or are refused with a reason."""

import pytest
import torch

from trainer.models import ConvNet
from trainer.models.convnet import pooled_layers


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("depth", range(1, 7))
def test_every_likely_combination_works_on_mnist(depth: int, kernel_size: int) -> None:
    with torch.device("meta"):
        model = ConvNet(depth, kernel_size, width=8)
        assert model(torch.empty(2, 1, 28, 28)).shape == (2, 10)


def test_one_value_per_layer() -> None:
    model = ConvNet(3, [7, 5, 3], [4, 6, 8], hidden=11, in_channels=3, image_size=32, classes=5)
    convolutions = [m for m in model.features if isinstance(m, torch.nn.Conv2d)]
    assert [c.kernel_size for c in convolutions] == [(7, 7), (5, 5), (3, 3)]
    assert [c.out_channels for c in convolutions] == [4, 6, 8]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("depth", "image_size", "pooled"),
    [
        (1, 28, [1]),
        (3, 28, [1, 1, 1]),
        (4, 28, [0, 1, 1, 1]),
        (5, 28, [0, 1, 0, 1, 1]),
        (6, 28, [0, 1, 0, 1, 0, 1]),
        (2, 5, [0, 0]),
        (2, 6, [0, 1]),
    ],
)
def test_pools_are_spread_evenly(depth: int, image_size: int, pooled: list[int]) -> None:
    assert list(pooled_layers(depth, image_size)) == [bool(p) for p in pooled]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth=0: it must be at least 1"),
        ({"classes": 0}, "classes=0: it must be at least 1"),
        ({"image_size": 0}, "image_size=0: it must be at least 1"),
        ({"kernel_size": [3, 3, 3]}, r"kernel_size=\[3, 3, 3\]: give one value, or one per layer"),
        ({"width": [8]}, r"width=\[8\]: give one value, or one per layer"),
        ({"width": 0}, r"width=\[0, 0\]: every value must be a whole number"),
        ({"width": [8, 2.5]}, "every value must be a whole number"),
        ({"kernel_size": 4}, "kernel_size=4 in layer 1: it must be odd"),
        ({"kernel_size": [5, 29]}, "kernel_size=29 in layer 2: its input is only 14x14"),
    ],
)
def test_refuses_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNet(**{"depth": 2, **settings})
