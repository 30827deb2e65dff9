"""ONNX files: integers where they belong, the same answers as PyTorch, any batch size."""

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError
from trainer.export import check_installed
from trainer.export.onnx import is_quantized, to_onnx
from trainer.export.runtime import OnnxModel, correct, latencies
from trainer.models import LeNet300, LSTMLanguageModel, ResNetCifar
from trainer.phases import Prune, Quantize

WORLD = World.single(torch.device("cpu"))


def quantized(model: nn.Module, inputs: Tensor, **settings) -> nn.Module:
    phase = Quantize(FitConfig(epochs=1), **settings)
    phase.enter(model, WORLD)
    model.train()
    model(inputs)
    phase.after_step(model, WORLD, 1, 1)
    phase.leave(model)
    return model.eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 28, 28)


def test_a_plain_model_answers_as_pytorch_does() -> None:
    torch.manual_seed(0)
    model = LeNet300().eval()
    assert not is_quantized(model)
    file = OnnxModel(to_onnx(model, images(2)))
    for count in (1, 7):
        batch = images(count)
        np.testing.assert_allclose(file(batch), model(batch).detach(), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"per_channel": False}, {"bits": 4, "activations": 6}])
def test_a_quantized_model_holds_integers_and_answers_as_pytorch_does(settings) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(216, 10)
    )
    Prune(FitConfig(), 0.5).enter(model, WORLD)
    model = quantized(model, images(64), **settings)
    assert is_quantized(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = to_onnx(model, images(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    assert __file__.encode() not in content  # the exporter notes which line made each node
    graph = onnx.load_from_string(content).graph
    large = [numpy_helper.to_array(t) for t in graph.initializer if np.prod(t.dims) > 10]
    assert sorted(str(a.dtype) for a in large if a.ndim > 1) == ["int8", "int8"]
    for weight in (a for a in large if a.ndim > 1):
        name = "0" if weight.ndim == 4 else "4"
        scale = before[f"{name}.weight_quantizer.scale"]
        assert np.array_equal(weight == 0, before[f"{name}.weight"] == 0)
        scale = scale.view(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale
        np.testing.assert_allclose(weight * scale.numpy(), before[f"{name}.weight"], rtol=1e-6)

    file = OnnxModel(content)
    for count in (1, 32):
        batch = images(count)
        expected = model(batch).detach()
        # A rounding that falls the other way is one step of an input, times a weight.
        np.testing.assert_allclose(file(batch), expected, atol=float(expected.abs().max()) / 20)
        assert correct(file(batch), expected.argmax(-1)) >= count - 1


def test_few_bits_of_activations_end_where_the_grid_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    model = quantized(model, torch.linspace(-1, 1, 40).view(10, 4), activations=3)
    far = torch.tensor([[9.0, -9.0, 0.3, 0.0]])
    file = OnnxModel(to_onnx(model, far.repeat(2, 1)))
    np.testing.assert_allclose(file(far), model(far).detach(), atol=1e-3)


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


def test_a_language_model_with_tied_weights_answers_as_pytorch_does() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (4, 5))
    model = quantized(LSTMLanguageModel(11, 8, 8, tied=True), tokens)
    file = OnnxModel(to_onnx(model, tokens[:2]))
    expected = model(tokens[:3]).detach()
    made = file(tokens[:3])
    assert made.shape == (3, 5, 11)
    np.testing.assert_allclose(made, expected, atol=float(expected.abs().max()) / 20)


def test_what_cannot_be_exported_is_said() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RunError, match="Odd cannot be exported to ONNX: "):
        to_onnx(Odd(), torch.ones(2, 3))


def test_a_missing_package_is_named(monkeypatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime cannot be imported.*pip install 'trainer"):
        check_installed()


def test_latencies_are_those_of_each_model() -> None:
    torch.manual_seed(0)
    small = OnnxModel(to_onnx(nn.Sequential(nn.Linear(4, 2)), torch.ones(2, 4)))
    found = latencies({"a": small, "b": small}, torch.ones(1, 4))
    assert set(found) == {"a", "b"}
    assert all(0 < value < 1000 for value in found.values())
