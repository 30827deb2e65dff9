"""Canonical Huffman coding of symbols (Huffman, 1952)."""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import varint
from trainer.compress.coding.errors import CorruptError
from trainer.compress.jit import jit

Symbols = NDArray[np.uint16]
Int64 = NDArray[np.int64]
# Bits of a code, as they fit 64 with a sign. A code of n bits takes F(n + 2) symbols at least, a
# Fibonacci number: 9 million for 33 bits, and 10^13, more than any memory holds, for 62.
MAX_LENGTH = 62


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol's code: as short in total as whole bits allow; 0 where the count is 0.

    A symbol that is alone gets 1 bit. Among equals the lowest symbol gets the longest code.
    """
    heap: list[tuple[int, int, tuple[int, ...]]]
    heap = [(count, symbol, (symbol,)) for symbol, count in enumerate(counts) if count > 0]
    lengths = [0] * len(counts)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, order, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, order + len(counts), left + right))
    return lengths


def codes(lengths: Sequence[int]) -> list[int]:
    """The canonical code of each symbol: counting up, shorter codes and lower symbols first."""
    out, code, before = [0] * len(lengths), 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - before
        out[symbol], before = code, length
        code += 1
    return out


@jit
def _pack(symbols: Symbols, code: Int64, length: Int64, bits: int) -> NDArray[np.uint8]:
    out = np.zeros((bits + 7) // 8, np.uint8)
    at = 0
    for symbol in symbols:
        for place in range(length[symbol] - 1, -1, -1):
            if code[symbol] >> place & 1:
                out[at >> 3] |= np.uint8(128 >> (at & 7))
            at += 1
    return out


@jit
def _unpack(
    data: NDArray[np.uint8],
    first: Int64,
    number: Int64,
    order: Symbols,
    out: Symbols,
) -> int:
    """Fill `out`; returns how many bits that took, -1 where a code does not exist or bits lack."""
    at = 0
    for i in range(out.size):
        code = 0
        base = 0
        for length in range(1, number.size):
            if at >> 3 >= data.size:
                return -1
            code = code << 1 | (data[at >> 3] >> (7 - (at & 7)) & 1)
            at += 1
            if code - first[length] < number[length]:
                out[i] = order[base + code - first[length]]
                break
            base += number[length]
        else:
            return -1
    return at


def encode(symbols: Symbols, alphabet: int) -> bytes:
    """The code lengths (a byte each, runs of zeros as 0 and their number), then the codes.

    A symbol that is alone takes no bits.
    """
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet).tolist())
    head, at = bytearray(), 0
    while at < alphabet:
        run = 1
        if lengths[at] == 0:
            while at + run < alphabet and lengths[at + run] == 0:
                run += 1
            head += b"\0" + varint.encode(run)
        else:
            head.append(lengths[at])
        at += run
    if np.count_nonzero(lengths) < 2:
        return bytes(head)
    length = np.array(lengths, np.int64)
    bits = int(length[symbols].sum())
    return bytes(head) + _pack(symbols, np.array(codes(lengths), np.int64), length, bits).tobytes()


def decode(blob: bytes, count: int, alphabet: int) -> Symbols:
    """`count` symbols.

    Raises:
        CorruptError: no encoder wrote these bytes for so many symbols of such an alphabet.
    """
    lengths: list[int] = []
    at = 0
    while len(lengths) < alphabet:
        if at >= len(blob):
            raise CorruptError("a table of code lengths is truncated")
        length, at = blob[at], at + 1
        if length:
            lengths.append(length)
            continue
        run, at = varint.decode(blob, at)
        if not 0 < run <= alphabet - len(lengths):
            raise CorruptError("a table of code lengths is too long")
        lengths += [0] * run
    if max(lengths, default=0) > MAX_LENGTH:
        raise CorruptError("a code is too long")
    if sum(1 << (MAX_LENGTH - n) for n in lengths if n) > 1 << MAX_LENGTH:
        raise CorruptError("code lengths contradict each other")
    used = [symbol for symbol, length in enumerate(lengths) if length]
    if len(used) < 2:
        if at < len(blob) or (count and not used):
            raise CorruptError("a Huffman stream without codes")
        return np.full(count, used[0] if used else 0, np.uint16)
    if count > 8 * (len(blob) - at):
        raise CorruptError("a Huffman stream is truncated")
    table = codes(lengths)
    order = sorted((n, s) for s, n in enumerate(lengths) if n)
    number = np.bincount([n for n, _ in order], minlength=max(lengths, default=0) + 1)
    first = np.zeros(number.size, np.int64)
    for n, s in reversed(order):
        first[n] = table[s]
    out = np.zeros(count, np.uint16)
    data = np.frombuffer(blob, np.uint8, offset=at).copy()
    bits = _unpack(
        data, first, number.astype(np.int64), np.array([s for _, s in order], np.uint16), out
    )
    if bits < 0 or (bits + 7) // 8 != data.size:
        raise CorruptError("a Huffman stream is damaged")
    if bits % 8 and data[-1] & ((1 << (8 - bits % 8)) - 1):
        raise CorruptError("a Huffman stream ends in stray bits")
    return out
