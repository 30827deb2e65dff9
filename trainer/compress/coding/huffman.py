"""Han's format: gaps between weights and cluster indices, both with canonical Huffman codes.

Section 2 and figure 2 of Han, Mao & Dally, Deep Compression, ICLR 2016, arXiv:1510.00149: the
distance to the next weight takes b bits; where it is larger than 2^b, a padding zero is stored on
the way. Without Huffman codes that is the format of the published column P+Q, with them P+Q+H.
"""

import heapq
import zlib
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from trainer.compress.coding.errors import CorruptError

Ints = npt.NDArray[np.int64]
Levels = npt.NDArray[np.uint16]

GAP_BITS = (5, 8)  # the published format takes 8 in convolutions and 5 in fully connected layers


class Gaps(NamedTuple):
    """A sparse matrix in row-major order, an entry per weight or padding zero."""

    distances: Ints  # [n], 1 to 2^b: positions from the entry before
    values: Ints  # [n]; 0 is a padding zero


def to_gaps(levels: Levels, bits: int) -> Gaps:
    """The entries of a matrix with gaps of so many bits."""
    flat = levels.ravel()
    places = np.flatnonzero(flat)
    distances = np.diff(places, prepend=-1)
    most = 1 << bits
    paddings = (distances - 1) // most
    ends = np.cumsum(paddings + 1) - 1
    all_distances = np.full(int(ends[-1]) + 1 if len(ends) else 0, most, dtype=np.int64)
    values = np.zeros_like(all_distances)
    all_distances[ends] = distances - paddings * most
    values[ends] = flat[places]
    return Gaps(all_distances, values)


def fixed_bits(gaps: Gaps, gap_bits: int, clusters: int) -> int:
    """Bits of the entries without Huffman codes: a gap and an index each."""
    return len(gaps.values) * (gap_bits + max(1, (clusters - 1).bit_length()))


def huffman_bits(gaps: Gaps) -> int:
    """Bits of the entries with Huffman codes; the code tables not counted, as published."""
    return sum(
        int(counts @ code_lengths(counts))
        for counts in (np.bincount(part) for part in gaps)
        if len(counts)
    )


def code_lengths(counts: Ints) -> Ints:
    """The lengths of a Huffman code in bits: 0 for a symbol that never occurs, 1 for a lone one."""
    lengths = np.zeros(len(counts), dtype=np.int64)
    heap: list[tuple[int, int, tuple[int, ...]]]
    heap = [(int(n), i, (i,)) for i, n in enumerate(counts) if n]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
        return lengths
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[list(left + right)] += 1
        heapq.heappush(heap, (a + b, i, left + right))
    return lengths


def encode(levels: Levels, clusters: int) -> bytes:
    """The smaller of the two gap widths: width, tables, code words."""
    return min((_encode(levels, clusters, bits) for bits in GAP_BITS), key=len)


