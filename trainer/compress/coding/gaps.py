"""Levels as two streams of symbols: the gaps between survivors, and the survivors' clusters.

As in Han et al. (ICLR 2016), a gap is the number of zeros before a survivor. The largest symbol is
a filler: it stands for that many zeros without a survivor after them.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import varint
from trainer.compress.coding.errors import CorruptError

Symbols = NDArray[np.uint16]


class SymbolCoder(Protocol):
    """A module or object that codes a stream of symbols, each with the same distribution."""

    def encode(self, symbols: Symbols, alphabet: int) -> bytes: ...

    def decode(self, blob: bytes, count: int, alphabet: int) -> Symbols: ...


def split(flat: Symbols, longest: int) -> tuple[Symbols, Symbols]:
    """Split levels into gap symbols, from 0 to `longest`, and the survivors' levels minus 1.

    Zeros after the last survivor are left out.
    """
    places = np.flatnonzero(flat)
    values = flat[places] - np.uint16(1)
    places[1:] -= places[:-1] + 1  # now the gaps
    ends = places // longest  # how many fillers each has
    gap_symbols = np.full(places.size + int(ends.sum()), longest, np.uint16)
    ends += 1
    np.cumsum(ends, out=ends)
    ends -= 1
    places %= longest
    gap_symbols[ends] = places
    return gap_symbols, values


def join(gap_symbols: Symbols, values: Symbols, longest: int, size: int) -> Symbols:
    """Inverse of `split`.

    Raises:
        CorruptError: there are more than `size` positions, or not one value for each survivor.
    """
    filler = gap_symbols == longest
    steps = gap_symbols.astype(np.int64)
    steps += ~filler
    places = np.cumsum(steps, out=steps)[~filler] - 1
    if gap_symbols.size and (int(steps[-1]) > size or filler[-1]):
        raise CorruptError("gaps lead beyond the layer")
    if places.size != values.size:
        raise CorruptError("not one value for each survivor")
    flat = np.zeros(size, np.uint16)
    flat[places] = values + 1
    return flat


def encode(flat: Symbols, clusters: int, coder: SymbolCoder) -> bytes:
    """Encode levels.

    The bytes hold the number of survivors, the number of fillers, log2(longest + 1), the length of
    the coded gaps, the coded gaps and the coded values.
    """
    survivors = int(np.count_nonzero(flat))
    mean = flat.size // max(1, survivors)
    bits = min(14, max(4, mean.bit_length() + 3))
    gap_symbols, values = split(flat, (1 << bits) - 1)
    gap_bytes = coder.encode(gap_symbols, 1 << bits)
    head = varint.encode(survivors) + varint.encode(gap_symbols.size - survivors)
    head += bytes([bits]) + varint.encode(len(gap_bytes))
    return head + gap_bytes + coder.encode(values, clusters)


def decode(blob: bytes, size: int, clusters: int, coder: SymbolCoder) -> Symbols:
    """Decode `size` levels.

    Raises:
        CorruptError: no encoder wrote these bytes for such a layer.
    """
    survivors, at = varint.decode(blob, 0)
    fillers, at = varint.decode(blob, at)
    if at >= len(blob) or not 4 <= (bits := blob[at]) <= 14:
        raise CorruptError("the head of a gap-coded layer is damaged")
    length, at = varint.decode(blob, at + 1)
    longest = (1 << bits) - 1
    if survivors + fillers * longest > size or length > len(blob) - at:
        raise CorruptError("the head of a gap-coded layer does not fit its shape")
    gap_symbols = coder.decode(blob[at : at + length], survivors + fillers, longest + 1)
    values = coder.decode(blob[at + length :], survivors, clusters)
    return join(gap_symbols, values, longest, size)
