"""Contract of layer coders: lossless, and safe with damaged data."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.compress.coding import CorruptError, decode_layer, encode_layer, max_positions
from trainer.compress.coding.layer import CODERS, NUMBERS
from trainer.compress.coding.search import MAX_POSITIONS

Levels = NDArray[np.uint16]
ALL = [*CODERS, "auto"]
SHAPES = [(), (1,), (7,), (1, 1), (3, 5), (16, 16), (1, 40), (40, 1), (4, 3, 3, 3), (9, 12)]
slow = settings(deadline=None, max_examples=60)


def layer(seed: int, shape: tuple[int, ...], clusters: int, density: float) -> Levels:
    rng = np.random.default_rng(seed)
    levels = rng.integers(1, clusters + 1, shape, dtype=np.uint16)
    return np.asarray(levels * (rng.random(shape) < density), np.uint16)


layers = st.tuples(
    st.builds(
        layer,
        st.integers(0, 99),
        st.sampled_from(SHAPES),
        clusters := st.shared(st.sampled_from([1, 2, 3, 8, 33, 256, 65535]), key="clusters"),
        st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    ),
    clusters,
    st.sampled_from([None, 0, 1]),
)


@pytest.mark.parametrize("coder", ALL)
@slow
@given(layers)
@pytest.mark.slow
def test_round_trip(coder: str, case: tuple[Levels, int, int | None]) -> None:
    levels, clusters, negatives = case
    blob = encode_layer(levels, levels.shape, clusters, negatives, coder)
    decoded = decode_layer(blob, levels.shape, clusters, negatives)
    assert decoded.dtype == np.uint16
    assert decoded.shape == levels.shape
    np.testing.assert_array_equal(decoded, levels)
    assert levels.size <= max_positions(len(blob))


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("clusters", [1, 5, 200])
@pytest.mark.slow
def test_bits_near_the_entropy(coder: str, clusters: int) -> None:
    levels = layer(0, (200, 300), clusters, 0.1)
    ideal = 60_000 * (-0.1 * np.log2(0.1) - 0.9 * np.log2(0.9)) + 6_000 * np.log2(clusters)
    # Huffman pays for whole bits; the tables of 200 shares or lengths weigh something.
    assert len(encode_layer(levels, levels.shape, clusters, coder=coder)) * 8 < ideal * 1.09


def test_neighbours_are_worth_bytes() -> None:
    """Survivors that cluster in the plane of the image cost less than scattered ones."""
    y, x = np.mgrid[:28, :28]
    rng = np.random.default_rng(1)
    centres = rng.integers(4, 24, (50, 2))
    blobs = [(y - a) ** 2 + (x - b) ** 2 < 9 for a, b in centres]
    image = np.array(blobs, np.uint16).reshape(50, 784)
    scattered = rng.permuted(image, axis=1)
    assert len(encode_layer(image, (50, 784), 1)) < 0.5 * len(encode_layer(scattered, (50, 784), 1))


def test_auto_takes_the_smallest() -> None:
    levels = layer(3, (30, 49), 8, 0.2)
    sizes = [len(encode_layer(levels, levels.shape, 8, coder=name)) for name in CODERS]
    assert len(encode_layer(levels, levels.shape, 8)) == min(sizes)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert encode_layer(np.zeros(shape, np.uint16), shape, 4) == b""
    assert decode_layer(b"", shape, 4).shape == shape
    with pytest.raises(CorruptError):
        decode_layer(b"\0", shape, 4)


def test_wider_than_the_context_coder_goes() -> None:
    levels = layer(0, (3, 70_000), 3, 0.001)
    for coder in ("context", "columns"):
        blob = encode_layer(levels, levels.shape, 3, coder=coder)
        np.testing.assert_array_equal(decode_layer(blob, levels.shape, 3), levels)


@pytest.mark.parametrize("coder", ALL)
@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.slow
def test_a_layer_of_one_value_justifies_its_positions(coder: str, value: int) -> None:
    levels = np.full((300, 1000), value, np.uint16)
    blob = encode_layer(levels, levels.shape, 1, coder=coder)
    assert levels.size <= max_positions(len(blob))
    np.testing.assert_array_equal(decode_layer(blob, levels.shape, 1), levels)


@pytest.mark.slow
def test_nearly_nothing_in_a_large_layer_still_justifies_its_positions() -> None:
    shape = (1000, 1000)
    for coder in CODERS:  # auto takes the smallest of their blobs
        blob = encode_layer(np.zeros(shape, np.uint16), shape, 7, coder=coder)
        assert len(blob) < 80
        assert not decode_layer(blob, shape, 7).any()
    assert MAX_POSITIONS > 1_000_000


@pytest.mark.parametrize(
    ("levels", "clusters", "problem"),
    [
        ([0, 3], 2, "from 0 to 2"),
        ([-1, 0], 2, "from 0 to 2"),
        ([0], 0, "clusters"),
        ([0], 65536, "can be"),
    ],
)
def test_refuses_invalid_levels(levels: list[int], clusters: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_layer(np.array(levels), (len(levels),), clusters)


def test_the_memory_of_the_context_coder_is_in_proportion() -> None:
    """Many rows of one position each, two clusters: not kilobytes for each."""
    levels = layer(0, (4096, 1), 2, 0.5)
    blob = encode_layer(levels, levels.shape, 2, coder="context")
    tracemalloc.start()
    try:
        decode_layer(blob, levels.shape, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_refuses_unknown_coders() -> None:
    with pytest.raises(ValueError, match="there are auto, context"):
        encode_layer(np.zeros(3, np.uint16), (3,), 1, coder="zip")
    with pytest.raises(CorruptError, match="unknown coder"):
        decode_layer(b"\x09abc", (3,), 1)


def harmless(blob: bytes, shape: tuple[int, ...], clusters: int) -> bool:
    """Whether it decodes; what decodes has the right shape and only levels that exist."""
    try:
        levels = decode_layer(blob, shape, clusters)
    except CorruptError:
        return False
    assert levels.shape == shape
    assert levels.max(initial=0) <= clusters
    return True


@pytest.mark.parametrize("coder", CODERS)
@slow
@given(data=st.data())
@pytest.mark.slow
def test_damage(coder: str, data: st.DataObject) -> None:
    clusters = data.draw(st.sampled_from([1, 4, 17]))
    shape = data.draw(st.sampled_from([(12, 25), (40, 1), (5, 4, 3, 3)]))
    levels = layer(data.draw(st.integers(0, 9)), shape, clusters, 0.2)
    blob = encode_layer(levels, shape, clusters, coder=coder)
    harmless(blob + data.draw(st.binary(min_size=1, max_size=9)), shape, clusters)
    assert not harmless(blob[: data.draw(st.integers(0, 1))], shape, clusters)
    harmless(blob[: data.draw(st.integers(0, len(blob) - 1))], shape, clusters)
    flipped = bytearray(blob)
    for at in data.draw(st.lists(st.integers(8, 8 * len(blob) - 1), min_size=1, max_size=4)):
        flipped[at // 8] ^= 1 << at % 8
    harmless(bytes(flipped), shape, clusters)
    other = data.draw(st.sampled_from([(1,), (3, 1000), (200, 3), (1, 9999), (2, 2, 50)]))
    harmless(blob, other, data.draw(st.sampled_from([1, 2, 300, 65535])))


@pytest.mark.parametrize("coder", [*NUMBERS.values(), 255])
@slow
@given(noise=st.binary(max_size=60), shape=st.sampled_from([(1,), (3, 50), (1, 3000), (7, 1)]))
def test_noise(coder: int, noise: bytes, shape: tuple[int, ...]) -> None:
    harmless(bytes([coder]) + noise, shape, 300)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.slow
def test_truncation_is_noticed(coder: str) -> None:
    levels = layer(0, (60, 60), 8, 0.2)
    blob = encode_layer(levels, levels.shape, 8, coder=coder)
    accepted = [n for n in range(len(blob)) if harmless(blob[:n], levels.shape, 8)]
    # Nearly every string of bytes is the code of something: few fit to the length by chance.
    assert len(accepted) < 0.02 * len(blob)


@pytest.mark.parametrize("coder", CODERS)
def test_trailing_bytes_are_noticed(coder: str) -> None:
    layers = [layer(seed, (40, 40), 8, 0.2) for seed in range(40)]
    blobs = [encode_layer(levels, levels.shape, 8, coder=coder) for levels in layers]
    for tail in (b"\0", b"\0" * 5, b"\1", bytes(range(9))):
        assert sum(harmless(blob + tail, (40, 40), 8) for blob in blobs) <= 2


def test_claims_beyond_the_bytes_are_refused_at_once() -> None:
    blob = encode_layer(layer(0, (60, 60), 8, 0.2), (60, 60), 8)
    with pytest.raises(CorruptError, match="cannot hold"):
        decode_layer(blob, (1 << 40, 1 << 20), 8)


@pytest.mark.slow
def test_a_large_layer_is_coded_by_context_where_that_saves_bytes() -> None:
    random = np.random.default_rng(0)
    dense = random.normal(127, 30, (300, 400)).round().clip(0, 254).astype(np.uint16)
    assert encode_layer(dense, (300, 400), 254)[0] in (NUMBERS["huffman"], NUMBERS["ans"])
    rows = random.random((300, 1)) < 0.1  # whole neurons were pruned: neighbours say so
    blocks = np.where(rows, random.integers(0, 9, (300, 400)), 0).astype(np.uint16)
    assert encode_layer(blocks, (300, 400), 8)[0] in (NUMBERS["context"], NUMBERS["columns"])
