"""Levels by asymmetric numeral systems (Duda, 2013, arXiv:1311.2540) with one static model.

The model is the histogram of the levels, so that the length is the entropy of levels without
context. By the library constriction (Bamler, 2022, arXiv:2201.01741).
"""

import zlib

import constriction
import numpy as np
import numpy.typing as npt

from trainer.compress.coding.errors import CorruptError

Levels = npt.NDArray[np.uint16]


def encode(levels: Levels, clusters: int) -> bytes:
    """Length of the packed histogram, the histogram, and the words of the stack."""
    flat = levels.ravel().astype(np.int32)
    counts = np.bincount(flat, minlength=clusters + 1).astype("<u4")
    table = zlib.compress(counts.tobytes(), 9)
    coder = constriction.stream.stack.AnsCoder()
    if len(flat):
        coder.encode_reverse(flat, _model(counts))
    words = coder.get_compressed().astype("<u4")
    return len(table).to_bytes(4, "little") + table + bytes(words.tobytes())


def decode(blob: bytes, shape: tuple[int, int], clusters: int) -> Levels:
    """What `encode` was given. Raises CorruptError where the bytes cannot be its result."""
    table = int.from_bytes(blob[:4], "little")
    words = blob[4 + table :]
    inflate = zlib.decompressobj()
    try:
        stored = inflate.decompress(blob[4 : 4 + table], 4 * (clusters + 1))
    except zlib.error as error:
        raise CorruptError("the histogram cannot be read") from error
    size = shape[0] * shape[1]
    counts = np.frombuffer(stored, "<u4") if len(stored) == 4 * (clusters + 1) else None
    if counts is None or not inflate.eof or inflate.unused_data or len(words) % 4:
        raise CorruptError("the histogram or the words have the wrong length")
    if int(counts.sum(dtype=np.uint64)) != size:
        raise CorruptError("the histogram is of a layer of another size")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    except ValueError as error:
        raise CorruptError("the words are none that the coder leaves") from error
    if not size:
        return np.zeros(shape, dtype=np.uint16)
    flat = coder.decode(_model(counts), size)
    # What follows the last symbol shows only in the histogram: it must be the one that was coded.
    if not coder.is_empty() or (np.bincount(flat, minlength=clusters + 1) != counts).any():
        raise CorruptError("the coded layer does not end where it should")
    levels: Levels = flat.astype(np.uint16).reshape(shape)
    return levels


def _model(counts: npt.NDArray[np.uint32]) -> constriction.stream.model.Categorical:
    """The histogram as probabilities; two symbols at least, as the library demands."""
    weights = np.append(counts.astype(np.float64), 0.0) + 1e-9
    return constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)
