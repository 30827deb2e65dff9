"""The matrix-vector product as EIE computes it: entry by entry, zero activations skipped.

Han et al., EIE, ISCA 2016, arXiv:1602.01528, section IV. The accelerator computes with 16-bit
fixed-point numbers; `product` uses floats instead, so that it can be compared with other engines.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from trainer.compress.jit import jit
from trainer.hardware.eie.encoding import EncodedMatrix, Ints

Floats = NDArray[np.float64]

_LARGEST = (1 << 15) - 1  # of a 16-bit integer


def product(
    matrix: EncodedMatrix, codebook: NDArray[np.floating], activations: NDArray[np.floating]
) -> Floats:
    """Multiply a matrix by a vector, in double precision.

    Args:
        matrix: [rows, columns] in the memories of the elements.
        codebook: Value of each code; that of code 0 must be 0.
        activations: [columns].

    Returns:
        [rows].

    Raises:
        ValueError: The activations or the codebook are too short or too long for the matrix.
    """
    _check(matrix, codebook, activations)
    sums = np.zeros(matrix.rows)
    _accumulate(
        matrix.pointers,
        matrix.zeros,
        matrix.codes,
        codebook.astype(np.float64),
        activations.astype(np.float64),
        sums,
    )
    return sums


@dataclass(frozen=True)
class FixedPoint:
    """A signed 16-bit fixed-point format: integers times 2^-fraction."""

    fraction: int
    """Bits after the binary point."""

    @classmethod
    def holding(cls, largest: float) -> "FixedPoint":
        """The finest format that can hold magnitudes up to `largest`."""
        exponent = int(np.floor(np.log2(_LARGEST / largest))) if largest > 0 else 15
        return cls(exponent)

    def encode(self, values: NDArray[np.floating]) -> NDArray[np.int16]:
        """The nearest integers; values beyond the format become its largest."""
        scaled = np.rint(np.ldexp(values.astype(np.float64), self.fraction))
        return np.clip(scaled, -_LARGEST - 1, _LARGEST).astype(np.int16)

    def decode(self, integers: NDArray[np.integer]) -> Floats:
        """The numbers that integers of this format represent."""
        return cast(Floats, np.ldexp(integers.astype(np.float64), -self.fraction))


@dataclass(frozen=True)
class Formats:
    """The fixed-point formats of one layer."""

    weights: FixedPoint
    activations: FixedPoint
    sums: FixedPoint


def fixed_point_product(
    matrix: EncodedMatrix,
    codebook: NDArray[np.floating],
    activations: NDArray[np.floating],
    formats: Formats,
) -> NDArray[np.int16]:
    """Multiply in 16-bit fixed point: each product is shifted, rounded and added with saturation.

    Args:
        matrix: [rows, columns] in the memories of the elements.
        codebook: Value of each code; that of code 0 must be 0.
        activations: [columns].
        formats: Their sum of fraction bits, less that of the sums, is how far products are shifted.

    Returns:
        [rows] in the format of the sums.

    Raises:
        ValueError: The sums have more fraction bits than the products, or as for `product`.
    """
    _check(matrix, codebook, activations)
    shift = formats.weights.fraction + formats.activations.fraction - formats.sums.fraction
    if shift < 0:
        raise ValueError("the format of the sums is finer than that of the products")
    sums = np.zeros(matrix.rows, np.int64)
    _accumulate_fixed(
        matrix.pointers,
        matrix.zeros,
        matrix.codes,
        formats.weights.encode(codebook).astype(np.int64),
        formats.activations.encode(activations).astype(np.int64),
        shift,
        sums,
    )
    return sums.astype(np.int16)


def _check(
    matrix: EncodedMatrix, codebook: NDArray[np.floating], activations: NDArray[np.floating]
) -> None:
    """The loops below would read other memory."""
    matrix.check_activations(activations)
    highest = int(matrix.codes.max(initial=0))
    if highest >= len(codebook):
        raise ValueError(
            f"a codebook of {len(codebook)} values: the matrix has codes up to {highest}"
        )


@jit
def _accumulate(
    pointers: Ints,
    zeros: NDArray[np.uint8],
    codes: NDArray[np.uint16],
    codebook: Floats,
    activations: Floats,
    sums: Floats,
) -> None:
    elements = pointers.shape[0]
    for column in range(len(activations)):
        activation = activations[column]
        if activation != 0:
            for element in range(elements):
                row = element - elements
                for place in range(pointers[element, column], pointers[element, column + 1]):
                    row += (zeros[place] + 1) * elements
                    sums[row] += codebook[codes[place]] * activation


@jit
def _accumulate_fixed(
    pointers: Ints,
    zeros: NDArray[np.uint8],
    codes: NDArray[np.uint16],
    codebook: Ints,
    activations: Ints,
    shift: int,
    sums: Ints,
) -> None:
    elements = pointers.shape[0]
    half = (1 << shift) >> 1
    for column in range(len(activations)):
        activation = activations[column]
        if activation != 0:
            for element in range(elements):
                row = element - elements
                for place in range(pointers[element, column], pointers[element, column + 1]):
                    row += (zeros[place] + 1) * elements
                    added = (codebook[codes[place]] * activation + half) >> shift
                    sums[row] = min(max(sums[row] + added, -_LARGEST - 1), _LARGEST)
