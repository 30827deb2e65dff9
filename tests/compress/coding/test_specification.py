"""A second decoder, written from docs/artifact.md alone, compared with the package."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.compress.coding import second_decoder
from tests.compress.coding.second_decoder import TABLE, decode, decode_file
from trainer import artifact
from trainer.artifact.container import DICTIONARY
from trainer.compress.codebooks import cluster
from trainer.compress.coding import ans, context
from trainer.compress.coding.layer import CODERS
from trainer.compress.coding.tables import LIMIT, SQUASH
from trainer.compress.trellis import round_paths

Levels = NDArray[np.uint16]


@pytest.mark.parametrize(
    ("shape", "clusters", "below", "density", "near", "far", "speed"),
    [
        ((40, 49), 16, 7, 0.15, 7, 0, 0),
        ((12, 150), 8, 4, 0.3, 5, 25, 1),
        ((30, 64), 256, 100, 0.2, 0, 9, 2),
        ((60, 36), 1, 0, 0.05, 1, 18, 3),
        ((9, 20), 3000, 0, 1.0, 0, 0, 3),
        ((20, 30), 5, 5, 1.0, 2, 4, 0),
    ],
)
@pytest.mark.slow
def test_second_decoder(
    shape: tuple[int, int],
    clusters: int,
    below: int,
    density: float,
    near: int,
    far: int,
    speed: int,
) -> None:
    rng = np.random.default_rng(0)
    # Rows and columns of different density, and values that hang together.
    full = np.minimum(1, 6 * density * rng.random((shape[0], 1)) ** 2 * rng.random(shape[1]))
    kept = rng.random(shape) < (full if density < 1 else 1)
    values = clusters / 2 + clusters / 5 * rng.normal(size=shape).cumsum(1) / 2
    levels = (values.round().clip(1, clusters) * kept).astype(np.uint16)
    blob = context.encode(levels, clusters, below, near, far, speed)
    assert (blob[0] >> 3, blob[0] & 1) == (near + far > 0, density == 1.0)
    assert decode(blob, *shape, clusters, below) == levels.tolist()


def test_squash_is_rounded_exactly() -> None:
    """Rational bounds around exp by its series, at points where the argument is small enough."""
    assert [int(x) for x in SQUASH] == TABLE
    for x in range(-LIMIT, LIMIT + 1, 64):
        power = sum((Fraction(-x, 256) ** n / math.factorial(n) for n in range(80)), Fraction(0))
        assert max(1, math.floor(65536 / (1 + power))) == SQUASH[x + LIMIT]


def test_the_page_prints_the_preset_dictionary() -> None:
    assert second_decoder.preset_dictionary() == DICTIONARY


@pytest.mark.parametrize("alphabet", [2, 16, 300, 65535])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_second_ans_decoder(alphabet: int, count: int) -> None:
    rng = np.random.default_rng(count)
    for symbols in (rng.integers(0, min(alphabet, 40), count), np.full(count, alphabet - 1)):
        blob = ans.encode(symbols.astype(np.uint16), alphabet)
        assert second_decoder.ans(blob, count, alphabet) == symbols.tolist()


def sparse(*shape: int, density: float = 0.2) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) < density)


def shared(*shape: int, density: float = 0.2, k: int = 5) -> Tensor:
    book = cluster(sparse(*shape, density=density), k)
    return torch.cat((torch.zeros(1), book.values))[book.codes]


def pruned_model() -> dict[str, Tensor]:
    return {
        "conv.weight": sparse(6, 3, 3, 3),
        "conv.bias": torch.randn(6),
        "fc.weight": sparse(12, 30, density=0.05),
        "dense.weight": torch.randn(4, 9),
        "norm.running_mean": torch.rand(200),
    }


def shared_model() -> dict[str, Tensor]:
    return {
        "fc2.weight": shared(10, 24),
        "conv.weight": shared(6, 3, 3, 3, density=0.6, k=9),
        "full.weight": shared(8, 20, density=1.0, k=3),
        "positive.weight": shared(9, 11).abs(),
        "none.weight": torch.zeros(5, 7),
        "one.weight": torch.full((8, 9), -1.5),
    }


def quantized_model() -> dict[str, Tensor]:
    scales = {"fc": torch.rand(12), "conv": torch.rand(()), "tied": torch.rand(1)}
    shapes = {"fc": (12, 10), "conv": (4, 2, 3, 3), "tied": (6, 7)}
    found: dict[str, Tensor] = {}
    for name, scale in scales.items():
        integers = torch.randint(-127 if name == "fc" else -3, 4, shapes[name]).to(torch.int8)
        sides = scale.view(-1, *[1] * (integers.ndim - 1)) if scale.ndim else scale
        found[f"{name}.weight"] = integers * sides
        found[f"{name}.weight_quantizer.scale"] = scale
        found[f"{name}.weight_quantizer.width"] = torch.tensor(8, dtype=torch.uint8)
    return {**found, "again.weight": found["tied.weight"]}


def uniform_model() -> dict[str, Tensor]:
    def grid(*shape: int, low: int = -3, high: int = 4, step: float = 0.25) -> Tensor:
        integers = torch.randint(low, high + 1, shape) * (torch.rand(shape) < 0.5)
        return integers * torch.tensor(step)

    weight = grid(9, 14)
    return {
        "conv.weight": grid(5, 3, 3, 3, step=0.0371),
        "fc.weight": weight,
        "bias": grid(30, low=1, high=7),
        "negative": grid(6, 6, low=-20, high=-1, step=3e-9),
        "again.weight": weight,
        "plain": torch.randn(3, 4),
    }


def trellis_model() -> dict[str, Tensor]:
    def paths(*shape: int, step: float) -> Tensor:
        return round_paths(torch.randn(shape) * 3, 0.0) * torch.tensor(step)

    return {
        "conv.weight": paths(9, 4, 3, 3, step=0.0371),
        "fc.weight": paths(20, 30, step=3e-9),
        "uniform": torch.randint(-3, 4, (9, 14)) * torch.tensor(0.25),
        "plain": torch.randn(3, 4),
    }


def tied_model() -> dict[str, Tensor]:
    weight = shared(20, 12, density=0.5)
    return {"encoder.weight": weight, "bias": torch.randn(3), "decoder.weight": weight}


def odd_model() -> dict[str, Tensor]:
    return {
        "a scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 5),
        "minus zero": torch.tensor([[0.0, -0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]]),
        "large": torch.tensor([1e6, 1.0 / 3]),
        "half": torch.randn(5, 6).half(),
        "brain": torch.randn(5, 6).bfloat16(),
        "double": torch.randn(4, 3).double(),
        "bool": torch.tensor([True, False, True]),
        "bytes": torch.arange(256).to(torch.uint8),
        "int8": torch.arange(-128, 128).to(torch.int8),
        "int16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
        "int32": torch.arange(300, dtype=torch.int32),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "\u540d": torch.arange(4.0),
    }


@pytest.mark.parametrize("coder", ["auto", *CODERS])
@pytest.mark.parametrize(
    "model",
    [
        *(pruned_model, shared_model, quantized_model, uniform_model, trellis_model),
        *(tied_model, odd_model),
    ],
)
@pytest.mark.slow
def test_second_decoder_of_whole_files(model: Callable[[], dict[str, Tensor]], coder: str) -> None:
    torch.manual_seed(0)
    content = artifact.encode(model(), coder=coder, about={"name": "test", "seed": 0})
    wanted, found = artifact.loads(content), decode_file(content)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        dtype, shape, elements = found[name]
        assert str(tensor.dtype).removeprefix("torch.") == NAMES[dtype]
        assert shape == list(tensor.shape)
        assert elements == bytes(tensor.reshape(-1).contiguous().view(torch.uint8).numpy()), name


NAMES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "i64": "int64",
    "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip
