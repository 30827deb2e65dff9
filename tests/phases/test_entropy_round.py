"""Rounding after training: fewer bits at the same error, from the inputs of layers alone."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.rate import cheapest, magnitude_bits
from trainer.engine.world import World
from trainer.errors import ConfigError, Diverged
from trainer.phases import EntropyPenalty, EntropyRound, Phase, StructuralPhase, StructuredPrune

WORLD = World.single(torch.device("cpu"))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Embedding(30, 32), nn.Linear(32, 80), nn.ReLU(), nn.Linear(80, 60, bias=False))
    )
    laplace = torch.distributions.Laplace(0.0, 1.0)
    with torch.no_grad():
        for weight in (model[1].weight, model[3].weight):
            weight.copy_(laplace.sample(weight.shape))
        model[3].weight[:, ::4] = 0
    return model


INPUTS = torch.arange(600).view(100, 6).remainder(30)


@torch.no_grad()
def rounded(step: float, rate: float, trellis: bool = False) -> tuple[nn.Sequential, float, int]:
    """The model, the error of its outputs relative to them, and the bytes of its file."""
    model = make_model()
    expected = model(INPUTS)
    phase = EntropyRound(step=step, rate=rate, trellis=trellis, samples=50)
    phase.observe(model, WORLD, [INPUTS[:50]])
    phase.enter(model, WORLD)
    phase.leave(model)
    error = float((model(INPUTS) - expected).norm() / expected.norm())
    return model, error, len(artifact.encode(model.state_dict()))


def test_a_price_for_bits_makes_the_file_smaller_at_the_same_error() -> None:
    _, error, size = rounded(0.86, 0.0)
    _, cheap_error, cheap_size = rounded(0.8, 0.1)
    assert cheap_error < error
    assert cheap_size < 0.97 * size


def test_weights_are_integers_times_a_step_and_zeros_stay() -> None:
    model, error, _ = rounded(0.2, 0.1)
    assert error < 0.1
    for index in (0, 1, 3):
        weight = model[index].weight
        before = make_model()[index].weight
        step = (0.2 * before[before != 0].square().mean().sqrt()).half().float()
        integers = weight / step
        assert torch.allclose(integers, integers.round(), atol=1e-3)
    assert not model[3].weight[:, ::4].any()
    content = artifact.encode(model.state_dict())
    kinds = {layer["name"]: layer["kind"] for layer in artifact.describe(content).layers}
    assert kinds["0.weight"] == kinds["1.weight"] == kinds["3.weight"] == "uniform"


def test_a_trellis_makes_the_error_smaller_at_the_same_bytes() -> None:
    _, error, size = rounded(0.4, 0.0)
    model, trellis_error, trellis_size = rounded(0.44, 0.0, trellis=True)
    assert trellis_error < 0.95 * error
    assert trellis_size <= size
    assert not model[3].weight[:, ::4].any()
    layers = artifact.describe(artifact.encode(model.state_dict())).layers
    assert [layer["kind"] for layer in layers if layer["name"].endswith("weight")] == 3 * [
        "trellis"
    ]


def test_groups_of_a_convolution_are_rounded_without_a_trellis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 30, 3), nn.Conv2d(30, 30, 3, groups=10))
    phase = EntropyRound(step=0.5, trellis=True, samples=8)
    phase.observe(model, WORLD, [torch.randn(8, 2, 7, 7)])
    phase.enter(model, WORLD)
    layers = artifact.describe(artifact.encode(model.state_dict())).layers
    kinds = {layer["name"]: layer["kind"] for layer in layers}
    assert kinds["0.weight"] == "trellis"
    assert kinds["1.weight"] == "uniform"


def test_biases_restore_the_mean_of_each_output() -> None:
    model = make_model()
    means = [make_model()[:2](INPUTS).mean((0, 1))]
    phase = EntropyRound(step=0.5, samples=100)
    phase.observe(model, WORLD, [INPUTS])
    phase.enter(model, WORLD)
    means.append(model[:2](INPUTS).mean((0, 1)))
    assert torch.allclose(*means, atol=1e-4)


def test_the_cheapest_integer_is_that_of_all() -> None:
    torch.manual_seed(0)
    scaled = 3 * torch.randn(500)
    bits = magnitude_bits(scaled.round())
    every = torch.arange(1 - len(bits), len(bits))
    costs = (scaled[:, None] - every).square() + 0.3 * bits[every.abs()]
    found = cheapest(scaled, bits, 0.3)
    best = every[costs.argmin(1)]

    def cost(integers: Tensor) -> Tensor:
        return (scaled - integers).square() + 0.3 * bits[integers.abs().long()]

    assert float((cost(found) - cost(best)).mean()) < 0.01
    assert torch.equal(cheapest(scaled, bits, 0.0), scaled.round())


def test_tiny_weights_are_rounded_and_other_types_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    phase = EntropyRound(samples=16)
    phase.observe(model, WORLD, [torch.randn(16, 6)])
    phase.enter(model, WORLD)
    assert bool(model[0].weight.isfinite().all())
    with pytest.raises(ConfigError, match=r"0\.weight: only weights stored as float32"):
        phase.check_model(model.bfloat16())


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("factor", [2.0**-80, 2.0**-24, 2.0**12])
def test_tiny_and_large_weights_are_rounded_alike(factor: float, trellis: bool) -> None:
    found = []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        layer = nn.Linear(6, 8, bias=False)
        phase = EntropyRound(trellis=trellis, samples=16)
        phase.observe(layer, WORLD, [torch.randn(16, 6)])
        with torch.no_grad():
            layer.weight.mul_(scale)
        phase.enter(layer, WORLD)
        found.append(layer.weight.detach())
    assert found[0].any()
    assert torch.equal(found[0] * factor, found[1])


@pytest.mark.parametrize("trellis", [False, True])
def test_a_step_too_small_for_fp32_is_enlarged(trellis: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 80, bias=False), nn.Embedding(50, 9))
    with torch.no_grad():
        before = [weight.mul_(4).clone() for weight in model.parameters()]
    phase = EntropyRound(step=1e-9, trellis=trellis, samples=16)
    phase.observe(model[0], WORLD, [torch.randn(16, 6)])
    phase.enter(model[0], WORLD)
    phase.enter(model[1], WORLD)
    for weight, old in zip(model.parameters(), before, strict=True):
        step = float(old.abs().max()) / 4095
        assert float((weight.detach() - old).abs().mean()) < step
        assert float(weight.detach().abs().max()) > 4000 * step


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_of_inf_or_nan_are_refused(value: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    phase = EntropyRound(samples=16)
    phase.observe(model, WORLD, [torch.full((16, 6), value)])
    with pytest.raises(Diverged, match="the inputs of a layer, or their squares, are Inf or NaN"):
        phase.enter(model, WORLD)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"step": 0}, "step=0: it must be above 0"),
        ({"rate": -1}, "rate=-1: it must be at least 0"),
        ({"samples": 0}, "samples=0: it must be at least 1"),
        ({"epochs": 1}, "fit.epochs=1: this phase trains nothing"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EntropyRound(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("make", [EntropyRound, EntropyPenalty, StructuredPrune])
def test_weights_that_diverged_are_refused(value: float, make: type[Phase]) -> None:
    phases = {
        EntropyRound: EntropyRound(trellis=True),
        EntropyPenalty: EntropyPenalty(epochs=1, sort_units=True),
        StructuredPrune: StructuredPrune(0.5),
    }
    phase, model = phases[make], nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.constant_(model[0].weight[0, :1], value)
    said = "weights are Inf or NaN: the training before"
    if value == 1e30:
        said = r"weights reach 1e\+30, and a file holds steps of a grid up to 65,504: the training"
    refused = pytest.raises(Diverged, match=said)
    if value == 1e30 and make is StructuredPrune:
        refused = contextlib.nullcontext()  # a valid model of very different weights
    with refused:
        phase.observe(model, WORLD, [torch.rand(4, 6)])
        if isinstance(phase, StructuralPhase):
            phase.plan_change(model, WORLD)
        else:
            phase.enter(model, WORLD)