def decode(blob: bytes, shape: tuple[int, int], clusters: int) -> Levels:
    """What `encode` was given. Raises CorruptError where the bytes cannot be its result."""
    if len(blob) < 13 or blob[0] not in GAP_BITS:
        raise CorruptError("the width of the gaps is missing or unknown")
    entries = int.from_bytes(blob[1:9], "little")
    table = int.from_bytes(blob[9:13], "little")
    words = np.frombuffer(blob, np.uint8, offset=13 + table) if 13 + table <= len(blob) else None
    size = shape[0] * shape[1]
    if words is None or entries > 8 * len(words) or entries > size:
        raise CorruptError("cut short: fewer code words than entries")
    alphabet = 1 << blob[0]
    inflate = zlib.decompressobj()
    try:
        stored = inflate.decompress(blob[13 : 13 + table], alphabet + clusters + 2)
    except zlib.error as error:
        raise CorruptError("the code tables cannot be read") from error
    if len(stored) != alphabet + clusters + 2 or not inflate.eof or inflate.unused_data:
        raise CorruptError("the code tables have the wrong length")
    lengths = np.frombuffer(stored, np.uint8).astype(np.int64)
    levels = np.zeros(size, dtype=np.uint16)
    gap_code = _canonical(lengths[: alphabet + 1])
    value_code = _canonical(lengths[alphabet + 1 :])
    used = _unpack(words.copy(), entries, *gap_code[1:], *value_code[1:], levels)
    if used < 0 or -(-used // 8) != len(words):
        raise CorruptError("the code words do not end where they should")
    return levels.reshape(shape)


def _encode(levels: Levels, clusters: int, bits: int) -> bytes:
    gaps = to_gaps(levels, bits)
    # Distances have 0 as a symbol that never occurs.
    lengths = [
        code_lengths(np.bincount(part, minlength=n))
        for part, n in zip(gaps, ((1 << bits) + 1, clusters + 1), strict=True)
    ]
    table = zlib.compress(np.concatenate(lengths).astype(np.uint8).tobytes(), 9)
    words = [_canonical(part)[0] for part in lengths]
    total = sum(int(part_lengths[p].sum()) for part_lengths, p in zip(lengths, gaps, strict=True))
    packed = np.zeros(-(-total // 8), dtype=np.uint8)
    _pack(*gaps, words[0], lengths[0], words[1], lengths[1], packed)
    head = bytes([bits]) + len(gaps.values).to_bytes(8, "little")
    return head + len(table).to_bytes(4, "little") + table + packed.tobytes()


def _canonical(lengths: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """The canonical code: words by symbol, and for decoding, by length: the first word, how many,
    and the symbols in the order of their words.

    Raises:
        CorruptError: the lengths make no prefix code.
    """
    if len(lengths) and int(lengths.max()) > 60:
        raise CorruptError("a code word is too long")
    counts = np.bincount(lengths, minlength=62)
    counts[0] = 0
    first = np.zeros(62, dtype=np.int64)
    for n in range(1, 62):
        first[n] = (first[n - 1] + counts[n - 1]) << 1 if n > 1 else 0
        if first[n] + counts[n] > 1 << n:
            raise CorruptError("the code tables make no prefix code")
    order = np.lexsort((np.arange(len(lengths)), lengths))
    order = order[lengths[order] > 0]
    words = np.zeros(len(lengths), dtype=np.int64)
    starts = np.cumsum(counts) - counts
    words[order] = first[lengths[order]] + np.arange(len(order)) - starts[lengths[order]]
    return words, first, counts, order


@numba.njit(cache=True)
def _pack(
    gaps: Ints,
    values: Ints,
    gap_words: Ints,
    gap_lengths: Ints,
    value_words: Ints,
    value_lengths: Ints,
    packed: Any,
) -> None:
    place = 0
    for i in range(2 * len(gaps)):
        if i & 1:
            word, length = value_words[values[i >> 1]], value_lengths[values[i >> 1]]
        else:
            word, length = gap_words[gaps[i >> 1]], gap_lengths[gaps[i >> 1]]
        for bit in range(length - 1, -1, -1):
            packed[place >> 3] |= ((word >> bit) & 1) << (7 - (place & 7))
            place += 1


@numba.njit(cache=True)
def _unpack(
    packed: Any,
    entries: int,
    gap_first: Ints,
    gap_counts: Ints,
    gap_symbols: Ints,
    value_first: Ints,
    value_counts: Ints,
    value_symbols: Ints,
    levels: Any,
) -> int:
    """Bits read; -1 where they make no entries of this matrix."""
    place, position = 0, -1
    end = 8 * len(packed)
    for i in range(2 * entries):
        first, counts, symbols = gap_first, gap_counts, gap_symbols
        if i & 1:
            first, counts, symbols = value_first, value_counts, value_symbols
        word, index, length = 0, 0, 0
        while True:
            if place >= end or length >= 60:
                return -1
            word = word << 1 | ((packed[place >> 3] >> (7 - (place & 7))) & 1)
            place += 1
            length += 1
            if word - first[length] < counts[length]:
                break
            index += counts[length]
        symbol = symbols[index + word - first[length]]
        if i & 1:
            levels[position] = symbol
        else:
            position += symbol
            if symbol == 0 or position >= len(levels):
                return -1
    for bit in range(place, min(end, (place + 7) & ~7)):
        if (packed[bit >> 3] >> (7 - (bit & 7))) & 1:
            return -1
    return place
