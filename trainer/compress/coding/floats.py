"""Small arrays of raw floats, such as biases and norms: byte by byte, with adaptive bits.

The high bytes of floats (sign, exponent) are much alike, so the bytes are put in planes, the
highest first, and each is coded as a binary tree of adaptive bits by the range coder. Mantissas
are noise; where nothing is gained the bytes are stored as they are.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import rangecoder as rc
from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.jit import jit
from trainer.compress.coding.mixing import HALF, count

_RAW, _CODED = 0, 1
_LIMIT = 255


@jit
def _code(planes: NDArray[np.uint8], blob: NDArray[np.uint8], decode: bool) -> int:
    """Write or fill `planes`, [bytes of an element, elements]; the length, or -1 if corrupt."""
    state = np.zeros(rc.STATE, np.int64)
    rc.start(state, blob, decode)
    for plane in range(planes.shape[0]):
        chance = np.full(256, HALF, np.int64)
        seen = np.zeros(256, np.int64)
        for i in range(planes.shape[1]):
            node = 1
            for shift in range(7, -1, -1):
                one = min(max(chance[node] >> 6, rc.FLOOR), rc.ONE - rc.FLOOR)
                bit = rc.code(state, blob, one, planes[plane, i] >> shift & 1, decode)
                count(chance, seen, node, bit, 0, _LIMIT)
                node = 2 * node + bit
            if decode:
                planes[plane, i] = node & 255
                if state[rc.POS] > blob.size + 4:
                    return -1
    if decode:
        return blob.size if rc.ended(state, blob) else -1
    return rc.finish(state, blob)


def encode_floats(raw: bytes, itemsize: int) -> bytes:
    """Little-endian elements of `itemsize` bytes each, in never more than one byte more."""
    if not raw:
        return b""
    planes = np.frombuffer(raw, np.uint8).reshape(-1, itemsize).T[::-1].copy("C")
    blob = np.zeros(16 * planes.size + 16, np.uint8)
    size = _code(planes, blob, False)
    if size >= len(raw):
        return bytes([_RAW]) + raw
    return bytes([_CODED]) + blob[:size].tobytes()


def decode_floats(blob: bytes, length: int, itemsize: int) -> bytes:
    """`length` bytes, as given to `encode_floats`.

    Raises:
        CorruptError: no encoder wrote these bytes for so many.
    """
    if length % itemsize or not blob:
        if length or blob:
            raise CorruptError("no whole number of elements")
        return b""
    if blob[0] == _RAW:
        if len(blob) != length + 1:
            raise CorruptError("raw floats of another length")
        return blob[1:]
    if blob[0] != _CODED or length > len(blob) << 12:
        raise CorruptError("the head of coded floats is damaged")
    planes = np.zeros((itemsize, length // itemsize), np.uint8)
    if length == 0 or _code(planes, np.frombuffer(blob, np.uint8, offset=1).copy(), True) < 0:
        raise CorruptError("coded floats are damaged")
    return planes[::-1].T.tobytes()
