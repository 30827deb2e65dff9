"""Autocast and loss scaling on the CPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from trainer.engine.precision import Precision
from trainer.errors import Diverged

CPU = torch.device("cpu")


def learn(name, steps=40, clip=None):
    """A small classifier of four separable clusters; returns the losses."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    targets = (inputs[:, :2] > 0).long() @ torch.tensor([1, 2])
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    precision = Precision(name, CPU, initial_scale=2.0**10)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with precision.autocast():
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        precision.backward(loss)
        assert precision.step(optimizer, model.parameters(), clip).applied
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return losses


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_learns_like_fp32(name, clip):
    exact, mixed = learn("fp32", clip=clip), learn(name, clip=clip)
    assert mixed != exact
    assert mixed[-1] == pytest.approx(exact[-1], abs=0.03)
    assert exact[-1] < 0.1


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_in_the_type_it_says(name, dtype):
    with Precision(name, CPU).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_transformers_evaluate_padded_batches(name):
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model, padding = nn.TransformerEncoder(layer, 1).eval(), torch.tensor([[False, False, True]])
    precision = Precision(name, CPU)
    with torch.no_grad(), precision.autocast():
        found = model(torch.ones(1, 3, 8), src_key_padding_mask=padding)
    assert found[:, :2].isfinite().all()
    assert torch.backends.mha.get_fastpath_enabled()


def test_fp16_on_cpus_sums_in_fp32_and_rounds_like_tensor_cores():
    """2048 ones and 2048 times 2^-10: fp16 sums would stop growing at 2048."""
    weight = torch.ones(1, 4096, requires_grad=True)
    x = torch.cat((torch.ones(2048), torch.full((2048,), 2.0**-10))).requires_grad_()
    with Precision("fp16", CPU).autocast():
        y = nn.functional.linear(x, weight)
        image = torch.nn.functional.conv2d(x.view(1, 1, 64, 64), weight.view(1, 1, 64, 64))
    assert y.dtype == image.dtype == torch.float16
    assert y.item() == image.item() == 2050
    (y * 70_000.0).float().backward()  # beyond fp16
    assert weight.grad is not None
    assert bool(weight.grad[0, :2048].isinf().all())


def test_small_gradients_survive_fp16_only_by_scaling():
    """A gradient of 1e-6 on each of 1 weight is below fp16's smallest subnormal / 2 per sample."""
    weight = nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    gradients = {}
    for scale in (1.0, 2.0**14):
        precision = Precision("fp16", CPU, initial_scale=scale)
        weight.grad = None
        with precision.autocast():
            loss = (torch.full((1, 1), 1e-4) @ weight).float().sum() * 1e-5
        precision.backward(loss)
        assert precision.step(optimizer, [weight], clip=None).applied
        gradients[scale] = weight.grad.item()
    assert gradients[1.0] == 0
    assert gradients[2.0**14] == pytest.approx(1e-9, rel=0.01)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_step_with_inf_or_nan_is_skipped_and_the_scale_halved(poison):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    precision = Precision("fp16", CPU, initial_scale=8.0)
    precision.backward((weight * torch.tensor([1.0, poison])).sum())
    assert not precision.step(optimizer, [weight], clip=1.0).applied
    assert weight.tolist() == [1, 1]
    assert precision.scale == 4
    optimizer.zero_grad()
    precision.backward(weight.sum())
    assert precision.step(optimizer, [weight], clip=None).applied
    assert weight.tolist() == pytest.approx([0.9, 0.9])


def test_a_gradient_that_is_always_nan_is_not_the_scales_fault():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision = Precision("fp16", CPU)
    for _ in range(16 + 24):
        precision.backward(weight.square().sum().sqrt())
        assert not precision.step(optimizer, [weight], clip=None).applied
        optimizer.zero_grad()
    precision.backward(weight.square().sum().sqrt())
    with pytest.raises(Diverged, match="NaN or infinite even at a loss scale of 3e-08"):
        precision.step(optimizer, [weight], clip=None)


def test_clipping_acts_on_the_unscaled_gradient():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision("fp16", CPU, initial_scale=2.0**8)
    precision.backward((weight * 3).sum())
    update = precision.step(optimizer, [weight], clip=1.0)
    assert update.grad_norm.item() == pytest.approx(6.0)
    assert weight.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_finite_gradients_are_applied_although_their_norm_overflows(name, clip):
    """The squares of 1e25 exceed float32: the norm must not count as infinite."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision = Precision(name, CPU, initial_scale=2.0**8)
    scale = precision.scale
    precision.backward((weight * torch.tensor([3e25, 0, 4e25, 0])).sum())
    update = precision.step(optimizer, [weight], clip)
    assert update.applied
    assert precision.scale == scale
    if clip or name == "fp16":
        assert update.grad_norm.item() == pytest.approx(5e25)
    expected = torch.tensor([-0.6, 0, -0.8, 0]) if clip else torch.tensor([-3e25, 0, -4e25, 0])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_parameter_without_gradient_keeps_its_value(name):
    """Weight decay would shrink it."""
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([used, unused], lr=0.1, weight_decay=0.5)
    precision = Precision(name, CPU, initial_scale=8.0)
    assert not precision.step(optimizer, [used, unused], clip=1.0).applied
    assert used.tolist() == [1, 1]
    precision.backward(used.sum())
    assert precision.step(optimizer, [used, unused], clip=None).applied
    assert used.tolist() != [1, 1]
    assert unused.tolist() == [1, 1]


def test_a_rank_that_had_nothing_to_scale_steps_all_the_same():
    """As after a restart whose first batch leaves a rank without samples."""
    before = Precision("fp16", torch.device("cpu"), initial_scale=8.0)
    precision = Precision("fp16", torch.device("cpu"))
    precision.load(before.state())
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 8.0)  # what the other ranks sent, scaled
    assert precision.step(torch.optim.SGD([weight], lr=0.5), [weight], None).applied
    assert weight.tolist() == [0.5, 0.5]


def test_threads_that_overlap_restore_the_fast_path_of_attention():
    first, second = (Precision("bf16", CPU).autocast() for _ in range(2))
    first.__enter__()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert not torch.backends.mha.get_fastpath_enabled()
        thread.submit(second.__exit__, None, None, None).result()
    assert torch.backends.mha.get_fastpath_enabled()
