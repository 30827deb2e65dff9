"""Rounding by the inputs of a layer: on the grid, and better for its outputs."""

import torch

from trainer.compress.quantize import WeightQuantizer
from trainer.compress.second_order import round_second_order


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


def test_uncorrelated_inputs_and_inputs_that_are_always_zero() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(4, 10), torch.tensor(0.25)
    nearest = (weight / scale).round().clamp(-7, 7) * scale
    for gram in (torch.eye(10), torch.zeros(10, 10)):
        assert torch.equal(round_second_order(weight, gram.double(), scale, 7), nearest)
