"""The bytes of a coder of the user's own: their number, the bytes, and zeros behind them.

The user's code may do anything, so what it returns is checked, and whatever it raises becomes one
kind of error.
"""

from collections.abc import Sequence

import numpy as np

from trainer.compress.coding import varint
from trainer.compress.coding.coders import Coder, Levels
from trainer.compress.coding.errors import CorruptError


def encode_own(coder: Coder, levels: Levels, clusters: int, negatives: int) -> bytes:
    """Encode one layer, and check that it can be decoded.

    Args:
        coder: The user's coder.
        levels, clusters, negatives: See `Coder.encode`.

    Raises:
        ValueError: The coder raises an exception, returns no bytes, or decodes other levels.
    """
    levels = levels.view()
    levels.flags.writeable = False
    name = type(coder).__name__
    try:
        payload = coder.encode(levels, clusters, negatives)
    except Exception as error:
        raise ValueError(f"{name}.encode raised {type(error).__name__}: {error}") from error
    if not isinstance(payload, bytes):
        raise ValueError(f"{name}.encode returned a {type(payload).__name__}, not bytes")
    blob = varint.encode(len(payload)) + payload
    if not np.array_equal(decode_own(coder, blob, levels.shape, clusters, negatives), levels):
        raise ValueError(f"{name}.decode returned other levels than {name}.encode was given")
    return blob


def decode_own(
    coder: Coder, data: bytes, shape: Sequence[int], clusters: int, negatives: int
) -> Levels:
    """Decode the bytes of `encode_own`; zeros may follow them.

    Raises:
        CorruptError: The coder raises an exception, or returns no levels of such a layer.
    """
    length, start = varint.decode(data, 0)
    payload, padding = data[start : start + length], data[start + length :]
    if len(payload) < length or padding.strip(b"\0"):
        raise CorruptError("the bytes of a coder of the writer's own are truncated or damaged")
    name, shape = type(coder).__name__, tuple(shape)
    try:
        levels = coder.decode(payload, shape, clusters, negatives)
    except MemoryError:
        raise
    except Exception as error:
        raise CorruptError(f"{name}.decode raised {type(error).__name__}: {error}") from error
    if not isinstance(levels, np.ndarray) or not np.issubdtype(levels.dtype, np.integer):
        raise CorruptError(f"{name}.decode returned no array of integers")
    if levels.shape != shape:
        raise CorruptError(f"{name}.decode returned the shape {levels.shape}, not {shape}")
    if not 0 <= int(levels.min()) <= int(levels.max()) <= clusters:
        raise CorruptError(f"{name}.decode returned levels that are not from 0 to {clusters}")
    return levels.astype(np.uint16)
