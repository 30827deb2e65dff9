"""Levels in groups of inputs: smaller for patterns, right for all layers, and safe to decode."""

import numpy as np
import pytest

from trainer.compress.coding import CorruptError, groups
from trainer.compress.coding.coders import GroupCoder
from trainer.compress.coding.layer import NUMBERS, decode_layer, encode_layer
from trainer.testing import check_coder


def pattern(*shape: int) -> np.ndarray:
    """Levels of which 2 of 4 inputs survive: uint16 [out, ..., in] with the inputs second."""
    rng = np.random.default_rng(0)
    levels = rng.integers(1, 16, shape).astype(np.uint16)
    order = rng.random(shape).reshape(*shape[:-1], -1, 4).argsort(-1)
    levels *= (order < 2).reshape(shape).astype(np.uint16)
    return np.moveaxis(levels, -1, 1)


def test_it_codes_all_kinds_of_layers() -> None:
    check_coder(GroupCoder())


@pytest.mark.parametrize("shape", [(64, 128), (32, 3, 3, 32)])
def test_a_pattern_takes_two_thirds_of_a_bit_per_position(shape: tuple[int, ...]) -> None:
    levels = pattern(*shape)
    assert groups.has_pattern(levels)
    blob = encode_layer(levels, levels.shape, 15)
    assert blob[0] == NUMBERS["groups"]
    entropy = levels.size * (np.log2(6) / 4 + np.log2(15) / 2) / 8
    assert len(blob) < 1.02 * entropy + 60
    np.testing.assert_array_equal(decode_layer(blob, levels.shape, 15), levels)
    mask = (levels > 0).astype(np.uint16)
    assert len(encode_layer(mask, mask.shape, 1)) < 0.66 * levels.size / 8 + 40


def test_other_layers_are_not_tried() -> None:
    rng = np.random.default_rng(0)
    assert not groups.has_pattern(rng.integers(0, 2, (32, 32)).astype(np.uint16))
    assert not groups.has_pattern((rng.random((32, 32)) < 0.05).astype(np.uint16))
    assert not groups.has_pattern(np.ones(16, np.uint16))


def test_damaged_bytes_are_refused() -> None:
    levels = pattern(8, 16)
    blob = groups.encode(levels, 15)
    for bad in (b"", b"\5" + blob[1:], blob[:3], blob[:1] + b"\xff\x7f" + blob[2:]):
        with pytest.raises(CorruptError):
            groups.decode(bad, levels.shape, 15)
