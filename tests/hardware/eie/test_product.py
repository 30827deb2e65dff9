"""The product that EIE computes with shared weights."""

import numpy as np
import pytest
import torch

from trainer import artifact
from trainer.compress.codebooks import cluster
from trainer.errors import ConfigError
from trainer.hardware.eie import (
    EieSettings,
    FixedPoint,
    Formats,
    SharedMatrix,
    artifact_matrices,
    encode,
    fixed_point_product,
    product,
    random_activations,
    random_codes,
    shared_matrix,
    simulate,
)

SETTINGS = EieSettings(elements=8)


def test_integers_give_exactly_the_dense_product() -> None:
    codebook = np.arange(16, dtype=np.float32) - 8
    codebook[0] = 0
    codes = random_codes(100, 300, 0.05)
    activations = np.round(100 * random_activations(300, 0.4))
    found = product(encode(codes, SETTINGS), codebook, activations)
    assert np.array_equal(found, codebook[codes] @ activations)


def test_it_equals_the_layer_of_a_compressed_model(tmp_path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 50, bias=False)
    weight = layer.weight.detach()
    weight[torch.rand(50, 64) < 0.8] = 0
    book = cluster(weight, 15)
    weight.copy_(torch.cat((torch.zeros(1), book.values))[book.codes.long()])
    path = tmp_path / "model.dcz"
    state = {"fc.weight": weight, "fc.bias": torch.zeros(50)}
    path.write_bytes(artifact.encode(state, dtype="fp32"))
    matrices = artifact_matrices(path)
    assert list(matrices) == ["fc.weight"]
    shared = matrices["fc.weight"]
    assert np.array_equal(shared.dense(), weight.numpy())
    assert shared.density == pytest.approx(0.2, abs=0.03)
    x = torch.rand(64).relu()
    found = product(encode(shared.codes, SETTINGS), shared.codebook, x.numpy())
    torch.testing.assert_close(torch.from_numpy(found).float(), layer(x))


def test_only_shared_matrices_have_codes() -> None:
    with pytest.raises(ConfigError, match="not shared"):
        shared_matrix(torch.randn(10, 10))
    with pytest.raises(ConfigError, match="4-D weight"):
        shared_matrix(torch.ones(2, 2, 2, 2))


def test_densities_of_random_matrices() -> None:
    codes = random_codes(1000, 1000, 0.09, seed=3)
    assert np.count_nonzero(codes) / codes.size == pytest.approx(0.09, abs=0.002)
    assert codes.max() == 15
    assert np.array_equal(codes, random_codes(1000, 1000, 0.09, seed=3))
    assert np.count_nonzero(random_activations(1000, 0.351)) == 351
    assert SharedMatrix(codes[:0], np.zeros(1, np.float32)).density == 0


def fixed_by_hand(codes, codebook, activations, formats: Formats) -> list[int]:
    """Row by row in Python integers."""
    weights = formats.weights.encode(codebook).tolist()
    inputs = formats.activations.encode(activations).tolist()
    shift = formats.weights.fraction + formats.activations.fraction - formats.sums.fraction
    sums = []
    for row in codes.tolist():
        total = 0
        for code, value in zip(row, inputs, strict=True):
            added = (weights[code] * value + (1 << shift >> 1)) >> shift
            total = min(max(total + added, -(1 << 15)), (1 << 15) - 1)
        sums.append(total)
    return sums


@pytest.mark.parametrize("fraction", [10, 4, 15])  # the last one saturates
def test_fixed_point_rounds_shifts_and_saturates(fraction: int) -> None:
    generator = np.random.default_rng(0)
    codebook = np.concatenate(([0], generator.normal(0, 0.5, 15)))
    codes = random_codes(40, 60, 0.2)
    activations = random_activations(60, 0.7)
    formats = Formats(FixedPoint.holding(2), FixedPoint.holding(1), FixedPoint(fraction))
    found = fixed_point_product(encode(codes, SETTINGS), codebook, activations, formats)
    assert found.tolist() == fixed_by_hand(codes, codebook, activations, formats)
    if fraction == 10:
        exact = codebook[codes] @ activations
        assert np.abs(formats.sums.decode(found) - exact).max() < 0.02
    if fraction == 15:
        assert found.max() == (1 << 15) - 1


def test_the_format_of_a_range() -> None:
    assert FixedPoint.holding(0.999).fraction == 15
    assert FixedPoint.holding(2).fraction == 13
    assert FixedPoint(3).encode(np.array([0.13, -1e9, 1e9])).tolist() == [1, -32768, 32767]
    formats = Formats(FixedPoint(1), FixedPoint(1), FixedPoint(3))
    with pytest.raises(ValueError, match="finer"):
        fixed_point_product(encode(np.ones((1, 1)), SETTINGS), np.ones(2), np.ones(1), formats)


def test_vectors_and_codebooks_of_another_length_are_refused() -> None:
    """The loops would read other memory."""
    matrix, codebook = encode(random_codes(50, 70, 0.1), EieSettings()), np.zeros(16)
    for length in (7, 7000):
        with pytest.raises(ValueError, match=r"it must be \[70\], one value for each"):
            product(matrix, codebook, np.ones(length))
        with pytest.raises(ValueError, match=r"it must be \[70\], one value for each"):
            simulate(matrix, np.ones(length), EieSettings())
    with pytest.raises(ValueError, match="a codebook of 15 values: the matrix has codes up to 15"):
        product(matrix, codebook[:15], np.ones(70))
    with pytest.raises(ValueError, match="none may be negative"):
        encode(np.full((3, 3), -1), EieSettings())
