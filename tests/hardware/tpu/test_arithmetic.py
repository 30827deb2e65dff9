"""Conversion of sums to grids: rounding, clipping, added operands and tables."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.hardware.tpu.arithmetic import (
    FIXED_POINT,
    Grid,
    function_table,
    raw_sums,
    requantize,
    sigmoid,
    to_fixed_point,
)

ALL = slice(None)


def test_a_grid_rounds_as_fake_quantization_does() -> None:
    values = torch.linspace(-3, 5, 1001)
    grid = Grid(scale=float(torch.tensor(0.0231)), zero_point=77, max_integer=255)
    expected = torch.fake_quantize_per_tensor_affine(values, grid.scale, 77, 0, 255)
    torch.testing.assert_close(grid.dequantize(grid.quantize(values)), expected, rtol=0, atol=1e-6)


def test_a_range_is_extended_to_zero() -> None:
    assert Grid.spanning(2.0, 5.1).zero_point == 0
    assert Grid.spanning(2.0, 5.1).scale == pytest.approx(0.02)
    assert Grid.spanning(-5.1, -2.0) == Grid(pytest.approx(0.02), 255)
    assert Grid.spanning(0.0, 0.0).quantize(torch.zeros(2)).tolist() == [0, 0]


@given(
    st.integers(-(1 << 24), 1 << 24),
    st.floats(1e-7, 10),
    st.floats(-50, 50),
    st.integers(-(1 << 20), 1 << 20),
    st.integers(0, 255),
    st.one_of(st.none(), st.tuples(st.floats(1e-3, 1), st.integers(0, 255), st.integers(0, 255))),
)
def test_it_rounds_the_exact_value_to_the_nearest_integer(
    value: int, scale: float, bias: float, zero_sum: int, zero_point: int, other
) -> None:
    output = Grid(0.05, zero_point)
    operand = Grid(other[0], other[1]) if other else None
    epilogue = requantize(
        np.array([scale]), np.array([bias]), np.array([zero_sum]), output, operand=operand
    )
    added = None if other is None else np.array([[other[2]]])
    found = int(epilogue.apply(np.array([[value]]), added, ALL)[0, 0])
    exact = Fraction(scale) * (value - zero_sum) + Fraction(bias)
    if other:
        exact += Fraction(other[0]) * (other[2] - other[1])
    exact = exact / Fraction(output.scale) + zero_point
    # The multiplier has 30 bits: results next to the middle between two integers may differ.
    rounded = {min(max(floor(exact + Fraction(1, 2) + s), 0), 255) for s in (-0.01, 0, 0.01)}
    assert found in rounded


def test_relu_stops_at_the_zero_point() -> None:
    scales, none = np.array([0.1]), np.zeros(1, np.int64)
    sums = np.array([[-100], [0], [30], [10_000]])
    for relu, expected in ((True, [50, 50, 80, 255]), (False, [0, 50, 80, 255])):
        epilogue = requantize(scales, np.zeros(1), none, Grid(0.1, 50), relu)
        assert epilogue.apply(sums, None, ALL).ravel().tolist() == expected


def test_channels_have_their_own_multipliers() -> None:
    scales = np.array([0.1, 1.0, 1e-6])
    epilogue = requantize(scales, np.zeros(3), np.zeros(3, np.int64), Grid(0.1, 0))
    sums = np.array([[7, 7, 70_000]])
    assert epilogue.apply(sums, None, ALL).tolist() == [[7, 70, 1]]
    assert epilogue.apply(sums[:, 1:], None, slice(1, 3)).tolist() == [[70, 1]]


def test_raw_sums_lose_only_what_zero_points_add() -> None:
    epilogue = raw_sums(np.array([5, -5]))
    assert epilogue.apply(np.array([[1 << 30, 0]]), None, ALL).tolist() == [[(1 << 30) - 5, 5]]


def test_a_table_is_looked_up_at_fixed_points() -> None:
    grid = Grid(1 / 255, 0)
    table = function_table(sigmoid, grid, 0, 255)
    index = np.array([-1, 0, 1]) * int(1 / FIXED_POINT) + (1 << 15)
    assert table[index].tolist() == [round(255 * float(sigmoid(np.array(x)))) for x in (-1, 0, 1)]
    epilogue = to_fixed_point(np.array([0.01]), np.zeros(1), np.zeros(1, np.int64))
    sums = np.array([[123], [10**6], [-(10**6)]])
    assert epilogue.apply(sums, None, ALL).ravel().tolist() == [1260, 32767, -32768]
