"""Quantized models on the TPU: equal to an integer reference, close to their floats."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.hardware.tpu.models import quantized
from trainer import artifact
from trainer.compress.rewrite import restore
from trainer.errors import ConfigError, RunError
from trainer.hardware.tpu import (
    TPU_V1,
    TpuSettings,
    compile_network,
    execute,
    execute_integers,
    lower,
    reference,
)
from trainer.models import ConvNet, LeNet5, LeNet300, LSTMLanguageModel, ResNetCifar

SMALL = TpuSettings(array_size=32, accumulators=128, weight_fifo_tiles=3)


class PreActivation(nn.Module):
    """The convolution's result is needed before its ReLU, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        logits: Tensor = self.fc((self.second(x.relu()) + x).mean((2, 3)))
        return logits


class ProjectedShortcut(nn.Module):
    """Both operands of the addition are results of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 8, 1, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.second(self.first(images).relu()) + self.shortcut(images)
        logits: Tensor = self.fc(x.relu().mean((2, 3)))
        return logits


class LSTMClassifier(nn.Module):
    """Time comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 9)
        self.fc = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        logits: Tensor = self.fc(outputs).sigmoid()
        return logits


def images(*shape: int) -> Tensor:
    return torch.rand(*shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], float]] = {
    "LeNet-300-100": (LeNet300, lambda: images(5, 1, 28, 28), 1e-6),
    "LeNet-5": (LeNet5, lambda: images(3, 1, 28, 28), 1e-6),
    "ConvNet": (lambda: ConvNet(depth=3, width=8), lambda: images(2, 1, 28, 28), 1e-6),
    "ResNet-8": (lambda: ResNetCifar(8), lambda: images(2, 3, 16, 16), 0.03),
    "projected shortcut": (ProjectedShortcut, lambda: images(2, 3, 9, 9) - 0.5, 0.03),
    "pre-activation": (PreActivation, lambda: images(2, 3, 9, 9) - 0.5, 0.03),
    "language model": (
        lambda: LSTMLanguageModel(vocabulary=20, embedding=8, hidden=40, layers=2),
        lambda: torch.randint(0, 20, (3, 5)),
        0.03,
    ),
    "LSTM classifier": (LSTMClassifier, lambda: torch.randn(5, 3, 6), 0.01),
    "grouped, strided, dilated": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.Conv2d(8, 40, (3, 1), dilation=(2, 1), bias=False),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(120, 3),
        ),
        lambda: images(2, 4, 12, 12) - 0.3,
        0.02,
    ),
    "ends in a pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.MaxPool2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        lambda: images(2, 1, 8, 8),
        0.02,
    ),
}


@pytest.mark.parametrize("settings", [TPU_V1, SMALL], ids=["TPU v1", "small array"])
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_integer_reference_bit_for_bit(name: str, settings: TpuSettings) -> None:
    torch.manual_seed(0)
    build, draw, tolerance = MODELS[name]
    samples = draw()
    model = quantized(build(), samples)
    network = lower(model, samples)
    program = compile_network(network, settings)
    integers = network.quantize(samples)
    found = execute_integers(program, integers)
    assert found.shape == network.output.shape
    assert np.array_equal(found, reference(network, integers))
    with torch.no_grad():
        floats = model(samples)
    computed = execute(program, samples)
    assert computed.shape == floats.shape
    assert (computed - floats).abs().max() <= tolerance * floats.abs().max()


def test_a_pass_for_each_kernel_position_gives_the_same() -> None:
    torch.manual_seed(0)
    samples = images(2, 1, 28, 28)
    network = lower(quantized(LeNet5(), samples), samples)
    packed, unpacked = (
        compile_network(network, replace(TPU_V1, packed_kernels=packed)) for packed in (True, False)
    )
    assert len(unpacked.tiles) > len(packed.tiles)
    assert torch.equal(execute(packed, samples), execute(unpacked, samples))


def test_few_bits_and_scales_for_whole_weights() -> None:
    torch.manual_seed(0)
    samples = images(4, 1, 28, 28)
    model = quantized(LeNet300(), samples, bits=4, activations=5, per_channel=False)
    network = lower(model, samples)
    with torch.no_grad():
        torch.testing.assert_close(
            execute(compile_network(network), samples), model(samples), rtol=0, atol=1e-6
        )


