"""Asymmetric numeral systems (Duda, 2013), one distribution for all symbols, by constriction."""

import constriction
import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import varint
from trainer.compress.coding.errors import CorruptError

Symbols = NDArray[np.uint16]


def shares(counts: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Scale counts to a sum of 2^bits. A count above 0 stays above 0, and none becomes 2^bits."""
    total = 1 << bits
    out = np.where(counts > 0, np.maximum(1, counts * total // max(1, counts.sum())), 0)
    if np.count_nonzero(counts) == 1:
        out[counts.argmax()] = total - 1
        out[(counts.argmax() + 1) % counts.size] = 1
    while (excess := int(out.sum()) - total) != 0:
        largest = int(out.argmax())
        out[largest] -= excess if excess < 0 else min(excess, max(1, int(out[largest]) // 2))
    return out


def _bits(alphabet: int) -> int:
    return max(12, alphabet.bit_length() + 4)


def _model(share: NDArray[np.int64], bits: int) -> constriction.stream.model.Categorical:
    # Fractions with a power of two below: exact in floating point, the same on every machine.
    return constriction.stream.model.Categorical(share / float(1 << bits), perfect=False)


def encode(symbols: Symbols, alphabet: int) -> bytes:
    """Encode symbols with one distribution for all of them.

    The bytes hold the share of each symbol of the alphabet (a run of zeros as 0 and its length),
    then the 32-bit words of the ANS coder.
    """
    if symbols.size == 0 or alphabet < 2:
        return b""
    bits = _bits(alphabet)
    share = shares(np.bincount(symbols, minlength=alphabet).astype(np.int64), bits)
    head, at = b"", 0
    while at < alphabet:
        head += varint.encode(int(share[at]))
        run = 1
        if share[at] == 0:
            rest = share[at:].nonzero()[0]
            run = int(rest[0]) if rest.size else alphabet - at
            head += varint.encode(run)
        at += run
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), _model(share, bits))
    words: NDArray[np.uint32] = coder.get_compressed()
    return head + words.astype("<u4").tobytes()


def decode(blob: bytes, count: int, alphabet: int) -> Symbols:
    """Decode `count` symbols.

    Raises:
        CorruptError: no encoder wrote these bytes for so many symbols of such an alphabet.
    """
    if count == 0 or alphabet < 2:
        if blob:
            raise CorruptError("bytes where no symbols are")
        return np.zeros(count, np.uint16)
    bits = _bits(alphabet)
    share: list[int] = []
    at = 0
    while len(share) < alphabet:
        value, at = varint.decode(blob, at)
        run = 1
        if value == 0:
            run, at = varint.decode(blob, at)
        if not 0 < run <= alphabet - len(share):
            raise CorruptError("a table of shares is too long")
        share += [value] * run
    if sum(share) != 1 << bits or max(share) == 1 << bits or (len(blob) - at) % 4:
        raise CorruptError("a table of shares is damaged")
    try:
        coder = constriction.stream.stack.AnsCoder(
            np.frombuffer(blob, "<u4", offset=at).astype(np.uint32)
        )
    except ValueError as error:
        raise CorruptError("an ANS stream ends in a zero word") from error
    out: NDArray[np.int32] = coder.decode(_model(np.array(share), bits), count)
    if not coder.is_empty():
        raise CorruptError("an ANS stream is damaged")
    return out.astype(np.uint16)
