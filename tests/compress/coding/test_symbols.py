"""Symbol coders: Huffman's lengths and codes, ANS's shares, gaps, Han's format, raw floats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.compress.coding import (
    CorruptError,
    ans,
    decode_floats,
    encode_floats,
    gaps,
    han,
    huffman,
    varint,
)
from trainer.compress.coding.ans import shares
from trainer.compress.coding.gaps import SymbolCoder
from trainer.compress.coding.huffman import code_lengths, codes

Symbols = NDArray[np.uint16]
CODERS: list[SymbolCoder] = [huffman, ans]
counts = st.lists(st.integers(0, 10_000), min_size=2, max_size=50)


def test_lecture() -> None:
    """36 weights in 4 clusters: 72 bits as 2-bit indices, 55 Huffman-coded."""
    numbers = [24, 5, 4, 3]
    lengths = code_lengths(numbers)
    assert lengths == [1, 2, 3, 3]
    assert sum(n * bits for n, bits in zip(numbers, lengths, strict=True)) == 55
    assert [f"{code:0{n}b}" for code, n in zip(codes(lengths), lengths, strict=True)] == [
        "0",
        "10",
        "110",
        "111",
    ]


@given(counts)
def test_codes_are_complete_and_within_a_bit_of_the_entropy(numbers: list[int]) -> None:
    lengths = code_lengths(numbers)
    used = [n for n in lengths if n]
    assert [n > 0 for n in lengths] == [count > 0 for count in numbers]
    if len(used) > 1:
        assert sum(2.0**-n for n in used) == 1.0  # Kraft
        p = np.array([count for count in numbers if count]) / sum(numbers)
        entropy = float(-(p * np.log2(p)).sum())
        assert entropy - 1e-9 <= float((p * used).sum()) < entropy + 1


def test_codes_of_more_than_32_bits(monkeypatch) -> None:
    """As Fibonacci numbers of 15 million symbols have."""
    numbers = [1, 1]
    while len(numbers) < 50:
        numbers.append(numbers[-2] + numbers[-1])
    lengths = code_lengths(numbers)
    assert max(lengths) == 49
    monkeypatch.setattr(huffman, "code_lengths", lambda counts: lengths)
    symbols = np.random.default_rng(0).integers(0, 50, 300).astype(np.uint16)
    blob = huffman.encode(symbols, 50)
    np.testing.assert_array_equal(huffman.decode(blob, 300, 50), symbols)
    for bad in (bytes([63]) + blob[1:], bytes([1]) + blob[1:]):  # too long, too many short ones
        with pytest.raises(CorruptError):
            huffman.decode(bad, 300, 50)


@given(counts)
def test_shares_sum_up_and_keep_all_that_occur(numbers: list[int]) -> None:
    if not any(numbers):
        return
    share = shares(np.array(numbers), 12)
    assert share.sum() == 4096
    assert share.max() < 4096
    assert all(s > 0 for s, count in zip(share, numbers, strict=True) if count)


@pytest.mark.parametrize("coder", CODERS)
@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 400), st.integers(0, 9))
def test_symbols_round_trip(coder: SymbolCoder, alphabet: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = (rng.random(count) ** 3 * alphabet).astype(np.uint16)
    blob = coder.encode(symbols, alphabet)
    np.testing.assert_array_equal(coder.decode(blob, count, alphabet), symbols)


def test_gaps() -> None:
    flat = np.zeros(40, np.uint16)
    flat[[0, 1, 9, 31]] = [4, 1, 2, 3]
    gap_symbols, values = gaps.split(flat, 7)
    assert gap_symbols.tolist() == [0, 0, 7, 0, 7, 7, 7, 0]
    assert values.tolist() == [3, 0, 1, 2]
    np.testing.assert_array_equal(gaps.join(gap_symbols, values, 7, 40), flat)
    for size, some in ((31, values), (40, values[:3])):
        with pytest.raises(CorruptError):
            gaps.join(gap_symbols, some, 7, size)


def test_han_pads_with_zeros() -> None:
    """Figure 2 of the paper: 3-bit steps; from position 4 to 15 the step of 11 needs a filler of
    8. (A step is a gap + 1 here.)"""
    flat = np.zeros(16, np.uint16)
    flat[[1, 4, 15]] = [34, 9, 17]
    gap_symbols, values = han.entries(flat, 3)
    assert gap_symbols.tolist() == [1, 2, 7, 2]
    assert values.tolist() == [34, 9, 0, 17]


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.01, 0.1, 1.0]), st.sampled_from([5, 8]))
def test_han_round_trip_and_sizes(seed: int, density: float, gap_bits: int) -> None:
    rng = np.random.default_rng(seed)
    flat = (rng.integers(1, 17, 3000) * (rng.random(3000) < density)).astype(np.uint16)
    coded = han.encode(flat, 16, gap_bits)
    np.testing.assert_array_equal(han.decode(coded, 3000, 16, gap_bits), flat)
    sizes = han.sizes(flat, 16, gap_bits)
    assert sizes.shared == -(-coded[2] * (gap_bits + 4) // 8) + 64
    assert sizes.coded == len(coded[0]) + len(coded[1]) + 64


@settings(deadline=None)
@given(st.sampled_from([2, 4]), st.integers(0, 300), st.integers(0, 9))
def test_floats(itemsize: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(0, 0.05, count)
    raw = values.astype(f"<f{itemsize}").tobytes()
    blob = encode_floats(raw, itemsize)
    assert decode_floats(blob, len(raw), itemsize) == raw
    assert len(blob) <= len(raw) + 1
    if count > 100:
        assert len(blob) < 0.95 * len(raw)
    if count:
        for bad in (b"\x40" + blob[1:], blob[:1], b""):
            with pytest.raises(CorruptError):
                decode_floats(bad, len(raw), itemsize)


@given(st.binary(max_size=300), st.sampled_from([1, 2, 4, 8]))
def test_any_bytes_are_coded_as_floats(raw: bytes, itemsize: int) -> None:
    raw = raw[: len(raw) // itemsize * itemsize]
    blob = encode_floats(raw, itemsize)
    assert len(blob) <= len(raw) + 1
    assert decode_floats(blob, len(raw), itemsize) == raw


def test_many_floats_are_stored_as_they_are() -> None:
    raw = bytes(1 << 22) + b"\1\0\0\0"
    blob = encode_floats(raw, 4)
    assert len(blob) == len(raw) + 1
    assert decode_floats(blob, len(raw), 4) == raw
    with pytest.raises(CorruptError):  # coded, which no encoder does with so many
        decode_floats(b"\x01" + bytes(9999), len(raw), 4)


@given(st.integers(0, (1 << 63) - 1))
def test_varint(value: int) -> None:
    blob = varint.encode(value)
    assert varint.decode(b"x" + blob, 1) == (value, 1 + len(blob))
    with pytest.raises(CorruptError):
        varint.decode(blob[:-1], 0)


@pytest.mark.parametrize("blob", [b"\x80\x00", b"\xff" * 9 + b"\1"])
def test_varint_refuses(blob: bytes) -> None:
    with pytest.raises(CorruptError):
        varint.decode(blob, 0)
