"""Recurrent networks and attention built from Linear layers compute what those of torch.nn do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from trainer.compress.attention import LinearAttention
from trainer.compress.layers import rebuild, rebuild_as
from trainer.compress.quantize import ActivationQuantizer, attach
from trainer.compress.recurrent import LinearGRU, LinearLSTM, LinearRNN


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (LinearLSTM, nn.LSTM),
        (LinearGRU, nn.GRU),
        (LinearRNN, nn.RNN),
        (LinearRNN, lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs)),
    ],
    ids=["lstm", "gru", "tanh", "relu"],
)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_network_of_linears_computes_the_same(
    kind: Any, source: Any, layers: int, batch_first: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    rnn = source(5, 7, layers, batch_first=batch_first, bias=bias)
    inputs = torch.randn(3, 4, 5)
    batch = 3 if batch_first else 4
    parts = tuple(torch.randn(layers, batch, 7) for _ in range(kind.states))
    state = parts if kind.states > 1 else parts[0]
    alone = tuple(part[:, 0] for part in parts)
    made = kind(rnn)
    for x, given in (
        (inputs, None),
        (inputs, state),
        (inputs[0], None),  # without a dimension for samples
        (inputs[0], alone if kind.states > 1 else alone[0]),
    ):
        expected, ends = rnn(x, given)
        found, found_ends = made(x, given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_ends, ends)
    expected.sum().backward()
    wanted = rnn.weight_hh_l0.grad.clone()
    rnn.weight_hh_l0.grad = None
    found.sum().backward()
    torch.testing.assert_close(rnn.weight_hh_l0.grad, wanted)


def test_the_weight_of_a_recurrence_is_computed_once_for_all_steps() -> None:
    lstm = LinearLSTM(nn.LSTM(3, 4))
    hh = lstm.layers[0].hh
    attach(hh, "input", ActivationQuantizer(8))
    reads = []

    class Computed(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            reads.append(weight)
            return weight

    nn.utils.parametrize.register_parametrization(hh, "weight", Computed(), unsafe=True)
    reads.clear()
    calls = []
    hh.input_quantizer.register_forward_hook(lambda *_: calls.append(_))
    lstm(torch.randn(5, 2, 3))
    assert (len(reads), len(calls)) == (1, 5)


def test_other_recurrent_networks_are_left() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict(
        {
            "two": nn.LSTM(3, 4, bidirectional=True),
            "p": nn.LSTM(3, 4, proj_size=2),
            "own": Own(3, 4),
            "gru": nn.GRU(3, 4, bidirectional=True),
        }
    )
    rebuild(model)
    assert all(isinstance(module, nn.RNNBase) for module in model.values())
    for module in model.values():
        with pytest.raises(ValueError, match="cannot be built from Linear layers"):
            LinearLSTM(module)


@pytest.mark.parametrize("kind", [LinearLSTM, LinearGRU, LinearRNN])
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_packed_sequences_are_as_in_torch(kind: Any, is_sorted: bool, given: bool) -> None:
    """Each time step computes the sequences that are not over, and no padding."""
    torch.manual_seed(0)
    rnn = kind.source(3, 4, num_layers=2)
    made = kind(rnn)
    lengths = (5, 5, 2, 1) if is_sorted else (2, 5, 1, 5)
    packed = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=is_sorted)
    state = None
    if given:
        state = torch.randn(2, 4, 4)
        state = (state, torch.randn(2, 4, 4)) if kind.states > 1 else state
    expected, ends = rnn(packed, state)
    rows = []
    made.layers[1].hh.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    found, found_ends = made(packed, state)
    assert rows == packed.batch_sizes.tolist()
    torch.testing.assert_close(found.data, expected.data)
    torch.testing.assert_close(found_ends, ends)
    assert found.sorted_indices is packed.sorted_indices
    expected.data.sum().backward()
    wanted = rnn.weight_hh_l0.grad.clone()
    rnn.weight_hh_l0.grad = None
    found.data.sum().backward()
    torch.testing.assert_close(rnn.weight_hh_l0.grad, wanted)
    wrong: Any = torch.zeros(1, 4, 4)
    wrong = (wrong, wrong) if kind.states > 1 else wrong
    with pytest.raises(RuntimeError, match=r"a state of \[1, 4, 4\]: it must be \[layers"):
        made(packed, wrong)


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


PADDING = torch.tensor([[False, False, False, True], [False, False, False, False]] * 2)[:3]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"average_attn_weights": False},
        {"attn_mask": causal(4)},
        {"attn_mask": causal(4), "is_causal": True},
        {"attn_mask": causal(4).isinf(), "key_padding_mask": PADDING},
        {"key_padding_mask": PADDING},
        {"key_padding_mask": torch.where(PADDING, -5.0, 0.5)},
        {"attn_mask": torch.linspace(-1, 1, 96).view(6, 4, 4)},
    ],
    ids=["plain", "each", "mask", "causal", "both", "padding", "floats", "per head"],
)
@pytest.mark.parametrize("same", ["all", "key", "none"])
def test_attention_of_linears_computes_the_same(
    batch_first: bool, bias: bool, need_weights: bool, settings: dict[str, Any], same: str
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)
    attention.train()  # the fused kernel of evaluation knows fewer masks
    made = LinearAttention(attention).train()
    x, y, z = torch.randn(3, *((3, 4, 8) if batch_first else (4, 3, 8)))
    inputs = {"all": (x, x, x), "key": (x, y, y), "none": (x, y, z)}[same]
    expected = attention(*inputs, need_weights=need_weights, **settings)
    found = made(*inputs, need_weights=need_weights, **settings)
    torch.testing.assert_close(found, expected)


def test_attention_takes_one_sample_without_a_dimension_for_it() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    made = LinearAttention(attention)
    x, mask = torch.randn(4, 8), PADDING[0]
    for weights in (True, False):
        expected = attention(x, x, x, key_padding_mask=mask, need_weights=weights)
        found = made(x, x, x, key_padding_mask=mask, need_weights=weights)
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        made(x, x, x, is_causal=True)


def test_attention_drops_out_in_training_alone() -> None:
    torch.manual_seed(0)
    made = LinearAttention(nn.MultiheadAttention(8, 2, dropout=0.5))
    x = torch.randn(4, 3, 8)
    for weights in (True, False):
        first, second = (made.train()(x, x, x, need_weights=weights)[0] for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (made.eval()(x, x, x, need_weights=weights)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "settings", [{"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str
)
def test_other_attention_is_left(settings: dict[str, Any]) -> None:
    class Own(nn.MultiheadAttention):
        pass

    for attention in (nn.MultiheadAttention(8, 2, **settings), Own(8, 2)):
        assert not LinearAttention.accepts(attention)
        with pytest.raises(ValueError, match="cannot be built from Linear layers"):
            LinearAttention(attention)


def test_a_transformer_computes_the_same_in_evaluation_where_torch_uses_fused_kernels() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    made = copy.deepcopy(model)
    rebuild(made)
    assert all(isinstance(layer.self_attn, LinearAttention) for layer in made.layers)
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        for settings in ({}, {"mask": causal(4)}):
            torch.testing.assert_close(made(x, **settings), model(x, **settings))
        expected = model(x, src_key_padding_mask=PADDING)  # a nested tensor in between
        found = made(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(found[~PADDING], expected[~PADDING])


def test_a_module_of_several_names_is_replaced_everywhere() -> None:
    model = nn.Module()
    model.a = model.b = nn.GRU(3, 4)
    model.eval()
    rebuild(model)
    assert model.a is model.b
    assert isinstance(model.a, LinearGRU)
    assert not model.a.training
    again = nn.Module()
    again.a = again.b = nn.GRU(3, 4)
    rebuild_as(again, model.state_dict())
    assert again.a is again.b
    again.load_state_dict(model.state_dict())
