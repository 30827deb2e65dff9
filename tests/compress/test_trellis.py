"""Trellis-coded quantization: paths, their levels, and what they gain."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.compress import trellis
from trainer.compress.rate import magnitude_bits
from trainer.compress.trellis import (
    cheapest_path,
    level_bits,
    levels_of,
    multiples_of,
    round_paths,
)


def entropy(levels: np.ndarray) -> float:
    """Bits for each level."""
    shares = np.unique(levels, return_counts=True)[1] / levels.size
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("shape", [(50, 7), (30, 2, 3, 3), (40,), ()])
def test_any_levels_are_a_path(shape: tuple[int, ...]) -> None:
    levels = np.random.default_rng(0).integers(-9, 10, shape).astype(np.int32)
    multiples = multiples_of(levels.copy())
    assert (np.abs(multiples - 2 * levels) <= 1).all()
    assert ((multiples == 0) == (levels == 0)).all()
    assert np.array_equal(levels_of(multiples), levels)


def test_other_multiples_are_not() -> None:
    multiples = multiples_of(np.full((9, 4), 2, np.int32))
    for row, column in itertools.product(range(9), range(4)):
        wrong = multiples.copy()
        wrong[row, column] += 1  # of the other grid
        assert levels_of(wrong) is None
    assert levels_of(np.ones((1, 1), np.int32)) is None  # begins on the even multiples


@pytest.mark.parametrize("price", [0.0, 0.1, 1.0])
def test_the_path_is_the_cheapest_of_all(price: float) -> None:
    torch.manual_seed(0)
    scaled = torch.randn(7, 4)
    bits = magnitude_bits(torch.tensor([0.0, 0, 1, 1, 2, 2, 2]))
    levels = np.array(list(itertools.product(range(-2, 3), repeat=7)), np.int32).T
    multiples = multiples_of(levels.copy())
    for column in scaled.t():
        path = cheapest_path(column[:, None], torch.ones(7, 1).bool(), bits, price)[:, 0]
        errors = (column[:, None] - torch.from_numpy(multiples) / 2).square().sum(0)
        costs = errors + price * bits[np.abs(levels)].sum(0)
        assert torch.equal(path, torch.from_numpy(multiples[:, costs.argmin()]) / 2)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_fewer_bits_than_the_nearest_integers_at_the_same_error(rate: float) -> None:
    weights = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    paths, integers = round_paths(weights / 0.35, rate), (weights / 0.3).round()
    error = (paths * 0.35 - weights).square().mean()
    assert error < (integers * 0.3 - weights).square().mean()
    levels = levels_of((2 * paths).int().numpy())
    assert levels is not None
    assert entropy(levels) < 0.97 * entropy(integers.numpy())


def test_weights_beyond_the_largest_level_become_it() -> None:
    path = cheapest_path(torch.full((40, 1), 9.0), torch.ones(40, 1).bool(), torch.zeros(4), 0.0)
    assert bool((path >= 1.5).all())  # of levels 2 and 3, whichever parity the trellis needs
    assert float(path.max()) == 3.0


def test_zeros_stay_and_a_layer_of_zeros_is_a_path() -> None:
    torch.manual_seed(0)
    weights: Tensor = torch.randn(30, 8) * (torch.rand(30, 8) < 0.4)
    paths = round_paths(weights / 0.1, 0.05)
    assert not paths[weights == 0].any()
    assert levels_of((2 * paths).int().numpy()) is not None
    assert not round_paths(torch.zeros(5, 3), 0.1).any()
    assert level_bits(torch.zeros(0, 3), 0.0).shape == (2,)


def test_many_columns_take_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    paths = trellis._cheapest

    def counted(weights: np.ndarray, *others: Any) -> None:
        calls.append(weights.shape)
        paths(weights, *others)

    monkeypatch.setattr(trellis, "_cheapest", counted)
    scaled = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    found = round_paths(scaled, 0.0)
    assert calls == [(3, 200)]
    bits = torch.zeros(2 + int(scaled.abs().max().round()))
    one = [cheapest_path(c[:, None], c[:, None] != 0, bits, 0.0) for c in scaled.t()]
    assert torch.equal(found, torch.cat(one, 1))
