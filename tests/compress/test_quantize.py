"""Grids of quantizers: their values and errors; they preserve zeros, clusters and gradients."""

import copy

import pytest
import torch
from torch import nn

from trainer.compress.quantize import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    attach,
    detach_unused,
)
from trainer.errors import Diverged


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
    assert steps.abs().max() <= quantizer.max_integer + 1e-4
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


def test_a_faint_channel_has_no_tiny_scale() -> None:
    weight = torch.ones(4, 5) * torch.tensor([[1.0], [1e-2], [1e-9], [0.0]])
    quantizer = WeightQuantizer(8, 4)
    quantizer.calibrate(weight)
    largest = 1 / 127
    torch.testing.assert_close(quantizer.scale, largest * torch.tensor([1, 1e-2, 1e-4, 1e-4]))
    quantizer.calibrate(torch.zeros(4, 5))
    assert quantizer.scale.tolist() == [1, 1, 1, 1]


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


def test_activations_are_noted_and_left_until_there_is_a_range() -> None:
    quantizer = ActivationQuantizer(8)
    x = torch.linspace(-1, 3, 100)
    assert torch.equal(quantizer(x), x)
    assert quantizer.seen.tolist() == [-1, 3]
    quantizer(x * 2)
    assert quantizer.seen.tolist() == [-2, 6]  # of all that it saw since it was asked
    quantizer.update_range(torch.zeros(2), 0.1)  # of zeros alone: still no range
    assert torch.equal(quantizer(x * 2), x * 2)
    quantizer.update_range(quantizer.seen.clone(), 0.1)
    assert quantizer.range.tolist() == [-2, 6]
    assert quantizer.seen.isnan().all()
    assert torch.allclose(quantizer(x), x, atol=8 / 255 / 2 + 1e-6)
    quantizer.update_range(torch.tensor([torch.nan, torch.nan]), 0.1)
    quantizer.update_range(torch.tensor([-1.0, 7.0]), 0.5)
    assert quantizer.range.tolist() == [-1.5, 6.5]
    quantizer.update_range(torch.tensor([0.0, 1.0]), 1.0)
    quantizer.update_range(torch.tensor([torch.nan, 1.0]), 1.0)
    quantizer(x * 2)
    clipped = quantizer.eval()(torch.tensor([-5.0, 0.5, 5.0]))
    assert torch.allclose(clipped, torch.tensor([0, 0.5, 1]), atol=1 / 255)
    assert quantizer.seen.tolist() == [-2, 6]
    assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_leaves_the_range_alone(odd: float) -> None:
    quantizer = ActivationQuantizer(8)
    quantizer(torch.tensor([-1.0, odd, 2.0]))
    assert not quantizer.seen.isinf().any()
    assert not (quantizer.seen.abs() > 2).any()
    quantizer.update_range(quantizer.seen.clone(), 0.1)
    assert not quantizer.ready
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer.update_range(quantizer.seen.clone(), 0.1)
    assert quantizer.ready
    quantizer(torch.tensor([-1.0, odd, 2.0]))
    quantizer.update_range(quantizer.seen.clone(), 0.1)
    assert quantizer.range.tolist() == [-1, 2]


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite_is_not_hidden(odd: float, training: bool) -> None:
    """Fake quantization itself makes NaN the smallest value of the grid."""
    x = torch.tensor([[-1.0, odd, 2.0], [1.0, 1.0, 1.0]], requires_grad=True)
    activations = ActivationQuantizer(8)
    activations.update_range(torch.tensor([-1.0, 2.0]), 0.1)
    activations.train(training)
    for quantizer in (activations, WeightQuantizer(8), WeightQuantizer(8, channels=2)):
        quantized = quantizer(x)
        assert quantized.isnan().tolist() == [[False, True, False], [False] * 3]
        assert torch.autograd.grad(quantized[1].sum(), x)[0][1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
@pytest.mark.parametrize("channels", [None, 2])
def test_no_scale_is_found_for_weights_that_diverged(odd: float, channels: int | None) -> None:
    with pytest.raises(Diverged, match="training before the quantization diverged"):
        WeightQuantizer(8, channels).calibrate(torch.tensor([[1.0, odd], [2.0, 3.0]]))


def test_positive_numbers_alone_still_have_zero_on_the_grid() -> None:
    quantizer = ActivationQuantizer(4)
    numbers = torch.tensor([3.0, 4.0])
    quantizer(numbers)
    assert quantizer.seen.tolist() == [0, 4]
    quantizer.update_range(quantizer.seen.clone(), 0.1)
    assert quantizer(numbers)[1] == 4


def test_a_range_is_loaded() -> None:
    source, target = ActivationQuantizer(8), ActivationQuantizer(8)
    target.load_state_dict(source.state_dict())
    assert not target.ready
    source.update_range(torch.tensor([-1.0, 1.0]), 0.1)
    target.load_state_dict(source.state_dict())
    x = torch.randn(9)
    assert torch.equal(target.eval()(x), source.eval()(x))
    assert not torch.equal(target(x), x)


def test_what_is_never_used_or_always_zero_is_not_quantized() -> None:
    attention = nn.MultiheadAttention(4, 2)  # its out_proj is never called: only its weight is used
    model = nn.ModuleDict(
        {"attention": attention, "idle": nn.Linear(4, 4), "used": nn.Linear(4, 4)}
    )
    for layer in (attention.out_proj, model["idle"], model["used"]):
        attach(layer, "input", ActivationQuantizer(8))
        attach(layer, "output", ActivationQuantizer(8))
    x = torch.randn(3, 4)
    attention(x, x, x)
    model["idle"](torch.zeros(3, 4))
    model["used"](x)
    for quantizer in activation_quantizers(model):
        quantizer.update_range(quantizer.seen.clone(), 0.1)
    model = copy.deepcopy(model)
    detach_unused(model)
    assert not [name for name in model.state_dict() if "attention" in name and "quantizer" in name]
    assert [name for name in model.state_dict() if "idle" in name and "range" in name] == [
        "idle.output_quantizer.range"
    ]
    assert len(activation_quantizers(model["used"])) == 2
    expected = nn.functional.linear(x, model["idle"].weight, model["idle"].bias)
    made = model["idle"].eval()(x)
    assert torch.equal(made, model["idle"].output_quantizer(expected))


def test_an_input_may_be_given_by_name() -> None:
    layer = nn.Linear(2, 2)
    attach(layer, "input", ActivationQuantizer(2))
    x = torch.tensor([[0.0, 3.0], [1.4, 2.6]])
    layer(input=x)
    assert layer.input_quantizer.seen.tolist() == [0, 3]
    layer.input_quantizer.update_range(layer.input_quantizer.seen.clone(), 0.1)
    assert torch.equal(layer(input=x), layer(x))
    assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_bits_are_loaded_with_the_grid() -> None:
    source, target = WeightQuantizer(3), WeightQuantizer(8)
    target.load_state_dict(source.state_dict())
    assert target.bits == 3
    assert target.max_integer == 3
    with pytest.raises(ValueError, match="bits=9: it must be 2 to 8"):
        WeightQuantizer(9)


def test_inputs_and_outputs_of_a_layer_are_quantized() -> None:
    layer = nn.Linear(2, 2)
    for kind in ("input", "output"):
        attach(layer, kind, ActivationQuantizer(2))
    x = torch.tensor([[0.0, 3.0], [1.4, 2.6]])
    for _ in range(2):  # the range of the outputs follows that of inputs on their grid
        layer(x)
        for quantizer in activation_quantizers(layer):
            quantizer.update_range(quantizer.seen.clone(), 1.0)
    made = layer(x)
    steps = made.unique()
    assert len(steps) <= 4
    expected = nn.functional.linear(torch.tensor([[0.0, 3], [1, 3]]), layer.weight, layer.bias)
    low, high = layer.output_quantizer.seen
    assert torch.allclose(made, expected, atol=float(high - low) / 3 / 2 + 1e-6)
