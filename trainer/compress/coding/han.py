"""The file format of Deep Compression (Han et al., ICLR 2016), for a comparison at equal weights.

A survivor is stored as a gap of `gap_bits` bits (5 in fully connected layers, 8 in convolutions)
and a cluster index of ceil(log2 K) bits. If there are more zeros between two survivors than the
largest gap, a filler is stored: the largest gap with the value zero, which is index 0 as in the
paper's figure 2. The codebook has K float32 values.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import huffman
from trainer.compress.coding.errors import CorruptError

Symbols = NDArray[np.uint16]
FC_BITS, CONV_BITS = 5, 8


@dataclass(frozen=True)
class Sizes:
    """Bytes of one layer with its codebook, named like the columns of the paper's tables."""

    shared: int  # P+Q: gaps and indices of fixed length
    coded: int  # P+Q+H: both Huffman-coded, code tables included


def entries(flat: Symbols, gap_bits: int) -> tuple[Symbols, Symbols]:
    """The gap and the level of each entry; a filler has the largest gap and level 0.

    A gap is the number of zeros before the entry, so an entry advances by gap + 1 positions.
    """
    span = 1 << gap_bits
    places = np.flatnonzero(flat)
    steps = np.diff(places, prepend=-1)
    fillers = (steps - 1) // span
    ends = np.cumsum(fillers + 1) - 1
    gaps = np.full(places.size + int(fillers.sum()), span - 1, np.uint16)
    gaps[ends] = (steps - 1) % span
    values = np.zeros(gaps.size, np.uint16)
    values[ends] = flat[places]
    return gaps, values


def levels(gaps: Symbols, values: Symbols, size: int) -> Symbols:
    """The levels behind the entries.

    Raises:
        CorruptError: entries beyond `size`.
    """
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if places.size and places[-1] >= size:
        raise CorruptError("gaps lead beyond the layer")
    flat = np.zeros(size, np.uint16)
    flat[places] = values
    return flat


def encode(flat: Symbols, clusters: int, gap_bits: int) -> tuple[bytes, bytes, int]:
    """The gaps and the levels, Huffman-coded, and the number of entries."""
    gaps, values = entries(flat, gap_bits)
    return (
        huffman.encode(gaps, 1 << gap_bits),
        huffman.encode(values, clusters + 1),
        gaps.size,
    )


def decode(coded: tuple[bytes, bytes, int], size: int, clusters: int, gap_bits: int) -> Symbols:
    """The levels that `encode` took.

    Raises:
        CorruptError: no encoder wrote these bytes for such a layer.
    """
    gaps, values, count = coded
    return levels(
        huffman.decode(gaps, count, 1 << gap_bits),
        huffman.decode(values, count, clusters + 1),
        size,
    )


def sizes(flat: Symbols, clusters: int, gap_bits: int) -> Sizes:
    """The size of a layer in this format.

    As in the paper, a filler's value needs no additional code among the K <= 2^b clusters: its gap
    is the largest, and adding its weight changes nothing.
    """
    gap_stream, value_stream, count = encode(flat, clusters, gap_bits)
    codebook = 4 * clusters
    index_bits = max(1, (clusters - 1).bit_length())
    return Sizes(
        shared=(count * (gap_bits + index_bits) + 7) // 8 + codebook,
        coded=len(gap_stream) + len(value_stream) + codebook,
    )
