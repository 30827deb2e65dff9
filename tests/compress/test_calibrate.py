"""Quantization without training: ranges, weights and biases of each layer."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.calibrate import calibrate
from trainer.compress.quantize import INPUT, ActivationQuantizer, WeightQuantizer, attach
from trainer.compress.select import weights

NEAREST = {"second_order": False, "correct_bias": False}


def quantized(model: nn.Module, x: Tensor, bits: int = 3, **settings: object) -> nn.Module:
    """A copy of a model, calibrated."""
    model = copy.deepcopy(model)
    places = weights(model)
    quantizers = {}
    for name, found in places.items():
        quantizers[name] = WeightQuantizer(bits, len(found[0].value))
        attach(found[0].module, "weight", quantizers[name])
        attach(found[0].module, INPUT, ActivationQuantizer(8))
    calibrate(model, places, quantizers, x.split(16), **settings)  # type: ignore[arg-type]
    for name, found in places.items():
        value = found[0].value.detach()
        found[0].module._parameters["weight"] = nn.Parameter(quantizers[name](value))
    return model


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(24, 5), (96, 24)),
        (lambda: nn.Linear(24, 5), (96, 4, 24)),
        (lambda: nn.Conv1d(16, 6, 3, stride=2, dilation=2, padding=1), (96, 16, 12)),
        (lambda: nn.Conv2d(16, 6, (3, 2), groups=2), (96, 16, 5, 6)),
        (lambda: nn.Conv2d(16, 8, 3, groups=4, padding=1, padding_mode="reflect"), (96, 16, 5, 5)),
        (lambda: nn.Conv3d(8, 4, 2), (96, 8, 3, 3, 3)),
    ],
)
def test_a_layer_keeps_its_mean_output_and_changes_less(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = make()
    features = -1 if isinstance(layer, nn.Linear) else 1
    x = torch.randn(shape).movedim(features, -1) + 0.5
    x = (x @ torch.randn(x.shape[-1], x.shape[-1])).movedim(-1, features)
    with torch.no_grad():
        exact = layer(x)
        second, nearest = (
            quantized(layer, x, second_order=on, ranges="minmax") for on in (True, False)
        )
        error, before = ((net(x) - exact).norm() for net in (second, nearest))
    assert error < 0.95 * before
    means = [y.movedim(features, 0).flatten(1).mean(1) for y in (second(x), nearest(x), exact)]
    for mean in means[:2]:
        torch.testing.assert_close(mean, means[2], atol=0.02, rtol=0.02)


class Standardized(nn.Conv2d):
    """Computes with a weight of mean 0 and variance 1 for each filter, as ResNetV2 in timm."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@torch.no_grad()
def test_layers_that_compute_with_another_weight_keep_their_bias() -> None:
    torch.manual_seed(0)
    layer, x = Standardized(3, 4, 3), torch.rand(32, 3, 6, 6)
    found = quantized(layer, x, bits=8)
    torch.testing.assert_close(found.bias, layer.bias, atol=0, rtol=0)
    torch.testing.assert_close(found(x), layer(x), atol=0.1, rtol=0)


@torch.no_grad()
def test_later_layers_make_up_for_earlier_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5) @ torch.randn(5, 12)
    net = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    exact = net(x)
    errors = [
        float((quantized(net, x, **settings)(x) - exact).norm() / exact.norm())  # type: ignore[arg-type]
        for settings in (
            {},
            {"second_order": False},
            {"second_order": False, "correct_bias": False},
        )
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[2]


@pytest.mark.parametrize(("settings", "calls"), [({}, 8), (NEAREST, 2)], ids=["all", "nearest"])
def test_rounding_to_the_nearest_value_needs_no_pass_for_each_layer(
    settings: dict[str, bool], calls: int
) -> None:
    seen: list[int] = []
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    net.register_forward_pre_hook(lambda *_: seen.append(1))
    found = quantized(net, torch.randn(32, 4), **settings)  # two batches
    assert len(seen) == calls
    for layer in (net[0], net[2], net[4]):
        assert layer.weight.unique().numel() > 8
    for layer in (found[0], found[2], found[4]):  # type: ignore[index]
        assert all(row.unique().numel() <= 8 for row in layer.weight)


def test_ranges() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 4).relu()
    x[7, 2] = 100.0
    layer = nn.Linear(4, 3)
    found = {
        kind: quantized(layer, x, ranges=kind).input_quantizer.range  # type: ignore[union-attr]
        for kind in ("minmax", "percentile", "mse")
    }
    assert found["minmax"].tolist() == [0.0, 100.0]
    assert 3.0 < float(found["percentile"][1]) < 6.0  # type: ignore[index]
    assert float(found["mse"][1]) <= 100.0  # type: ignore[index]
    x[7, 2] = 3.0
    (low, high) = quantized(layer, x.mul_(-1), ranges="mse").input_quantizer.range  # type: ignore
    assert high == 0
    assert -5.0 < float(low) < -3.0
