"""Grids: what is on them, what they cost, and that they keep zeros, clusters and gradients."""

import pytest
import torch
from torch import nn

from trainer.compress.quantize import (
    ActivationQuantizer,
    WeightQuantizer,
    attach,
)


def on_grid(quantizer: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
    scale = quantizer.scale
    return weight / (scale.view(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("channels", [None, 6])
def test_a_weight_is_integers_times_a_scale(bits: int, channels: int | None) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(6, 3, 2, 2) * torch.tensor([0.01, 1, 1, 3, 1, 0]).view(6, 1, 1, 1)
    weight[1] = weight[1] * (torch.rand(3, 2, 2) > 0.5)
    quantizer = WeightQuantizer(bits, channels)
    quantizer.calibrate(weight)
    made = quantizer(weight)
    steps = on_grid(quantizer, made)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.abs().max() <= quantizer.most + 1e-4
    assert torch.equal(quantizer(made), made)  # what is on the grid stays
    assert bool((made[weight == 0] == 0).all())
    assert not bool((made.signbit() & (made == 0)).any())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_has_the_least_error_of_all_tried(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 500)
    quantizer = WeightQuantizer(bits)
    quantizer.calibrate(weight)
    least = (quantizer(weight) - weight).square().sum()
    for factor in (0.5, 0.8, 1.25, 2.0):
        other = WeightQuantizer(bits)
        other.scale.copy_(quantizer.scale * factor)
        assert (other(weight) - weight).square().sum() > least
    each = WeightQuantizer(bits, 4)
    each.calibrate(weight * torch.tensor([[0.1], [1], [1], [10]]))
    spread = each.scale / each.scale[1]
    assert 0.05 < spread[0] < 0.2
    assert 5 < spread[3] < 20


def test_equal_weights_stay_equal_with_one_scale() -> None:
    weight = torch.tensor([[0.5, -0.25, 0.5], [0.0, 0.5, -0.25]])
    quantizer = WeightQuantizer(8)
    quantizer.calibrate(weight)
    assert len(quantizer(weight).unique()) == 3


def test_the_gradient_passes_through_and_stops_beyond_the_grid() -> None:
    quantizer = WeightQuantizer(3)
    quantizer.scale.fill_(0.1)
    weight = torch.tensor([0.14, -0.29, 0.0, 0.5], requires_grad=True)
    made = quantizer(weight)
    assert torch.allclose(made, torch.tensor([0.1, -0.3, 0.0, 0.3]))
    made.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1, 1, 0]


def test_activations_take_the_range_of_the_batch_until_they_have_one() -> None:
    quantizer = ActivationQuantizer(8)
    x = torch.linspace(-1, 3, 100)
    assert torch.allclose(quantizer(x), x, atol=4 / 255 / 2 + 1e-6)
    assert quantizer.seen.tolist() == [-1, 3]
    quantizer(x * 2)
    assert quantizer.seen.tolist() == [-2, 6]  # of all that it saw since it was asked
    quantizer.range.copy_(torch.tensor([0.0, 1.0]))
    clipped = quantizer.eval()(torch.tensor([-5.0, 0.5, 5.0]))
    assert torch.allclose(clipped, torch.tensor([0, 0.5, 1]), atol=1 / 255)
    assert quantizer.seen.tolist() == [-2, 6]
    assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]


def test_positive_numbers_alone_still_have_zero_on_the_grid() -> None:
    quantizer = ActivationQuantizer(4)
    made = quantizer(torch.tensor([3.0, 4.0]))
    assert quantizer.seen.tolist() == [0, 4]
    assert made[1] == 4


def test_bits_are_loaded_with_the_grid() -> None:
    source, target = WeightQuantizer(3), WeightQuantizer(8)
    target.load_state_dict(source.state_dict())
    assert target.bits == 3
    assert target.most == 3
    with pytest.raises(ValueError, match="bits=9: it must be 2 to 8"):
        WeightQuantizer(9)


def test_inputs_and_outputs_of_a_layer_are_quantized() -> None:
    layer = nn.Linear(2, 2)
    for kind in ("input", "output"):
        attach(layer, kind, ActivationQuantizer(2))
    made = layer(torch.tensor([[0.0, 3.0], [1.4, 2.6]]))
    steps = made.unique()
    assert len(steps) <= 4
    expected = nn.functional.linear(torch.tensor([[0.0, 3], [1, 3]]), layer.weight, layer.bias)
    low, high = layer.output_quantizer.seen
    assert torch.allclose(made, expected, atol=float(high - low) / 3 / 2 + 1e-6)
