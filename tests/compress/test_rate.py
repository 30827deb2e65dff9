"""The modelled size of integers, compared with the coder's, and its gradients."""

import pytest
import torch
from torch import Tensor

from trainer.compress.coding import encode_layer
from trainer.compress.entropy import EntropyCoded
from trainer.compress.parametrize import Packed
from trainer.compress.rate import rate_of


def integers(*shape: int, density: float, seed: int = 0) -> Tensor:
    """Whole numbers whose rows and columns are full to different degrees."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    full = density * 9 * rand(shape[0]).square()[:, None] * rand(*shape[1:]).flatten().square()
    size = 1 + torch.empty(shape).geometric_(0.6, generator=generator) // 2
    sign = rand(*shape).sub(0.5).sign()
    return size * sign * (rand(*shape) < full.reshape(shape))


@pytest.mark.parametrize(
    ("shape", "density"), [((200, 400), 0.02), ((300, 100), 0.1), ((30, 20, 5, 5), 0.05)]
)
def test_modelled_size_is_close_to_the_coded_one(shape: tuple[int, ...], density: float) -> None:
    values = integers(*shape, density=density)
    levels = values + values.min().abs() + (values < 0)
    levels[values == 0] = 0
    below, above = int(-values.min()), int(values.max())
    coded = 8 * len(encode_layer(levels.int().numpy(), shape, below + above, below))
    assert float(rate_of(values).total) == pytest.approx(coded, rel=0.2)


def test_a_weight_costs_less_where_its_row_column_and_kernel_are_full() -> None:
    values = torch.zeros(20, 30)
    values[3] = 1
    values[:, 4] = -1
    costs = rate_of(values).survivor
    assert costs[3, 4] < costs[3, 5] < costs[6, 5]
    assert costs[3, 4] < costs[6, 4] < costs[6, 5]
    kernels = torch.zeros(4, 5, 3, 3)
    kernels[2, 1, :2] = 1
    kernels[3, 0, 0, 0] = kernels[0, 4, 2, 2] = kernels[2, 3, 0, 0] = 1
    costs = rate_of(kernels).survivor
    assert costs[2, 1, 2, 2] < costs[2, 0, 2, 2]


@pytest.mark.parametrize("shape", [(1,), (6,), (3, 4), (2, 3, 2, 2)])
def test_empty_and_full_weights_have_finite_costs(shape: tuple[int, ...]) -> None:
    for values in (torch.zeros(shape), torch.ones(shape), torch.full(shape, -9.0)):
        rate = rate_of(values)
        assert rate.survivor.shape == shape
        assert bool(rate.survivor.isfinite().all())
        assert float(rate.survivor.min()) > 0
        assert float(rate.magnitude) > 0
        assert float(rate.total) >= 0


def interpolated(latent: Tensor, log_step: Tensor, coded: EntropyCoded) -> Tensor:
    """The costs between the two nearest integers, as torch differentiates them."""
    size = (latent / log_step.exp()).abs()
    return (coded.extra * size.clamp_max(1) + coded.magnitude * size).sum()


def test_gradients_of_the_size_are_those_of_interpolated_costs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 15)
    coded = EntropyCoded(weight, 0.7)
    latent = weight.clone().requires_grad_()
    coded.refresh(latent)
    bits = coded.bits(latent)
    assert float(bits.detach()) == float(rate_of((weight / 0.7).round()).total)
    inputs = latent, coded.log_step
    found = torch.autograd.grad(3 * bits, inputs)
    wanted = torch.autograd.grad(3 * interpolated(*inputs, coded), inputs)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4)


def test_weights_are_multiples_of_the_step_and_their_gradient_passes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 15)
    coded = EntropyCoded(weight, 0.5)
    latent = weight.clone().requires_grad_()
    made = coded(latent)
    assert torch.allclose(made, (weight / 0.5).round() * 0.5)
    gradient = torch.randn(12, 15)
    by_latent, by_step = torch.autograd.grad((made * gradient).sum(), (latent, coded.log_step))
    assert torch.equal(by_latent, gradient)
    # At integers that stay as they are, a weight is its integer times the step.
    integer = (weight / 0.5).round()
    assert float(by_step) == pytest.approx(float((gradient * (integer * 0.5 - weight)).sum()), 1e-4)


def test_what_another_compression_makes_is_rounded() -> None:
    weight = torch.tensor([[0.0, 1.2], [-0.9, 0.0]])
    coded = EntropyCoded(weight, 0.5, Packed(weight, weight != 0))
    trainable = coded.initial_trainable(weight).requires_grad_()
    assert trainable.shape == (2,)
    assert torch.equal(coded.integers(trainable), torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
    coded.refresh(trainable)
    (gradient,) = torch.autograd.grad(coded.bits(trainable), trainable)
    assert torch.equal(gradient.sign(), trainable.sign())
