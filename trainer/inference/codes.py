"""A weight of the engine as codes of all its values, zeros included: 4 or 5 bits each."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.inference.kernels.codes import linear_codes
from trainer.inference.kernels.llvm import LANES
from trainer.inference.matrix import codebook
from trainer.inference.threads import run_parts

_MAX_VALUES = 32
_WIDE_ROWS = 4 * 8 * LANES  # rows from which a tile has two vectors


@dataclass(frozen=True)
class CodeMatrix:
    """A matrix whose values, zero included, are codes into a codebook of at most 32 values.

    With up to 16 values a code has 4 bits, otherwise 5. For a quarter of nonzero values or more,
    that is less memory than the entries of a `CompressedMatrix` take.
    """

    order: Literal["codes"]
    shape: tuple[int, int]  # rows (outputs), columns (inputs)
    bits: int  # of a code
    table: NDArray[np.float32]  # [32], the codebook
    words: NDArray[np.uint32]  # [tiles, columns, vectors, 16]; see `kernels.codes.linear_codes`

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.table.nbytes + self.words.nbytes

    def multiply(
        self, x: NDArray[np.float32], bias: NDArray[np.float32], threads: int
    ) -> NDArray[np.float32]:
        """As `CompressedMatrix.multiply`; columns whose input is zero are skipped."""
        tiles, _, vectors, lanes = self.words.shape
        size = vectors * (32 // self.bits) * lanes
        out = np.empty((len(x), tiles * size), np.float32)

        def part(first: int, last: int) -> None:
            linear_codes(self.words, self.bits, self.table, x, bias, out, first, last)

        run_parts(part, tiles, threads)
        return np.ascontiguousarray(out[:, : self.shape[0]])

    def dense(self) -> Tensor:
        """The matrix as a float32 tensor [rows, columns]."""
        tiles, columns = self.words.shape[:2]
        shifts = np.arange(32 // self.bits, dtype=np.uint32) * np.uint32(self.bits)
        found = np.empty((tiles, self.words[0, 0].size * len(shifts), columns), np.float32)
        for tile, words in zip(found, self.words, strict=True):
            codes = (words[:, :, None] >> shifts[:, None]) & np.uint32((1 << self.bits) - 1)
            tile[:] = self.table[codes].reshape(columns, -1).T
        return torch.from_numpy(found.reshape(-1, columns)[: self.shape[0]].copy())


def to_codes(weight: Tensor) -> CodeMatrix | None:
    """Store a matrix as codes; None if it has more than 32 values, zero included.

    Args:
        weight: float32 [rows, columns], at least one of each.

    Raises:
        ValueError: The matrix has NaN.
    """
    dense = weight.detach().cpu().numpy()
    nonzero, found = codebook(dense)
    if found == 0 or len(nonzero) >= _MAX_VALUES:
        return None
    values = np.union1d(nonzero, np.zeros(1, np.float32))
    bits = 4 if len(values) <= _MAX_VALUES // 2 else 5
    table = np.zeros(_MAX_VALUES, np.float32)
    table[: len(values)] = values
    zero = np.searchsorted(values, 0)
    rows, columns = dense.shape
    vectors, codes = 2 if rows >= _WIDE_ROWS else 1, 32 // bits
    size = vectors * codes * LANES
    words = np.zeros((-(-rows // size), columns, vectors, LANES), np.uint32)
    for tile, lines in enumerate(words):
        part = dense[tile * size : (tile + 1) * size]
        padded = np.full((size, columns), zero, np.uint32)
        padded[: len(part)][part != 0] = np.searchsorted(values, part[part != 0])
        for code in range(codes):
            own = padded.reshape(vectors, codes, LANES, columns)[:, code]
            lines |= own.transpose(2, 0, 1) << np.uint32(code * bits)
    return CodeMatrix("codes", (rows, columns), bits, table, words)
