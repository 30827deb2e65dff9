"""Multiply-accumulates, compared with the literature and with counts by hand."""

from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from trainer.engine.cost import macs
from trainer.hardware import workloads
from trainer.models import LeNet5, LeNet300, LSTMLanguageModel


def test_a_linear_weight_counts_once_and_a_zero_never():
    model = LeNet300()
    sample = torch.zeros(1, 1, 28, 28)
    assert macs(model, sample) == 266_200
    with torch.no_grad():
        model.fc1.weight[:10] = 0
    assert macs(model, sample) == 266_200 - 10 * 784
    assert model.training


def test_a_convolution_counts_per_position():
    # conv1 20x5x5 on 24x24, conv2 50x20x5x5 on 8x8, fc1 800x500, fc2 500x10
    expected = 500 * 576 + 25_000 * 64 + 400_000 + 5_000
    assert macs(LeNet5(), torch.zeros(1, 1, 28, 28)) == expected


def test_a_recurrent_weight_counts_per_time_step():
    model = LSTMLanguageModel(vocabulary=10, embedding=4, hidden=6)
    steps, gates = 7, 4
    assert macs(model, torch.zeros(1, steps, dtype=torch.long)) == steps * (
        gates * 6 * (4 + 6) + 6 * 10
    )


class Reader(nn.Module):
    """An LSTM that is called in one of the ways in which it can be."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "packed":
                lengths = [x.shape[1]] * len(x)
                given = pack_padded_sequence(x, lengths, batch_first=True)
                return self.lstm(given)[0].data
            case "by name":
                return self.lstm(input=x)[0]
        return self.lstm(x[0])[0]


@pytest.mark.parametrize("how", ["packed", "by name", "unbatched"])
def test_an_lstm_counts_however_it_is_called(how):
    assert macs(Reader(how), torch.zeros(1, 7, 4)) == 7 * 4 * 6 * (4 + 6)


def test_every_sequence_of_a_sample_counts():
    """A sample may be several sequences, such as the sentences of a text."""

    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x.flatten(0, 1))[0]

    assert macs(Sentences(), torch.zeros(1, 3, 7, 4)) == 3 * 7 * 4 * 6 * (4 + 6)
    found = workloads(Sentences(), torch.zeros(2, 3, 7, 4))
    assert [x.rows for x in found] == [3 * 7, 3 * 7]


class Call(nn.Module):
    """A module that is called by a function of it and the input."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, as in transformers' GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 12)


TOKENS = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(0))
ATTENTION = 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8  # projections, and two products of activations
CASES = {
    "attention": (
        lambda: Call(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
        TOKENS,
        ATTENTION,
    ),
    "attention without weights": (
        lambda: Call(
            nn.MultiheadAttention(8, 2, batch_first=True),
            lambda m, x: m(x, x, x, need_weights=False)[0],
        ),
        TOKENS,
        ATTENTION,
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        TOKENS,
        ATTENTION + 2 * 5 * 8 * 16,
    ),
    "Conv1D": (Conv1D, TOKENS, 5 * 8 * 12),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE, 49 * 4 * 27),
    "depthwise convolution": (lambda: nn.Conv2d(4, 8, 3, groups=4), IMAGE, 25 * 8 * 9),
    "bilinear": (
        lambda: Call(nn.Bilinear(3, 5, 6), lambda m, x: m(x[..., :3], x[..., 3:])),
        TOKENS,
        5 * 3 * 5 * 6,
    ),
    "einsum": (
        lambda: Call(nn.Linear(8, 8), lambda m, x: torch.einsum("bti,oi->bto", x, m.weight)),
        TOKENS,
        5 * 64,
    ),
    "vector": (
        lambda: Call(nn.Linear(8, 1), lambda m, x: x[0] @ m.weight[0]),
        TOKENS,
        5 * 8,
    ),
    "gru": (
        lambda: Call(nn.GRU(8, 4, batch_first=True), lambda m, x: m(x)[0]),
        TOKENS,
        5 * 3 * 4 * 12,
    ),
    "a product of weights alone": (
        lambda: Call(nn.Linear(8, 8), lambda m, x: x + (m.weight @ m.weight)[:1]),
        TOKENS,
        0,
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_every_operator_that_multiplies_counts(name: str) -> None:
    build, sample, expected = CASES[name]
    assert macs(build(), sample) == expected


@pytest.mark.parametrize("name", ["Conv1D", "transposed convolution", "depthwise convolution"])
def test_zero_weights_never_count(name: str) -> None:
    build, sample, expected = CASES[name]
    model = build()
    with torch.no_grad():
        model.weight[: len(model.weight) // 2] = 0
    assert macs(model, sample) == expected // 2


def test_zero_activations_count() -> None:
    """How many there are depends on the sample, not on the model."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
    assert macs(model, -TOKENS.abs()) == 5 * 8 * 3
    # Nor do they where a product of two activations holds them.
    product = Call(nn.ReLU(), lambda m, x: m(x) @ m(x).transpose(1, 2))
    assert macs(product, -TOKENS.abs()) == 5 * 5 * 8


def test_a_weight_that_is_computed_counts_by_its_own_zeros() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    with torch.no_grad():
        model.parametrizations.weight.original1[:, :2] = 0
    assert macs(model, TOKENS) == 5 * 4 * 6


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_a_sparse_matrix_counts_by_its_entries(layout: str) -> None:
    matrix = torch.eye(8).to_sparse(layout=getattr(torch, layout))
    assert macs(Call(nn.Identity(), lambda m, x: matrix @ x[0].T), TOKENS) == 8 * 5


def test_counting_in_two_threads_leaves_the_settings_of_attention_as_they_were() -> None:
    second_runs = Event()

    def first(_: nn.Module, x: Tensor) -> Tensor:
        second_runs.wait(0.2)  # in vain: one counts after the other
        return x

    def second(_: nn.Module, x: Tensor) -> Tensor:
        second_runs.set()
        one.join()
        return x

    one, two = (Thread(target=macs, args=(Call(nn.Identity(), f), TOKENS)) for f in (first, second))
    one.start()
    two.start()
    two.join()
    assert torch.backends.mha.get_fastpath_enabled()


def test_small_weights_count_in_mixed_precision() -> None:
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.fill_(1e-12)  # zero in float16
    with torch.autocast("cpu", dtype=torch.float16):
        assert macs(model, TOKENS) == 5 * 8 * 4
    assert torch.backends.mha.get_fastpath_enabled()
