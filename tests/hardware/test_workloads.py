"""The products of a model, and the bytes of its weights in each stage."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.hardware.tpu.models import quantized
from trainer import artifact
from trainer.compress.codebooks import cluster
from trainer.engine.cost import macs
from trainer.errors import ConfigError
from trainer.hardware import (
    STAGES,
    artifact_workloads,
    read_fractions,
    stored_weights,
    uncounted_macs,
    workloads,
)
from trainer.hardware.figures import Figure
from trainer.models import LeNet5, LeNet300, LSTMLanguageModel


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_lenet5_layer_by_layer() -> None:
    found = {x.weight: x for x in workloads(LeNet5(), torch.rand(3, 1, 28, 28))}
    sizes = {name: (x.rows, x.inputs, x.outputs) for name, x in found.items()}
    assert sizes == {
        "conv1.weight": (24 * 24, 25, 20),
        "conv2.weight": (8 * 8, 500, 50),
        "fc1.weight": (1, 800, 500),
        "fc2.weight": (1, 500, 10),
    }
    assert found["conv2.weight"].input_values == 20 * 12 * 12
    assert found["conv2.weight"].output_values == 50 * 8 * 8
    assert sum(x.dense_macs for x in found.values()) == 2_293_000


class TimeFirst(nn.Module):
    def __init__(self, rnn: nn.GRU) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x.transpose(0, 1))[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_products_of_a_recurrent_layer(batch_first: bool) -> None:
    lstm = nn.GRU(3, 5, num_layers=2, batch_first=batch_first)
    model = lstm if batch_first else TimeFirst(lstm)
    found = workloads(model, torch.ones(4, 7, 3))
    assert [(x.weight.removeprefix("rnn."), x.rows, x.inputs, x.outputs) for x in found] == [
        ("weight_ih_l0", 7, 3, 15),
        ("weight_hh_l0", 7, 5, 15),
        ("weight_ih_l1", 7, 5, 15),
        ("weight_hh_l1", 7, 5, 15),
    ]
    assert [x.calls for x in found] == [1, 7, 1, 7]
    assert found[0].activation_density == Figure(1.0, "measured")
    assert found[1].activation_density == Figure(1.0, "assumed")


def test_counts_are_those_of_the_engine() -> None:
    for model, sample in (
        (LeNet5(), torch.rand(1, 1, 28, 28)),
        (LSTMLanguageModel(vocabulary=9, embedding=4, hidden=6), torch.randint(0, 9, (1, 5))),
    ):
        for parameter in model.parameters():
            parameter.data[torch.rand(parameter.shape) < 0.5] = 0
        found = workloads(model, sample)
        assert sum(x.macs for x in found) == macs(model, sample)
        assert uncounted_macs(model, sample, found) == 0


def test_products_outside_of_layers_are_counted_separately() -> None:
    """Attention: the products of activations."""
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    sample = torch.rand(1, 5, 8)
    found = workloads(model, sample)
    listed = {x.weight: (x.rows, x.inputs, x.outputs) for x in found}
    attention = {"self_attn.in_proj_weight": (5, 8, 24), "self_attn.out_proj.weight": (5, 8, 8)}
    assert listed == {**attention, "linear1.weight": (5, 8, 16), "linear2.weight": (5, 16, 8)}
    assert uncounted_macs(model, sample, found) == 2 * 5 * 5 * 8


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 3}])
def test_attention_to_another_sequence(widths: dict[str, int]) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
            self.register_buffer("keys", torch.rand(7, widths.get("kdim", 8)))
            self.register_buffer("values", torch.rand(7, widths.get("vdim", 8)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zero = x[:, :1, :1] * 0  # so that keys and values depend on the sample
            keys, values = self.keys + zero, self.values + zero
            return self.attention(x, value=values, key=keys)[0]

    found = {x.weight.partition(".")[2]: x for x in workloads(Cross(), torch.rand(2, 5, 8))}
    own = {"q_proj_weight": 5 * 8 * 8, "k_proj_weight": 7 * 6 * 8, "v_proj_weight": 7 * 3 * 8}
    assert {name: x.macs for name, x in found.items()} == {
        **(own if widths else {}),
        "out_proj.weight": 5 * 8 * 8,
    }
    rest = 2 * 5 * 7 * 8 + (0 if widths else 5 * 8 * 8 + 2 * 7 * 8 * 8)
    assert uncounted_macs(Cross(), torch.rand(1, 5, 8), list(found.values())) == rest


def test_an_lstm_of_linears_counts_each_step() -> None:
    samples = torch.randint(0, 9, (2, 5))
    model = LSTMLanguageModel(vocabulary=9, embedding=4, hidden=6)
    before = sum(x.dense_macs for x in workloads(model, samples))
    found = workloads(quantized(model, samples), samples)
    assert sum(x.dense_macs for x in found) == before
    found_calls = {x.weight: (x.rows, x.calls) for x in found}
    assert found_calls["lstm.layers.0.ih.weight"] == (5, 1)
    assert found_calls["lstm.layers.0.hh.weight"] == (5, 5)


def test_densities_of_activations_are_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, -1.0, -1.0, -1.0]))
    model.train()
    found = workloads(model, torch.ones(3, 4))
    assert [x.activation_density.value for x in found] == [1.0, 0.25]
    assert model.training


def test_groups_are_products_of_their_own() -> None:
    found = workloads(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), torch.rand(2, 4, 5, 5))[0]
    assert (found.groups, found.inputs, found.outputs, found.weights) == (2, 18, 3, 108)


def test_packed_sequences_are_refused() -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(pack_padded_sequence(x, [2, 2]))[0].data

    with pytest.raises(ConfigError, match="rnn: workloads are counted on padded tensors"):
        workloads(Packing(), torch.rand(2, 2, 3))


def compressed() -> LeNet300:
    """A tenth of the weights, in 15 clusters."""
    torch.manual_seed(0)
    model = LeNet300()
    with torch.no_grad():
        for layer in (model.fc1, model.fc2, model.fc3):
            weight = layer.weight
            weight[torch.rand(weight.shape) < 0.9] = 0
            book = cluster(weight, 15)
            weight.copy_(torch.cat((torch.zeros(1), book.values))[book.codes.long()])
    return model


def test_stages_of_a_compressed_model() -> None:
    model = compressed()
    state = model.state_dict()
    file = artifact.encode(state)
    found = {x.stage: x for x in stored_weights(state, names(model), file)}
    assert list(found) == ["dense", "pruned", "shared", "coded"]
    assert found["dense"].size == 4 * 266_610
    nonzero = int(state["fc1.weight"].count_nonzero())
    # A filler for each 32 zeros in a row: few at this density.
    assert nonzero * (5 + 32) / 8 <= found["pruned"].layers["fc1.weight"] < 1.1 * nonzero * 37 / 8
    codes = found["pruned"].layers["fc1.weight"] * (5 + 4) / (5 + 32)
    assert found["shared"].layers["fc1.weight"] == pytest.approx(codes + 4 * 15)
    sizes = [x.size for x in found.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert found["coded"].size < len(file)  # there is a frame, too
    assert {x.number for x in found.values()} == {"fp32"}


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))


def test_stages_of_a_quantized_model() -> None:
    model = quantized(small(), torch.rand(3, 40))
    state = model.state_dict()
    found = stored_weights(state, names(model), artifact.encode(state))
    assert [x.stage for x in found] == ["dense", "quantized", "coded"]
    assert found[1].layers["0.weight"] == 30 * 40 + 4 * 30
    assert [x.number for x in found] == ["fp32", "int8", "int8"]
    assert set(STAGES) > {x.stage for x in found}


def test_integers_that_share_values_keep_their_codes() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.copy_(cluster_values(model[0].weight))
    model = quantized(model, torch.rand(3, 40), per_channel=False, keep=["zeros", "sharing"])
    found = stored_weights(model.state_dict(), names(model))
    assert [x.stage for x in found] == ["dense", "shared", "quantized"]
    assert found[1].layers["0.weight"] == 30 * 40 * 4 / 8 + 4 * 16
    assert found[2].layers["0.weight"] == 30 * 40 * 4 / 8 + 4


def cluster_values(weight: torch.Tensor) -> torch.Tensor:
    """Sixteen values in place of all."""
    book = cluster(weight, 16)
    return book.values[book.codes.long() - 1]


def test_a_dense_model_has_one_stage() -> None:
    model = LeNet300()
    assert [x.stage for x in stored_weights(model.state_dict(), names(model))] == ["dense"]


def test_workloads_of_a_file(tmp_path) -> None:
    model = compressed()
    path = tmp_path / "model.dcz"
    path.write_bytes(artifact.encode(model.state_dict(), dtype="fp32"))
    samples = torch.rand(4, 1, 28, 28)
    found = artifact_workloads(path, LeNet300(), samples)
    assert found == workloads(model, samples)
    assert math.isclose(found[0].nonzero / found[0].weights, 0.1, abs_tol=0.01)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups: int) -> None:
    """A product for each position of the input: 5 x 6 of them, and 4 x 3 x 3 weights for each."""
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 3, stride=2, groups=groups))
    samples = torch.rand(2, 8, 5, 6)
    found = workloads(model, samples)[0]
    assert (found.rows, found.inputs, found.outputs) == (30, 8 // groups, 4 // groups * 9)
    assert (found.input_values, found.output_values) == (8 * 30, 4 * 11 * 13)
    assert found.macs == macs(model, samples[:1]) == 30 * 8 * 4 // groups * 9
    assert uncounted_macs(model, samples[:1], [found]) == 0


def test_costs_need_samples() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        workloads(small(), torch.rand(0, 40))


def test_rows_of_embeddings_that_are_read() -> None:
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20))
    tokens = torch.tensor([[3, 3, 7], [7, 7, 9]])
    assert read_fractions(model, tokens) == {"0.weight": 3 / 20}
    model[1].weight = model[0].weight  # the decoder reads all of it
    assert read_fractions(model, tokens) == {}


def test_rows_that_embeddings_of_one_weight_read_are_counted_together() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(20, 4), nn.Embedding(20, 4)
            self.second.weight = self.first.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.second(tokens[:, 1:]) + self.first(tokens[:, :1])

    tokens = torch.tensor([[3, 7, 3], [3, 8, 9]])
    assert read_fractions(Pair(), tokens) == {"first.weight": 4 / 20}


def test_arithmetic_is_in_integers_only_if_inputs_are_quantized() -> None:
    state = quantized(small(), torch.rand(3, 40), activations=None).state_dict()
    assert [x.number for x in stored_weights(state, names(small()))] == ["fp32", "fp32"]


def test_a_file_of_another_model() -> None:
    model = small()
    with pytest.raises(ConfigError, match=r"another model: it has no 0.weight"):
        stored_weights(
            model.state_dict(), names(model), artifact.encode(nn.Linear(2, 3).state_dict())
        )


def test_a_layer_that_is_called_for_each_sample() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.fc(sample) for sample in x])

    found = workloads(OneByOne(), torch.rand(8, 4))[0]
    assert (found.rows, found.input_values, found.output_values, found.calls) == (1, 4, 3, 1)
    found = workloads(OneByOne(), torch.rand(8, 5, 4))[0]
    assert (found.rows, found.input_values, found.output_values, found.calls) == (5, 20, 15, 1)


def test_padded_sequences_in_an_encoder_of_torch() -> None:
    """In evaluation, it would give its layers nested tensors."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x, src_key_padding_mask=x[..., 0] == 0)

    samples = torch.rand(2, 5, 8)
    samples[1, 3:] = 0
    assert [x.rows for x in workloads(Padded(), samples)] == 4 * [5]
