"""Rounding by the inputs of a layer: on the grid, and better for its outputs."""

import pytest
import torch
from torch import nn

from trainer.compress.layer_inputs import LayerStatistics
from trainer.compress.quantize import WeightQuantizer
from trainer.compress.second_order import inverse_factor, round_second_order


def correlated(columns: int, count: int = 400) -> torch.Tensor:
    """Inputs [count, columns] of which a few directions explain most."""
    return torch.randn(count, 6) @ torch.randn(6, columns) + 0.1 * torch.randn(count, columns)


def test_outputs_change_less_than_with_the_nearest_values() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 200), correlated(200)  # more columns than one block
    weight[:, ::3] = 0
    quantizer = WeightQuantizer(3, 8)
    quantizer.calibrate(weight)
    scale = quantizer.scale[:, None]
    rounded = round_second_order(weight, (x.t() @ x).double(), scale, quantizer.max_integer)
    assert torch.equal(quantizer(rounded), rounded)
    assert not rounded[weight == 0].any()
    exact, nearest = x @ weight.t(), x @ quantizer(weight).t()
    error, before = (x @ rounded.t() - exact).norm(), (nearest - exact).norm()
    assert error < 0.35 * before


@pytest.mark.parametrize("size", [1, 7, 256, 700])
def test_the_factor_of_the_inverse(size: int) -> None:
    inputs = torch.randn(size + 20, size, generator=torch.Generator().manual_seed(0)).double()
    matrix = inputs.T @ inputs + torch.eye(size)
    factor = inverse_factor(matrix)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor @ matrix, torch.eye(size).double())


def test_uncorrelated_inputs_and_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(4, 10), torch.tensor(0.25)
    nearest = (weight / scale).round().clamp(-7, 7) * scale
    for gram in (torch.eye(10), torch.zeros(10, 10)):
        assert torch.equal(round_second_order(weight, gram.double(), scale, 7), nearest)


@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3])
def test_inputs_that_hardly_vary(spread: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    statistics = LayerStatistics(layer, products=True, together=1)
    statistics.add(3 + 10 * torch.rand(16) + spread * torch.randn(60, 16))
    statistics.center()
    weight = layer.weight.detach().clone()
    statistics.replace(
        weight, lambda block, gram, _: round_second_order(block, gram, torch.tensor(0.1), 7)
    )
    assert bool(((weight - layer.weight).abs() < 1).all())


@pytest.mark.parametrize("centered", [False, True])
def test_the_products_of_inputs_are_summed(centered: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 2), 2 + torch.randn(50, 6)
    statistics = LayerStatistics(layer, products=True, together=1)
    for part in (x[:0], x[:20], x[20:]):  # a layer may get no input, as an expert of a mixture
        statistics.add(part)
    exact = x.double()
    if centered:
        statistics.center()
        exact = exact - exact.mean(0)
    found = []
    statistics.replace(layer.weight.detach(), lambda block, gram, _: found.append(gram) or block)
    torch.testing.assert_close(found[0], exact.t() @ exact, rtol=1e-5, atol=1e-4)
