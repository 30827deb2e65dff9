"""Smaller models that compute what the larger one computes without the removed units."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.slicing import find_units, remove, to_change
from trainer.errors import ConfigError
from trainer.models import ResNetCifar
from trainer.testing import ExampleNet


class Mixed(nn.Module):
    """Depthwise, grouped and transposed convolutions, a concatenation, and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 16, 3, groups=8)
        self.c = nn.Conv2d(16, 8, 1, groups=4)
        self.d = nn.ConvTranspose2d(8, 6, 2, 2)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.PReLU(6)
        self.e = nn.Conv2d(12, 4, 3)
        self.f = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.d(self.c(self.b(self.a(x).relu()).relu()))))
        output: Tensor = self.f(self.e(torch.cat([y, y.sigmoid()], 1)).mean((2, 3)))
        return output


class Fixed(nn.Module):
    """A reshape with a fixed size; the second hidden layer can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.c(self.b(self.a(x).view(-1, 6)).relu())
        return output


class Conv1D(nn.Module):
    """That of transformers, which is a Linear with a transposed weight."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        product = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return product.view(*x.shape[:-1], self.nf)

    def extra_repr(self) -> str:
        return f"{self.nf}, {self.nx}"


class Block(nn.Module):
    """Attention as in GPT-2, whose sizes are stated in attributes, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = 4, 2, 8
        self.qkv, self.proj = Conv1D(24, 8), Conv1D(8, 8)
        self.up, self.down = Conv1D(12, 8), Conv1D(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        shape = *x.shape[:2], -1, self.head_dim
        parts = self.qkv(x).split(self.split_size, dim=2)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(heads.reshape(*x.shape[:2], -1))
        return x + self.down(self.up(x).relu())


class Recurrent(nn.Module):
    """Only features between the linear layer and the recurrent one can be removed."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(3, 6), kind(6, 4, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.rnn(self.a(x))[0]
        return output


def half(units: list[Any]) -> list[Any]:
    """Every second unit of each layer."""
    layers: dict[Any, list[Any]] = {}
    for unit in units:
        layers.setdefault(unit.dimensions, []).append(unit)
    return [unit for found in layers.values() for unit in found[1::2]]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (ExampleNet, (2, 2, 6, 6)),
        (Mixed, (2, 3, 6, 6)),
        (lambda: ResNetCifar(8), (2, 3, 8, 8)),
        (lambda: nn.TransformerEncoderLayer(8, 4, 6, batch_first=True), (2, 3, 8)),
        (Block, (2, 3, 8)),
        (lambda: Recurrent(nn.LSTM), (2, 5, 3)),
        (lambda: Recurrent(nn.GRU), (2, 5, 3)),
    ],
    ids=["example", "mixed", "resnet", "transformer", "gpt", "lstm", "gru"],
)
def test_the_smaller_model_computes_the_same_as_the_zeroed_one(build: Any, shape: Any) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    rebuilt, units, refused = find_units(model, x)
    assert units
    assert not refused
    removed = half(units)
    change = json.loads(json.dumps(to_change(rebuilt, removed, units)))
    tensors = {**dict(rebuilt.named_parameters()), **dict(rebuilt.named_buffers())}
    smaller = copy.deepcopy(model)
    remove(smaller, change)
    with torch.no_grad():
        for unit in removed:
            for part in unit.parts:
                if not part.name.endswith("running_var"):
                    tensors[part.name].index_fill_(part.dim, torch.tensor(part.positions), 0)
        torch.testing.assert_close(smaller(x), rebuilt(x), rtol=1e-4, atol=1e-5)
    fresh = build()
    remove(fresh, change)
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh.eval()(x), smaller(x))
    assert repr(fresh) == repr(smaller)  # layers state their new sizes


def test_memory_format_ties_and_frozen_parameters_stay() -> None:
    model = Mixed().to(memory_format=torch.channels_last)
    model.f.weight.requires_grad_(False)
    model.again = model.e
    rebuilt, units, _ = find_units(model, torch.randn(2, 3, 6, 6))
    remove(model, to_change(rebuilt, half(units), units))
    assert model.e.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.again.weight is model.e.weight
    assert not model.f.weight.requires_grad
    assert model.e.weight.requires_grad


def test_a_layer_whose_size_is_fixed_in_code_is_left_out() -> None:
    model = Fixed()
    _, units, refused = find_units(model, torch.randn(6, 4))
    assert len(units) == 8
    (text,) = refused
    assert "a.weight, b.weight" in text
    assert "shape '[-1, 6]' is invalid" in text or "shape" in text


class Auxiliary(nn.Module):
    """Has a second head in training, as Inception and GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.aux, self.out = nn.Conv2d(6, 8, 1), nn.Linear(6, 4), nn.Linear(8, 4)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.a(x)).relu()
        logits: Tensor = self.out(self.dropout(self.b(x).mean((2, 3))))
        return (logits, self.aux(self.dropout(x.mean((2, 3))))) if self.training else logits


def test_heads_that_only_training_uses_follow() -> None:
    model, x, state = Auxiliary(), torch.randn(2, 3, 4, 4), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    rebuilt, units, refused = find_units(model, x)
    assert not refused
    assert len(units) == 6 + 8
    torch.testing.assert_close(rebuilt.state_dict(), before)
    remove(model, to_change(rebuilt, half(units), units))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.aux.in_features == 3
    assert [output.shape for output in model(x)] == [(2, 4), (2, 4)]


class Scaled(nn.Module):
    """What it computes depends on the number of hidden units; returns an object or a mapping."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        return self.kind(logits=self.b(hidden / hidden.shape[1]))


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_outputs_in_objects_are_compared_and_keep_their_shape(kind: Any) -> None:
    _, units, refused = find_units(Scaled(kind), torch.randn(2, 4))
    assert not units
    assert refused == [
        "a.bias, a.weight, b.weight (without one of its units the model computes something else)"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removed": [["80", ["fc9.weight:0"]]], "attributes": []}, "does not fit ExampleNet: fc9"),
        ({"removed": [["80", ["fc1.weight:0"]]], "attributes": []}, "does not fit"),
        ({"removed": [["8000", ["fc1.weight:2"]]], "attributes": []}, "does not fit"),
        ({"removed": [["xy", ["fc1.weight:0"]]], "attributes": []}, "is damaged"),
        ({"removed": 3, "attributes": []}, "is damaged"),
        ({"removed": [], "attributes": [["", "forward", 3]]}, "is damaged"),
        ({"removed": []}, "is damaged"),
    ],
)
def test_a_damaged_change_is_one_clear_error(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        remove(ExampleNet(), change)


def test_a_model_that_needs_targets_in_training_has_units() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.output = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are needed")
            logits: Tensor = self.output(self.hidden(x).relu())
            return logits

    _, units, refused = find_units(Net().eval(), torch.randn(2, 4))
    assert (len(units), refused) == (6, [])