def test_other_batches_need_another_program() -> None:
    samples = images(4, 1, 28, 28)
    program = compile_network(lower(quantized(LeNet300(), samples), samples))
    with pytest.raises(RunError, match=r"inputs \[4, 28, 28, 1\], not \[3, 28, 28, 1\]"):
        execute(program, samples[:3])


def test_no_samples() -> None:
    model = quantized(LeNet300(), images(2, 1, 28, 28))
    with pytest.raises(ConfigError, match="at least one"):
        lower(model, images(0, 1, 28, 28))


def test_compiling_leaves_the_model_as_it_is() -> None:
    samples = images(2, 1, 28, 28)
    model = quantized(LeNet300(), samples).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lower(model, samples)
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (chain(nn.LayerNorm([4, 8, 8])), r"cannot execute 1 \(LayerNorm\); it executes Linear"),
        (chain(nn.BatchNorm2d(4), nn.LeakyReLU()), r"2 \(LeakyReLU\)"),
        (chain(nn.MaxPool2d(2, ceil_mode=True)), "with ceil_mode"),
        (chain(nn.AvgPool2d(2, padding=1)), "padded averages"),
        (chain(nn.AdaptiveAvgPool2d(2)), "to more than one pixel"),
        (chain(nn.Linear(8, 2)), "of images that are not flattened"),
        (chain(nn.MaxPool2d(2), nn.Tanh()), r"2 \(Tanh\) of what is not the result of a matrix"),
        (chain(nn.AvgPool2d(2, divisor_override=3)), "or divisor_override"),
        (nn.Sequential(nn.Conv2d(1, 4, 4, padding="same")), "whose padding is uneven"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 8), nn.GRU(8, 4)), r"2 \(LinearGRU\)"),
        (chain(Branching()), "torch.fx cannot follow it"),
    ],
)
def test_what_the_tpu_cannot_execute_is_refused(model: nn.Module, reason: str) -> None:
    samples = images(2, 1, 10, 10)
    with pytest.raises(ConfigError, match=reason):
        lower(quantized(model, samples), samples)


def test_models_that_are_not_quantized_are_refused() -> None:
    samples = images(2, 1, 28, 28)
    with pytest.raises(ConfigError, match=r"the input of fc1 is not quantized: .*activations=8"):
        lower(LeNet300(), samples)
    model = quantized(LeNet300(), samples, exempt=["fc3"])
    with pytest.raises(ConfigError, match="the input of fc3 is not quantized"):
        lower(model, samples)
    model = quantized(LeNet300(), samples)
    del model.fc2.weight_quantizer
    with pytest.raises(ConfigError, match="fc2 is not quantized"):
        lower(model, samples)
    model = quantized(LeNet300(), samples, outputs=["fc2"])
    with pytest.raises(ConfigError, match=r"fc2 \(Linear\) with a quantized output"):
        lower(model, samples)


def test_weights_that_left_their_grid_are_refused() -> None:
    samples = images(2, 1, 28, 28)
    model = quantized(LeNet300(), samples)
    with torch.no_grad():
        model.fc2.weight += 0.3 * model.fc2.weight_quantizer.scale[:, None]
    with pytest.raises(ConfigError, match="fc2: something changed its weight"):
        lower(model, samples)


def test_infinite_results_are_refused() -> None:
    samples = images(2, 1, 28, 28)
    model = quantized(LeNet300(), samples)
    with torch.no_grad():
        model.fc3.bias.fill_(torch.inf)
    with pytest.raises(ConfigError, match="infinite or NaN"):
        lower(model, samples)


@pytest.mark.parametrize("name", ["projected shortcut", "language model"])
@pytest.mark.slow
def test_a_model_from_its_compressed_file(name: str) -> None:
    """The file holds integers and scales: the program computes the same."""
    torch.manual_seed(0)
    build, draw, _ = MODELS[name]
    samples = draw()
    state = artifact.loads(artifact.encode(quantized(build(), samples).state_dict()))
    model = restore(build(), state).eval()
    network = lower(model, samples)
    integers = network.quantize(samples)
    found = execute_integers(compile_network(network), integers)
    assert np.array_equal(found, reference(network, integers))
