"""A coder of small float arrays, such as biases and the parameters of norms.

The bytes are grouped into planes, the highest bytes (sign and exponent) of all elements first,
because those resemble each other. The range coder codes each byte as a binary tree of adaptive
bits. The bits of a plane that does not become smaller this way, such as mantissas, are coded with
probability 1/2; if no plane becomes smaller, the array is stored as it is.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import rangecoder as rc
from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.mixing import HALF, count
from trainer.compress.jit import jit

_LIMIT = 255
_MAX_BYTES = (
    1 << 22
)  # bytes that are worth the time; more are stored as they are (docs/artifact.md)


@jit
def _code(planes: NDArray[np.uint8], adaptive: int, blob: NDArray[np.uint8], decode: bool) -> int:
    """Encode `planes` [bytes of an element, elements], or decode into it.

    Returns the length in bytes; -1: corrupt. Bit i of `adaptive` is set if the bits of plane i
    are adaptive.
    """
    state = np.zeros(rc.STATE, np.int64)
    rc.start(state, blob, decode)
    for plane in range(planes.shape[0]):
        chance = np.full(256, HALF, np.int64)
        seen = np.zeros(256, np.int64)
        learn = adaptive >> plane & 1
        for i in range(planes.shape[1]):
            node = 1
            for shift in range(7, -1, -1):
                one = min(max(chance[node] >> 6, rc.FLOOR), rc.ONE - rc.FLOOR)
                bit = rc.code(state, blob, one, planes[plane, i] >> shift & 1, decode)
                if learn:
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
    """Encode little-endian elements of `itemsize` bytes (at most 8); at most one byte is added.

    The first byte has a bit for each adaptive plane, the lowest for the highest bytes; 0: the
    elements follow as they are.
    """
    if not raw:
        return b""
    if len(raw) > _MAX_BYTES:
        return b"\0" + raw
    planes = np.frombuffer(raw, np.uint8).reshape(-1, itemsize).T[::-1].copy("C")
    blob = np.zeros(16 * planes.size + 16, np.uint8)
    adaptive = 0
    for number, plane in enumerate(planes):
        if _code(plane[None], 1, blob, False) < plane.size:
            adaptive |= 1 << number
    blob[:] = 0
    size = _code(planes, adaptive, blob, False)
    if not adaptive or size >= len(raw):
        return b"\0" + raw
    return bytes([adaptive]) + blob[:size].tobytes()


def decode_floats(blob: bytes | memoryview, length: int, itemsize: int) -> bytes | memoryview:
    """Decode `length` bytes that were given to `encode_floats`.

    The result is a slice of `blob` if the bytes were stored as they are.

    Raises:
        CorruptError: no encoder wrote these bytes for so many.
    """
    if length % itemsize or not blob:
        if length or blob:
            raise CorruptError("no whole number of elements")
        return b""
    if blob[0] == 0:
        if len(blob) != length + 1:
            raise CorruptError("raw floats of another length")
        return blob[1:]
    if blob[0] >> itemsize or length > min(len(blob) << 12, _MAX_BYTES):
        raise CorruptError("the head of coded floats is damaged")
    planes = np.zeros((itemsize, length // itemsize), np.uint8)
    data = np.frombuffer(blob, np.uint8, offset=1).copy()
    if length == 0 or _code(planes, blob[0], data, True) < 0:
        raise CorruptError("coded floats are damaged")
    return planes[::-1].T.tobytes()
