"""ONNX files: integers where they belong, the same answers as PyTorch, any batch size."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.exporter import exporter_reads_its_operators_once  # noqa: F401 - a fixture
from trainer.config import FitConfig
from trainer.data.tree import call_with, map_tensors
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError
from trainer.export import check_installed
from trainer.export.onnx import is_quantized, named_inputs, to_onnx
from trainer.export.runtime import OnnxModel, latencies
from trainer.models import LeNet300, LSTMLanguageModel, ResNetCifar
from trainer.phases import Prune, Quantize

WORLD = World.single(torch.device("cpu"))


def quantized(model: nn.Module, inputs: Tensor, **settings) -> nn.Module:
    phase = Quantize(fit=FitConfig(epochs=1), **settings)
    phase.enter(model, WORLD)
    model.train()
    model(inputs)
    phase.after_step(model, WORLD, 1, 1)
    phase.leave(model)
    return model.eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 28, 28)


def dequantized(content: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases of a file: integers, and the numbers that they stand for."""
    graph = onnx.load_from_string(content).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            integers, scale = (held[name] for name in node.input[:2])
            shape = (-1, *[1] * (integers.ndim - 1)) if scale.ndim else ()
            found.append((integers, integers * scale.reshape(shape)))
    return found


@pytest.mark.slow
def test_any_bias_is_exact() -> None:
    """One that is huge beside the grids, one of a channel without weights, and ordinary ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 5), nn.Linear(5, 3)
    )
    with torch.no_grad():
        model[0].weight[0] *= 1e-9  # what a dead channel of a batch norm comes to
        model[0].bias.copy_(torch.tensor([0.5, 0.25, -1.5, 1e-3]))
        model[0].weight[1] = 0
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([0.3, -0.1, 1e-3, 2.0, 0.0]))
    faint = 1e-9 * images(16)
    model = quantized(model, faint, fold=False)  # steps of the first input are tiny
    model[3].bias.data[4] = 1e3
    before = model.state_dict()
    content = to_onnx(model, images(2))
    biases = {len(value): value for integers, value in dequantized(content) if integers.ndim == 1}
    for name in ("0.bias", "3.bias"):
        np.testing.assert_allclose(biases[len(before[name])], before[name], rtol=1e-6)
    np.testing.assert_allclose(biases[3], before["4.bias"], atol=2e-5)  # half a step
    file = OnnxModel(content)
    for batch in (faint[:3], images(3)):
        np.testing.assert_allclose(file(batch), model(batch).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_few_bits_have_exact_biases_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].bias.data = torch.tensor([0.1234, -0.4321, 0.0567])
    x = torch.rand(9, 2)
    model = quantized(model, x, bits=2, activations=2)
    np.testing.assert_allclose(OnnxModel(to_onnx(model, x))(x), model(x).detach(), atol=5e-3)


@pytest.mark.parametrize("change", [1.01, 2.0])
def test_a_weight_that_left_its_grid_is_refused(change: float) -> None:
    model = quantized(LeNet300(), images(8))
    model.fc2.weight.data *= change
    with pytest.raises(RunError, match=r"fc2.weight is not on the grid of its quantizer"):
        to_onnx(model, images(2))


@pytest.mark.parametrize("entry", ["weight", "bias", "input_quantizer.range"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_no_integer_represents_is_refused(entry: str, value: float) -> None:
    model = quantized(LeNet300(), images(8))
    tensor = model.fc2.state_dict()[entry]
    if entry.endswith("range"):
        value = torch.inf  # NaN says that there is no range
    tensor.view(-1)[1] = value
    with pytest.raises(RunError, match=rf"fc2\.{entry} holds NaN or Inf"):
        to_onnx(model, images(2))


@pytest.mark.slow
def test_a_plain_model_answers_as_pytorch_does() -> None:
    torch.manual_seed(0)
    model = LeNet300().eval()
    assert not is_quantized(model)
    file = OnnxModel(to_onnx(model, images(2)))
    for count in (1, 7):
        batch = images(count)
        np.testing.assert_allclose(file(batch), model(batch).detach(), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"per_channel": False}, {"bits": 4, "activations": 6}])
@pytest.mark.slow
def test_a_quantized_model_holds_integers_and_answers_as_pytorch_does(settings) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(216, 10)
    )
    Prune(0.5, fit=FitConfig()).enter(model, WORLD)
    model = quantized(model, images(64), **settings)
    assert is_quantized(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = to_onnx(model, images(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    assert __file__.encode() not in content  # the exporter notes which line made each node
    held = dequantized(content)
    assert sorted(str(integers.dtype) for integers, _ in held) == ["int32"] * 2 + ["int8"] * 2
    for integers, value in held:
        kind = "bias" if integers.ndim == 1 else "weight"
        name = f"{0 if len(value) == 6 else 4}.{kind}"
        if kind == "weight":
            assert np.array_equal(integers == 0, before[name] == 0)
            np.testing.assert_allclose(value, before[name], rtol=1e-6)
        else:
            np.testing.assert_allclose(value, before[name], rtol=1e-3, atol=1e-4)

    file = OnnxModel(content)
    for count in (1, 32):
        batch = images(count)
        expected = model(batch).detach()
        # A rounding that falls the other way is one step of an input, times a weight.
        np.testing.assert_allclose(file(batch), expected, atol=float(expected.abs().max()) / 20)
        same = torch.as_tensor(file(batch)).argmax(-1) == expected.argmax(-1)
        assert int(same.sum()) >= count - 1


@pytest.mark.slow
def test_few_bits_of_activations_end_where_the_grid_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    model = quantized(model, torch.linspace(-1, 1, 40).view(10, 4), activations=3)
    far = torch.tensor([[9.0, -9.0, 0.3, 0.0]])
    file = OnnxModel(to_onnx(model, far.repeat(2, 1)))
    np.testing.assert_allclose(file(far), model(far).detach(), atol=1e-3)


@pytest.mark.slow
def test_a_residual_net_is_folded_and_its_convolutions_are_integers(tmp_path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = quantized(ResNetCifar(8, in_channels=1), images(16), outputs=["conv", "*conv2"])
    content = to_onnx(model, images(2))
    file = OnnxModel(content)
    batch = images(8)
    expected = model(batch).detach()
    np.testing.assert_allclose(file(batch), expected, atol=float(expected.abs().max()) / 10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 7
    assert "Conv" not in kinds
    assert "BatchNormalization" not in kinds


@pytest.mark.slow
def test_a_language_model_with_tied_weights_answers_as_pytorch_does() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (4, 3))
    model = quantized(LSTMLanguageModel(11, 8, 8, tied=True), tokens)
    content = to_onnx(model, tokens[:2])
    file = OnnxModel(content)
    expected = model(tokens[:3]).detach()
    made = file(tokens[:3])
    assert made.shape == (3, 3, 11)
    np.testing.assert_allclose(made, expected, atol=float(expected.abs().max()) / 20)


def widths(model: nn.Module) -> list[str]:
    """Of the weights."""
    return [name for name in model.state_dict() if name.endswith(".width") and "put_" not in name]


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.rnn = kind(8, 6, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.rnn(x)[0]
        return made


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0]
        return made


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.t() @ self.up.t() + self.bias


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: Recurrent(nn.GRU), torch.randn(5, 2, 8)),
        (lambda: Recurrent(nn.RNN), torch.randn(5, 2, 8)),
        (Attending, torch.randn(5, 4, 8)),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
            torch.randn(5, 4, 8),
        ),
        (
            lambda: nn.Sequential(
                nn.ConvTranspose2d(4, 6, 3, groups=2),
                nn.ReLU(),
                nn.ConvTranspose2d(6, 4, 3, 2),
                nn.ReLU(),
                nn.Conv2d(4, 2, 3),
            ),
            torch.randn(5, 4, 3, 3),
        ),
        (lambda: nn.Sequential(LowRank()), torch.randn(5, 4)),
    ],
    ids=["gru", "rnn", "attention", "encoder", "transposed", "own"],
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.slow
def test_layers_of_many_kinds_answer_as_pytorch_does(build, inputs, per_channel) -> None:
    torch.manual_seed(0)
    model = quantized(build(), inputs, per_channel=per_channel, layers=[LowRank])
    content = to_onnx(model, inputs[:2])
    weights = [integers for integers, _ in dequantized(content) if integers.ndim > 1]
    assert len(weights) == len(widths(model)) > 0
    assert all(integers.dtype == np.int8 for integers in weights)
    expected = model(inputs).detach()
    np.testing.assert_allclose(
        OnnxModel(content)(inputs), expected, atol=float(expected.abs().max()) / 40
    )


@pytest.mark.slow
def test_what_cannot_be_exported_is_said() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Decomposed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x)[1]

    with pytest.raises(RunError, match="Odd cannot be exported to ONNX: Could not guard on data-"):
        to_onnx(Odd(), torch.ones(2, 3))
    with pytest.raises(RunError, match=r"Decomposed cannot be .*: No ONNX function .*_linalg_svd"):
        to_onnx(Decomposed(), torch.ones(2, 3))


def test_a_missing_package_is_named(monkeypatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = r"onnxruntime cannot be imported.*pip install '\.\[onnx\]'"
    with pytest.raises(ConfigError, match=said):
        check_installed()


@pytest.mark.slow
def test_latencies_are_those_of_each_model() -> None:
    torch.manual_seed(0)
    small = OnnxModel(to_onnx(nn.Sequential(nn.Linear(4, 2)), torch.ones(2, 4)))
    found = latencies({"a": small, "b": small}, torch.ones(1, 4))
    assert set(found) == {"a", "b"}
    assert all(0 < value < 1000 for value in found.values())


class Pair(nn.Module):
    """Two named inputs and one that is not used; the prediction is in an object, beside a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(logits=self.fc(a + b), cache=object())


@pytest.mark.slow
def test_several_inputs_and_a_prediction_in_an_object() -> None:
    def predict(model: nn.Module, inputs: Any) -> Any:
        return call_with(model, inputs).logits

    model, (a, b, c) = Pair(), torch.randn(3, 4, 3).unbind()
    inputs = {"b": b, "a": a, "c": c}
    sample = map_tensors(lambda tensor: tensor[:2], inputs)
    file = OnnxModel(to_onnx(model, sample, predict))
    np.testing.assert_allclose(file(inputs), model(a, b, c).logits.detach(), atol=1e-6)
    assert [*named_inputs((a, b))] == ["input_0", "input_1"]


@pytest.mark.slow
def test_several_inputs_by_position_and_their_output_as_the_prediction() -> None:
    model, (a, b) = nn.Bilinear(3, 3, 2), torch.randn(2, 4, 3).unbind()
    file = OnnxModel(to_onnx(model, (a[:2], b[:2])))
    np.testing.assert_allclose(file((a, b)), model(a, b).detach(), atol=1e-6)
