"""Every coder gives back what it was given, and says so where bytes are none of its own."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.compress.coding import CorruptError, decode_floats, decode_layer, encode_floats
from trainer.compress.coding.layer import CODERS, encode_layer, max_positions


def matrix(rows, columns, clusters, density=0.2, seed=0):
    draw = np.random.default_rng(seed)
    levels = draw.integers(1, clusters, size=(rows, columns), endpoint=True)
    return (levels * (draw.random((rows, columns)) < density)).astype(np.uint16)


def there_and_back(levels, clusters, coder):
    blob = encode_layer(levels, levels.shape, clusters, None, coder)
    found = decode_layer(blob, levels.shape, clusters)
    assert found.dtype == np.uint16
    assert np.array_equal(found, levels)
    return blob


@pytest.mark.parametrize("coder", CODERS)
@given(
    rows=st.integers(0, 12),
    columns=st.integers(0, 40),
    clusters=st.sampled_from([1, 2, 3, 16, 300]),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_goes_in_comes_out(coder, rows, columns, clusters, density, seed):
    there_and_back(matrix(rows, columns, clusters, density, seed), clusters, coder)


@pytest.mark.parametrize("coder", [*CODERS, "auto"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_layer_of_one_value_can_be_read_again(coder, value):
    levels = np.full((300, 1000), value, dtype=np.uint16)
    assert levels.size <= max_positions(len(there_and_back(levels, 1, coder)))


@pytest.mark.parametrize("coder", CODERS)
def test_damaged_bytes_are_refused_or_make_levels_of_the_same_shape(coder):
    """The checksums of the file tell damage; here nothing else may happen."""
    blob = encode_layer(matrix(12, 30, 5), (12, 30), 5, None, coder)
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(blob)
        damaged[draw.randrange(1, len(blob))] ^= 1 << draw.randrange(8)
        del damaged[draw.choice([len(blob), draw.randrange(1, len(blob))]) :]
        shape = draw.choice([(12, 30), (30, 12), (1, 1), (7, 90)])
        clusters = draw.choice([1, 5, 300])
        try:
            found = decode_layer(bytes(damaged), shape, clusters)
        except CorruptError:
            continue
        assert found.shape == shape
        assert int(found.max()) <= clusters


@given(st.binary(max_size=300), st.sampled_from([1, 2, 4, 8]))
def test_numbers_come_back(raw, width):
    raw = raw[: len(raw) // width * width]
    blob = encode_floats(raw, width)
    assert len(blob) <= len(raw) + 1
    assert decode_floats(blob, len(raw), width) == raw
