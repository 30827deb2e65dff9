"""Which weights are found, under which names, in and out of a phase; and what patterns match."""

import pytest
import torch
from torch import nn

from trainer.compress.install import fold, install
from trainer.compress.parametrize import Packed
from trainer.compress.select import match_patterns, weights
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
