"""Optimizers by name."""

import pytest
import torch
from torch import nn

from trainer.engine.optim import parse_optimizer, set_lr
from trainer.errors import ConfigError


def one_parameter():
    return [nn.Parameter(torch.ones(3))]


def test_fused_is_used_where_it_exists():
    assert (
        parse_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1})
        .build(one_parameter())
        .defaults["fused"]
    )
    rmsprop = parse_optimizer({"_target_": "torch.optim.RMSprop", "lr": 0.1}).build(one_parameter())
    assert "fused" not in rmsprop.defaults


def test_an_l1_penalty_draws_to_zero():
    parameter = nn.Parameter(torch.tensor([2.0, -2.0, 0.0]))
    settings = {"_target_": "trainer.engine.l1.L1SGD", "lr": 0.5, "l1": 0.2, "weight_decay": 0.1}
    optimizer = parse_optimizer(settings).build([parameter])
    parameter.grad = torch.tensor([1.0, 0.0, 0.0])
    optimizer.step()
    # 2 - 0.5 (1 + 0.2 + 0.1 * 2), -2 + 0.5 (0.2 + 0.1 * 2)
    assert torch.allclose(parameter.detach(), torch.tensor([1.3, -1.8, 0.0]))
    with pytest.raises(ConfigError, match="l1=-1"):
        parse_optimizer(settings | {"l1": -1})
    model = nn.Linear(2, 2)
    groups = {"plain": {"kind": "vectors", "l1": 0}}
    optimizer = parse_optimizer(settings | {"groups": groups}).build(model.parameters(), model)
    found = {group["l1"]: group["params"][0] for group in optimizer.param_groups}
    assert found[0.2] is model.weight
    assert found[0] is model.bias


FUSED = [
    {"_target_": "torch.optim.SGD", "lr": 0.1},
    {"_target_": "torch.optim.SGD", "lr": 1e-4, "momentum": 0.9},
    {"_target_": "torch.optim.Adam", "lr": 0.1},
    {"_target_": "torch.optim.Adam", "lr": 0.1, "amsgrad": True},
    {"_target_": "torch.optim.AdamW", "lr": 0.1},
    {"_target_": "torch.optim.Adagrad", "lr": 0.1},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("settings", FUSED, ids=str)
def test_parameters_of_every_type_are_updated_as_by_the_unfused_kernel(settings, dtype):
    """Torch's fused SGD leaves 16-bit parameters on the CPU as they are."""
    results = []
    for choice in ({}, {"fused": False}):
        # The second parameter has another type: every type is tried, not that of the first.
        parameters = [nn.Parameter(torch.linspace(-0.1, 0.1, 9, dtype=torch.float32).to(dtype))]
        parameters.append(nn.Parameter(torch.zeros(9, dtype=torch.float32)))
        optimizer = parse_optimizer({**settings, **choice}).build(reversed(parameters))
        for step in range(3):
            for p in parameters:
                p.grad = torch.linspace(1, 2, 9, dtype=p.dtype) + step
            optimizer.step()
        results.append([p.detach() for p in parameters])
    for ours, plain in zip(*results, strict=True):
        assert ours[4] < 0  # both started from zero there
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, plain, rtol=8 * eps, atol=8 * eps * settings["lr"])


def test_a_fused_kernel_that_does_nothing_is_refused():
    settings = {"_target_": "torch.optim.SGD", "lr": 0.1, "fused": True}
    with pytest.raises(ConfigError, match=r"optimizer\.fused=true: .* of type bfloat16"):
        parse_optimizer(settings).build([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        parse_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1}).build([])


@pytest.mark.parametrize("choice", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_a_kernel_of_ones_own_choice(choice):
    settings = {"_target_": "torch.optim.Adam", "lr": 0.1, **choice}
    defaults = parse_optimizer(settings).build(one_parameter()).defaults
    assert not defaults["fused"]
    assert {key: defaults[key] for key in choice} == choice


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"_target_": "torch.optim.Sgd", "lr": 0.1}, r"optimizer\._target_=torch\.optim\.Sgd"),
        ({"_target_": "torch.nn.Linear", "lr": 0.1}, "not a torch.optim.Optimizer"),
        (
            {"_target_": "torch.optim.SGD", "lr": 0.1, "momentun": 0.9},
            r"optimizer\.momentun.*momentum",
        ),
        ({"_target_": "torch.optim.SGD", "lr": -0.1}, r"optimizer\.lr=-0\.1"),
        ({"_target_": "torch.optim.SGD", "lr": "fast"}, r"optimizer\.lr='fast'"),
        ({"_target_": "torch.optim.SGD"}, r"optimizer\.lr=None"),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": -1}, "momentum"),
        ({"lr": 0.1}, "_target_"),
        ({"_target_": "torch.optim.LBFGS", "lr": 0.1}, "closure"),
        (
            {"_target_": "torch.optim.SparseAdam", "lr": 0.1},
            r"dense tensors; use torch\.optim\.Adam",
        ),
        (
            {"_target_": "torch.optim.SGD", "lr": "0.1"},
            r"optimizer\.lr='0\.1': it must be a number above 0",
        ),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        parse_optimizer(settings).build(one_parameter())


def test_set_lr_reaches_tensor_rates_too():
    tensor = torch.optim.Adam(
        one_parameter(), lr=torch.tensor(0.1), foreach=False, capturable=False
    )
    set_lr(tensor, 0.5)
    assert tensor.param_groups[0]["lr"].item() == 0.5
