"""The weights of a model, their names inside and outside a phase, and matches of patterns."""

import warnings

import pytest
import torch
from torch import nn

from trainer.compress.install import fold, install
from trainer.compress.parametrize import Packed
from trainer.compress.select import match_patterns, select_weights, vectors, weights
from trainer.errors import ConfigError


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.conv = nn.Conv2d(1, 2, 3)
        self.batch = nn.BatchNorm2d(2)
        self.layer = nn.LayerNorm([2, 4])
        self.lstm = nn.LSTM(4, 5)
        self.gru = nn.GRU(4, 5, bias=False)
        self.embedding = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.embedding.weight
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.register_parameter("missing", None)
        self.codes = nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 2))


NAMES = [
    "table",
    "conv.weight",
    "lstm.weight_ih_l0",
    "lstm.weight_hh_l0",
    "gru.weight_ih_l0",
    "gru.weight_hh_l0",
    "embedding.weight",
]


def test_names_are_the_same_in_and_out_of_a_phase() -> None:
    model = Everything()
    assert list(weights(model)) == NAMES
    install(model, {n: Packed(p[0].value, p[0].value > 0) for n, p in weights(model).items()})
    assert list(weights(model)) == NAMES
    fold(model)
    assert list(weights(model)) == NAMES


def test_a_tied_weight_is_one_entry() -> None:
    model = Everything()
    places = weights(model)["embedding.weight"]
    assert [(p.module, p.name) for p in places] == [
        (model.embedding, "weight"),
        (model.decoder, "weight"),
    ]


class Scaled(nn.Linear):
    """A layer of the user's with a scale for each output."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.scale = nn.Parameter(torch.ones(5, 1))
        self.low_rank = nn.Parameter(torch.ones(5, 2))


NO_WEIGHTS = {
    "layer scale": lambda: holder(torch.ones(8, 1, 1)),
    "layer scale of a batch": lambda: holder(torch.ones(1, 8, 1, 1)),
    "class token": lambda: holder(torch.zeros(1, 1, 8)),
    "one number": lambda: holder(torch.ones(1, 1)),
    "bias": lambda: holder(torch.ones(8)),
    "norm of a picture": lambda: nn.LayerNorm([3, 4, 4]),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "prelu": lambda: nn.PReLU(4),
}
ALWAYS = {
    "one input": (lambda: nn.Linear(1, 8), ["weight"]),
    "one output": (lambda: nn.Linear(8, 1), ["weight"]),
    "one weight": (lambda: nn.Linear(1, 1), ["weight"]),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), ["weight"]),
    "pointwise to one": (lambda: nn.Conv2d(8, 1, 1), ["weight"]),
    "a filter": (lambda: nn.Conv1d(1, 1, 3), ["weight"]),
    "one kernel": (lambda: nn.Conv2d(1, 1, 3), ["weight"]),
    "depthwise along one side": (lambda: nn.Conv2d(8, 8, (1, 1), groups=8), ["weight"]),
    "transposed": (lambda: nn.ConvTranspose2d(1, 1, 2), ["weight"]),
    "a number a word": (lambda: nn.Embedding(9, 1), ["weight"]),
    "bag": (lambda: nn.EmbeddingBag(9, 1), ["weight"]),
    "bilinear": (lambda: nn.Bilinear(1, 1, 4), ["weight"]),
    "rnn": (
        lambda: nn.GRU(1, 3, bidirectional=True),
        [f"weight_{of}_l0{way}" for way in ("", "_reverse") for of in ("ih", "hh")],
    ),
    "projected": (
        lambda: nn.LSTM(2, 3, proj_size=1),
        ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"],
    ),
    "cell": (lambda: nn.LSTMCell(1, 3), ["weight_ih", "weight_hh"]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 1, add_bias_kv=True),
        ["in_proj_weight", "out_proj.weight"],
    ),
    "attention of other sizes": (
        lambda: nn.MultiheadAttention(4, 1, kdim=1, vdim=1),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "a layer of the user's": (Scaled, ["weight", "low_rank"]),
    "positions": (lambda: holder(torch.zeros(1, 16, 8)), ["value"]),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(4, 3)), ["weight_v"]),
    "old weight norm, one output": (lambda: old_weight_norm(nn.Linear(4, 1)), ["weight_v"]),
    "old weight norm, convolution": (lambda: old_weight_norm(nn.Conv2d(4, 3, 3)), ["weight_v"]),
    "old spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(1, 3)),
        ["weight_orig"],
    ),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), []),
}


def holder(value: torch.Tensor) -> nn.Module:
    """A module of the user's with one parameter."""
    module = nn.Module()
    module.value = nn.Parameter(value)
    return module


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_scales_biases_and_norms_are_not_weights(name: str) -> None:
    model = NO_WEIGHTS[name]()
    assert weights(model) == {}
    assert len(vectors(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ALWAYS)
def test_weights_of_layers_are_weights_whatever_their_shape(name: str) -> None:
    build, expected = ALWAYS[name]
    assert list(weights(build())) == expected


def test_a_weight_that_is_tied_to_a_plain_parameter_is_a_weight() -> None:
    model = holder(torch.ones(4, 1))
    model.fc = nn.Linear(1, 4)
    model.fc.weight = model.value
    assert list(weights(model)) == ["value"]


def test_match() -> None:
    names = ["conv1.weight", "conv2.weight", "fc1.weight", "rnn.weight_hh_l0", "table"]
    assert match_patterns({"conv*": 1, "conv2": 2, "*hh*": 3, "table": 4}, names) == {
        "conv1.weight": 1,
        "conv2.weight": 2,
        "rnn.weight_hh_l0": 3,
        "table": 4,
    }
    # Where several patterns match, the last one wins.
    assert match_patterns({"conv2": 2, "*": 1}, names) == dict.fromkeys(names, 1)
    with pytest.raises(
        ConfigError, match=r"'fc2' matches no weight; there are conv1\.weight, conv2"
    ):
        match_patterns({"fc2": 1}, names)


def test_a_model_whose_layers_have_parametrizations_has_no_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ConfigError, match="no weights that can be compressed; layers with"):
        select_weights(model, ["*"], [])
    with pytest.raises(ConfigError, match=r"no weights that can be compressed$"):
        select_weights(nn.ReLU(), ["*"], [])
