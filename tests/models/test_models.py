"""Contract suite of models: requirements of the loop, the phases and published tables."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.models import (
    VGG16,
    AlexNet,
    ConvNet,
    InceptionCifar,
    LeNet5,
    LeNet300,
    LSTMLanguageModel,
    ResNetCifar,
    resnet18,
    resnet50,
)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]  # shape of an input batch; tokens if it has two dimensions
    outputs: tuple[int, ...]
    parameters: int
    source: str  # where the number of parameters comes from


MNIST, IMAGENET = (3, 1, 28, 28), (2, 3, 224, 224)

# Built and run for real: cheap.
SMALL = {
    "lenet300": Case(LeNet300, MNIST, (3, 10), 266_200 + 410, "Han et al. 2015: 267K"),
    "lenet5": Case(LeNet5, MNIST, (3, 10), 430_500 + 580, "Caffe: 431,080"),
    "convnet": Case(
        ConvNet,
        MNIST,
        (3, 10),
        (25 + 1) * 32 + (32 * 25 + 1) * 32 + (32 * 49 + 1) * 128 + 129 * 10,
        "by hand",
    ),
    "inception": Case(
        lambda: InceptionCifar(2),
        (2, 3, 8, 8),
        (2, 10),
        # Convolutions of the stem and of the blocks, norms, and the linear layer.
        27 * 4
        + sum(w * (4 * i + 27 * w) for i, w in ((4, 2), (8, 4), (16, 6)))
        + 2 * (4 + 7 * (2 + 4 + 6))
        + 250,
        "by hand",
    ),
    "resnet20": Case(
        ResNetCifar, (3, 3, 32, 32), (3, 10), 269_722, "He et al. 2015, table 6: 0.27M"
    ),
    "resnet20_mnist": Case(
        lambda: ResNetCifar(in_channels=1), MNIST, (3, 10), 269_722 - 2 * 9 * 16, "by hand"
    ),
    "lstm": Case(
        lambda: LSTMLanguageModel(20, 6, 8, 2, dropout=0.5),
        (3, 5),
        (3, 5, 20),
        20 * 6 + 32 * (6 + 8 + 2) + 32 * (8 + 8 + 2) + 9 * 20,
        "by hand",
    ),
    "lstm_tied": Case(
        lambda: LSTMLanguageModel(20, 8, 8, 1, tied=True),
        (3, 5),
        (3, 5, 20),
        20 * 8 + 32 * (8 + 8 + 2) + 20,
        "by hand",
    ),
}
# On the meta device only: shapes without arithmetic.
LARGE = {
    "alexnet": Case(AlexNet, IMAGENET, (2, 1000), 60_965_224, "Han et al. 2015: 61M"),
    "vgg16": Case(VGG16, IMAGENET, (2, 1000), 138_357_544, "Simonyan & Zisserman 2014: 138M"),
    "resnet18": Case(resnet18, IMAGENET, (2, 1000), 11_689_512, "torchvision"),
    "resnet50": Case(resnet50, IMAGENET, (2, 1000), 25_557_032, "torchvision"),
    "resnet32": Case(
        lambda: ResNetCifar(32), (2, 3, 32, 32), (2, 10), 464_154, "He et al. 2015: 0.46M"
    ),
    "resnet56": Case(
        lambda: ResNetCifar(56), (2, 3, 32, 32), (2, 10), 853_018, "He et al. 2015: 0.85M"
    ),
    "lstm_medium": Case(
        lambda: LSTMLanguageModel(10_000, 650, 650, 2),
        (2, 35),
        (2, 35, 10_000),
        19_780_400,
        "Zaremba et al. 2014: 20M",
    ),
}


@pytest.fixture(params=SMALL)
def case(request: pytest.FixtureRequest) -> Case:
    return SMALL[request.param]


def example(case: Case) -> tuple[Tensor, Tensor]:
    """A fixed random batch: inputs and integer targets."""
    generator = torch.Generator().manual_seed(7)
    classes = case.outputs[-1]
    if len(case.inputs) == 2:
        inputs = torch.randint(classes, case.inputs, generator=generator)
    else:
        inputs = torch.randn(case.inputs, generator=generator)
    return inputs, torch.randint(classes, case.outputs[:-1], generator=generator)


def seeded(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


@pytest.mark.parametrize("name", SMALL | LARGE)
def test_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = (SMALL | LARGE)[name].build()
    # parameters() names a tied weight once.
    assert sum(p.numel() for p in model.parameters()) == (SMALL | LARGE)[name].parameters


@pytest.mark.parametrize("name", SMALL | LARGE)
@pytest.mark.slow
def test_maps_a_batch_to_logits_and_reaches_every_parameter(name: str) -> None:
    case = (SMALL | LARGE)[name]
    with torch.device("meta"):
        model = case.build()
        inputs = torch.empty(
            case.inputs, dtype=torch.int64 if len(case.inputs) == 2 else torch.float32
        )
    logits = model(inputs)
    logits.sum().backward()
    assert logits.shape == case.outputs
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_gradients_are_finite_and_not_all_zero(case: Case) -> None:
    model = seeded(case)
    inputs, targets = example(case)
    cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_same_seed_same_weights(case: Case) -> None:
    first, second = seeded(case).state_dict(), seeded(case).state_dict()
    other = case.build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_starts_near_a_uniform_guess(case: Case) -> None:
    """The loss of untrained weights is near log(classes): the initialisation has a sane scale."""
    model = seeded(case)
    inputs, targets = example(case)
    loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
    expected = torch.tensor(float(case.outputs[-1])).log()
    assert abs(loss - expected) < 1.5


@pytest.mark.parametrize("name", [name for name in SMALL if len(SMALL[name].inputs) == 4])
def test_channels_last_gives_the_same_logits(name: str) -> None:
    model = seeded(SMALL[name]).eval()
    inputs, _ = example(SMALL[name])
    with torch.no_grad():
        expected = model(inputs)
        model.to(memory_format=torch.channels_last)
        found = model(inputs.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_is_deterministic(case: Case) -> None:
    model = seeded(case).eval()
    inputs, _ = example(case)
    with torch.no_grad():
        assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("size", [224, 227])
def test_alexnet_takes_both_customary_image_sizes(size: int) -> None:
    with torch.device("meta"):
        assert AlexNet()(torch.empty(1, 3, size, size)).shape == (1, 1000)


def test_residual_blocks_of_imagenet_add_their_input() -> None:
    """With all batch norms at zero, the blocks pass on what they get: relu(0 + x)."""
    torch.manual_seed(0)
    block = resnet18(3).stages[0]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    x = torch.rand(1, 64, 4, 4)
    assert torch.equal(block(x), x)


def test_cifar_shortcut_subsamples_and_pads_with_zeros() -> None:
    model = ResNetCifar()
    block = model.blocks[3]  # the first of the second stage: 16 to 32 filters, half the size
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    y = block(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_cifar_depth_must_be_six_n_plus_two(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth={depth}: it must be 6n"):
        ResNetCifar(depth)


def test_tied_embedding_is_one_tensor() -> None:
    model = LSTMLanguageModel(20, 8, 8, tied=True)
    assert model.decoder.weight is model.encoder.weight
    with pytest.raises(ValueError, match="tied=true needs embedding and hidden to be equal"):
        LSTMLanguageModel(20, 8, 16, tied=True)


def test_language_model_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = LSTMLanguageModel(20, 8, 16, 2).eval()
    tokens = torch.randint(20, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 20
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])
