"""The contract of a coder (trainer.compress.coding.Coder): what it encodes, it decodes."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from trainer.compress.coding import Coder

_SHAPES = [(), (1,), (7,), (1, 40), (40, 1), (30, 20), (4, 3, 3, 3)]
_CLUSTERS = [1, 2, 17, 300]
_DENSITIES = [0.0, 0.1, 1.0]


class _Layer(NamedTuple):
    levels: NDArray[np.uint16]
    clusters: int
    negatives: int

    def __str__(self) -> str:
        kept = int(np.count_nonzero(self.levels))
        return (
            f"a layer of shape {self.levels.shape} with {kept} survivors, {self.clusters} clusters "
            f"and {self.negatives} negatives"
        )


def check_coder(coder: Coder) -> None:
    """Check that a coder encodes and decodes layers of all kinds.

    A coder must return bytes, decode them to the same levels, leave its input as it is, and keep no
    state: the same layer becomes the same bytes each time, and is decoded without the layers before
    it, also in another process.

    Args:
        coder: The coder.

    Raises:
        AssertionError: The coder breaks the contract; the message names the layer.
    """
    layers = list(_layers())
    encoded = [_encode(coder, layer) for layer in layers]
    for layer, blob in list(zip(layers, encoded, strict=True))[::7]:
        assert _encode(coder, layer) == blob, (
            f"{layer}: encode returned other bytes than before; it must depend on its arguments "
            "alone"
        )
    try:
        sent = cloudpickle.loads(cloudpickle.dumps(coder))
    except Exception as error:
        raise AssertionError(
            f"the coder cannot be pickled, so no other process can use it: {_text(error)}"
        ) from error
    for layer, blob in reversed(list(zip(layers, encoded, strict=True))):
        _check_decoded(layer, _decode(sent, layer, blob))


def _layers() -> Iterator[_Layer]:
    """Layers of different shapes, clusters, signs and densities."""
    rng = np.random.default_rng(0)
    kinds = [*itertools.product(_SHAPES, _CLUSTERS, _DENSITIES), ((9, 5), 65535, 0.7)]
    for number, (shape, clusters, density) in enumerate(kinds):
        levels = rng.integers(1, clusters + 1, shape) * (rng.random(shape) < density)
        negatives = (0, clusters // 2, clusters)[number // 4 % 3]
        yield _Layer(np.asarray(levels, np.uint16), clusters, negatives)


def _encode(coder: Coder, layer: _Layer) -> bytes:
    given = layer.levels.copy()
    try:
        blob = coder.encode(given, layer.clusters, layer.negatives)
    except Exception as error:
        raise AssertionError(f"{layer}: encode raised {_text(error)}") from error
    assert isinstance(blob, bytes), f"{layer}: encode returned a {type(blob).__name__}, not bytes"
    assert np.array_equal(given, layer.levels), f"{layer}: encode changed the levels it was given"
    return blob


def _decode(coder: Coder, layer: _Layer, blob: bytes) -> Any:
    try:
        return coder.decode(blob, layer.levels.shape, layer.clusters, layer.negatives)
    except Exception as error:
        raise AssertionError(f"{layer}: decode raised {_text(error)}") from error


def _check_decoded(layer: _Layer, decoded: Any) -> None:
    wanted = layer.levels
    assert isinstance(decoded, np.ndarray), (
        f"{layer}: decode returned a {type(decoded).__name__}, not a NumPy array"
    )
    assert np.issubdtype(decoded.dtype, np.integer), (
        f"{layer}: decode returned {decoded.dtype}, not integers"
    )
    assert decoded.shape == wanted.shape, f"{layer}: decode returned the shape {decoded.shape}"
    wrong = int((decoded != wanted).sum())
    assert not wrong, f"{layer}: {wrong} of {wanted.size} levels are other ones after decode"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
