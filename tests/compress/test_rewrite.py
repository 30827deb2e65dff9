"""Structural changes compute the same, and a fresh model is brought to them by names alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from trainer.compress.layers import rebuild
from trainer.compress.quantize import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    attach,
)
from trainer.compress.rewrite import (
    apply_structure,
    fold_batch_norms,
    foldable,
    restore,
    skeleton,
)
from trainer.errors import ConfigError
from trainer.models import ConvNet, LSTMLanguageModel, ResNetCifar


def lively(model: nn.Module) -> nn.Module:
    """Batch norms as after some training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


class BatchNormAct2d(nn.BatchNorm2d):
    """That of timm."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:  # which torch.fx cannot trace
            raise ValueError
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


def with_activation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), BatchNormAct2d(4), nn.Flatten())


@pytest.mark.parametrize(
    "build",
    [
        with_activation,
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU()),
        lambda: ResNetCifar(8, in_channels=1),
        lambda: ConvNet(depth=2, width=4),
    ],
)
def test_a_folded_model_computes_the_same(build) -> None:
    torch.manual_seed(0)
    model = lively(build())
    images = torch.randn(3, 1, 28, 28) if isinstance(model, ConvNet) else torch.randn(3, 1, 8, 8)
    expected = model(images)
    fold_batch_norms(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_zeros_stay_when_batch_norm_is_folded() -> None:
    model = lively(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4)))
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
    fold_batch_norms(model)
    assert model[1].weight.count_nonzero() == 12


class Branching(nn.Module):
    """What conv makes is used twice, and norm follows a sum: neither can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.after_sum = nn.BatchNorm2d(2)
        self.twice = nn.Conv2d(2, 2, 1)
        self.bn_twice = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.after_sum(self.bn(y) + y)
        made: Tensor = self.twice(self.bn_twice(self.twice(y)))
        return made


class Tied(nn.Module):
    """Two convolutions of one weight, and a batch norm for each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.b.weight = self.a.weight
        self.bn_a, self.bn_b = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.bn_b(self.b(self.bn_a(self.a(x))))
        return made


class Read(nn.Module):
    """The weight of a convolution is used a second time, without the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)
        return made


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Untraceable(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_what_cannot_be_folded_is_left() -> None:
    assert foldable(Branching()) == {}
    with pytest.raises(ConfigError, match=r"cannot trace Untraceable .* set fold=false"):
        foldable(Untraceable())


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Tied, torch.randn(3, 2, 4, 4)),
        (Read, torch.randn(3, 2, 4, 4)),
        (
            lambda: nn.Sequential(weight_norm(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3)),
            torch.randn(3, 2, 4, 4),
        ),
        (lambda: nn.Sequential(Halved(2, 3, 1), nn.BatchNorm2d(3)), torch.randn(3, 2, 4, 4)),
        # Along dimension 1, where the channels of a Linear are the last ones.
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), torch.randn(3, 5, 6)),
        (lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(5)), torch.randn(3, 5, 6)),
        (
            lambda: nn.Sequential(nn.Flatten(2), nn.Linear(6, 5), nn.BatchNorm1d(5)),
            torch.randn(3, 5, 2, 3),
        ),
    ],
    ids=["tied", "read", "weight_norm", "subclass", "wrong axis", "sizes", "flatten"],
)
def test_what_would_compute_something_else_is_not_folded(build, inputs: Tensor) -> None:
    torch.manual_seed(0)
    model = lively(build())
    expected = model(inputs)
    fold_batch_norms(model)
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("shape", [lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1)])
def test_a_linear_is_folded_where_samples_are_surely_flat(shape) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn1 = nn.Linear(8, 5), nn.BatchNorm1d(5)
            self.fc2, self.bn2 = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.bn2(self.fc2(self.bn1(self.fc1(shape(x))).relu()))
            return made

    assert foldable(Flat()) == {"bn1": "fc1", "bn2": "fc2"}


def changed(model: nn.Module) -> nn.Module:
    """All changes at once, grids included."""
    fold_batch_norms(model)
    rebuild(model)
    shared: dict[int, WeightQuantizer] = {}
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            quantizer = WeightQuantizer(4, len(module.weight))
            attach(module, "weight", shared.setdefault(id(module.weight), quantizer))
            if not isinstance(module, nn.Embedding):
                attach(module, "input", ActivationQuantizer(6))
            last = module
    attach(last, "output", ActivationQuantizer(5))
    for quantizer in activation_quantizers(model):
        quantizer.update_range(torch.tensor([-1.0, 1.0]), 1.0)
    return model


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: ResNetCifar(8, in_channels=1), torch.randn(2, 1, 8, 8)),
        (with_activation, torch.randn(2, 1, 8, 8)),
        (lambda: LSTMLanguageModel(11, 6, 6, layers=2, tied=True), torch.arange(10).view(2, 5)),
    ],
)
def test_a_fresh_model_conforms_to_a_state_dict(build, inputs: Tensor) -> None:
    torch.manual_seed(0)
    model = changed(lively(build()))
    state = model.state_dict()
    fresh = build().eval()
    apply_structure(fresh, state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(inputs), model(inputs))
    assert list(fresh.state_dict()) == list(state)
    again = copy.deepcopy(fresh)
    assert torch.equal(again(inputs), model(inputs))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(3, 4),
        lambda: nn.Sequential(
            nn.Linear(3, 4),
            nn.ReLU(),
            nn.BatchNorm1d(4, affine=False, track_running_stats=False),
            nn.Linear(4, 4),
        ),
    ],
    ids=["only a layer", "a batch norm without state"],
)
def test_what_was_not_folded_is_still_there(build) -> None:
    model = changed(build().eval())
    inputs = torch.randn(5, 3)
    restored = restore(build().eval(), model.state_dict())
    assert str(restored) == str(model)
    assert torch.equal(restored(inputs), model(inputs))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.weight_quantizer.width", torch.tensor(200, dtype=torch.uint8)),
        ("0.weight_quantizer.width", torch.tensor([8, 8], dtype=torch.uint8)),
        ("0.input_quantizer.width", torch.tensor(torch.nan)),
        ("0.weight_quantizer.scale", None),
        ("0.weight_quantizer.scale", torch.ones(7)),
        ("0.weight_quantizer.scale", torch.ones(30, 1)),
        ("0.input_quantizer.range", None),
        ("0.input_quantizer.range", torch.ones(3)),
        ("1.input_quantizer.width", torch.tensor(8, dtype=torch.uint8)),
        ("2.input_quantizer.width", torch.tensor(8, dtype=torch.uint8)),
    ],
)
def test_a_damaged_grid_is_refused(name: str, value: Tensor | None) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 30), nn.ReLU())

    state = dict(changed(build()).state_dict())
    restore(build(), state)
    state[name] = value
    if value is None:
        del state[name]
    with pytest.raises(RuntimeError, match=name.rpartition(".")[0]):
        restore(build(), state)


def test_an_ordinary_state_dict_changes_nothing() -> None:
    model = ResNetCifar(8)
    before = str(model)
    apply_structure(model, model.state_dict())
    apply_structure(model, {})
    assert str(model) == before


def test_a_skeleton_takes_no_memory_and_keeps_ties() -> None:
    model = LSTMLanguageModel(11, 6, 6, tied=True)
    made = skeleton(model)
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    assert made.decoder.weight is made.encoder.weight
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
