"""Interleaved compressed sparse columns, the format in which EIE stores a weight matrix.

Han et al., EIE, ISCA 2016, arXiv:1602.01528, section III. Row i of the matrix belongs to element
i mod N, where it is local row i div N. Each element stores its part of a column as a list of
entries: the zeros before the entry in the part (the relative index) and a code for the value. Where
there are more zeros than the index can count, fillers with the largest index and code 0 are stored
in between. Pointers say where each column begins.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.hardware.eie.settings import EieSettings

Codes = NDArray[np.uint16]
Ints = NDArray[np.int64]


class ElementMemory(NamedTuple):
    """The content of one processing element."""

    codes: Codes  # [entries]
    zeros: NDArray[np.uint8]  # [entries]: relative indices
    pointers: Ints  # [columns + 1]: the first entry of each column, and the end of the last one


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix of codes in the memories of all elements, which follow each other."""

    rows: int
    columns: int
    elements: int
    codes: Codes  # [entries]
    zeros: NDArray[np.uint8]  # [entries]: relative indices
    pointers: Ints  # [elements, columns + 1]: positions in `codes` and `zeros`

    @property
    def fillers(self) -> int:
        """Entries that represent no weight (padding)."""
        return int(np.count_nonzero(self.codes == 0))

    def check_activations(self, activations: NDArray[np.floating]) -> None:
        """Raises ValueError if a vector has not one value for each column."""
        if activations.shape != (self.columns,):
            raise ValueError(
                f"activations of shape {list(activations.shape)}: it must be [{self.columns}], one "
                f"value for each of the {self.columns} columns"
            )

    def counts(self) -> Ints:
        """[elements, columns]: the entries of each element in each column."""
        return np.diff(self.pointers, axis=1)

    def element(self, number: int) -> ElementMemory:
        """The memory of one element, with pointers that start at 0."""
        pointers = self.pointers[number]
        part = slice(pointers[0], pointers[-1])
        return ElementMemory(self.codes[part], self.zeros[part], pointers - pointers[0])


def encode(codes: NDArray[np.integer], settings: EieSettings) -> EncodedMatrix:
    """Distribute a matrix over the elements and compress its columns.

    Args:
        codes: [rows, columns], indices into a codebook; 0 is the weight zero.

    Raises:
        ConfigError: A code has more bits than the settings allow.
        ValueError: A code is negative.
    """
    if codes.min(initial=0) < 0:
        raise ValueError("codes are indices into a codebook: none may be negative")
    highest = int(codes.max(initial=0))
    if highest >> settings.code_bits:
        raise ConfigError(
            f"code_bits={settings.code_bits}: the matrix has {highest} values other than zero, "
            f"which need code_bits={highest.bit_length()} (or fewer clusters)"
        )
    rows, columns = codes.shape
    elements = settings.elements
    local_rows = -(-rows // elements)
    padded = np.zeros((local_rows * elements, columns), np.uint16)
    padded[:rows] = codes
    # [elements, columns, local rows]: the order in which the memories hold their entries.
    ordered = padded.reshape(local_rows, elements, columns).transpose(1, 2, 0).ravel()
    places = np.flatnonzero(ordered)
    column, row = np.divmod(places, local_rows)  # of all elements, one after the other
    previous = np.concatenate(([-1], row[:-1]))
    previous[np.diff(column, prepend=-1) != 0] = -1
    span = 1 << settings.index_bits
    fillers, zeros = np.divmod(row - previous - 1, span)
    ends = np.cumsum(fillers + 1)
    count = int(ends[-1]) if len(ends) else 0
    all_zeros = np.full(count, span - 1, np.uint8)
    all_zeros[ends - 1] = zeros
    all_codes = np.zeros(count, np.uint16)
    all_codes[ends - 1] = ordered[places]
    sizes = np.bincount(column, fillers + 1, elements * columns).astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    first = np.arange(elements)[:, None] * columns + np.arange(columns + 1)
    return EncodedMatrix(rows, columns, elements, all_codes, all_zeros, starts[first])


def decode(matrix: EncodedMatrix) -> Codes:
    """[rows, columns]: the codes that `encode` took."""
    owner = np.repeat(np.arange(matrix.elements * matrix.columns), matrix.counts().ravel())
    element, column = np.divmod(owner, matrix.columns)
    # Rows within a column are running sums; a sum over everything, less that before the column.
    steps = np.cumsum(matrix.zeros.astype(np.int64) + 1)
    before = np.concatenate(([0], steps))[matrix.pointers[:, :-1].ravel()]
    local_row = steps - 1 - before[owner]
    codes = np.zeros((matrix.rows, matrix.columns), np.uint16)
    real = matrix.codes != 0
    rows = local_row[real] * matrix.elements + element[real]
    codes[rows, column[real]] = matrix.codes[real]
    return codes
