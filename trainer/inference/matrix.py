"""The compressed weight of the engine: 16 bits for each nonzero value."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.inference.kernels.multiply import linear_columns, linear_rows
from trainer.inference.threads import run_parts

Order = Literal["rows", "columns"]

MAX_CODE_BITS = 8
_POSITION_BITS = 16
_MIN_TABLE = 16  # values that a kernel loads at once


@dataclass(frozen=True)
class CompressedMatrix:
    """A sparse matrix in compressed columns or rows, whose values are codes into a codebook.

    The position of an entry is its row (or its column, in the order of rows) within a block. A
    block has as many rows as 16 bits can name beside a code: 4096 with 4 bits, 256 with 8. A
    matrix with more than 255 distinct nonzero values has no codes; it stores each value in fp32.
    """

    order: Order
    shape: tuple[int, int]  # rows (outputs), columns (inputs)
    bits: int  # of a code; 0: no codes
    table: NDArray[np.float32]  # the codebook; without codes, the value of each entry
    entries: NDArray[np.uint16]  # position * 2^bits + code
    starts: NDArray[np.int32]  # [blocks + 1], the positions where blocks begin and end
    pointers: NDArray[np.int32]  # [blocks, lines + 1], the entries where lines begin and end

    @property
    def nonzero(self) -> int:
        """The number of entries."""
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        arrays = (self.table, self.entries, self.starts, self.pointers)
        return sum(array.nbytes for array in arrays)

    def multiply(
        self, x: NDArray[np.float32], bias: NDArray[np.float32], threads: int
    ) -> NDArray[np.float32]:
        """W x + bias for each sample; in the order of columns, those with zero inputs are skipped.

        Args:
            x: [N, columns].
            bias: [rows].

        Returns:
            [N, rows].
        """
        out = np.empty((len(x), self.shape[0]), np.float32)  # faster than torch
        columns = self.order == "columns"
        linear: Any = linear_columns if columns else linear_rows

        def part(first: int, last: int) -> None:
            linear(
                self.entries,
                self.pointers,
                self.starts,
                self.bits,
                self.table,
                x,
                bias,
                out,
                first,
                last,
            )

        run_parts(part, len(self.starts) - 1 if columns else self.shape[0], threads)
        return out

    def dense(self) -> Tensor:
        """The matrix as a float32 tensor [rows, columns]."""
        lines = self.shape[0] if self.order == "rows" else self.shape[1]
        positions = self.shape[1] if self.order == "rows" else self.shape[0]
        found = np.zeros((positions, lines), np.float32)
        codes = self.entries & np.uint16((1 << self.bits) - 1)
        values = self.table[codes] if self.bits else self.table
        for block, start in enumerate(self.starts[:-1]):
            pointers = self.pointers[block]
            part = slice(pointers[0], pointers[-1])
            line = np.repeat(np.arange(lines), np.diff(pointers))
            found[start + (self.entries[part] >> self.bits), line] = values[part]
        dense = torch.from_numpy(found)
        return dense.t().contiguous() if self.order == "rows" else dense


def compress(weight: Tensor, order: Order, parts: int = 1) -> CompressedMatrix:
    """Store a matrix as entries.

    Args:
        weight: float32 [rows, columns].
        order: "columns": entries of a column follow one another, so that columns with zero inputs
            can be skipped; "rows": those of a row do, so that each result is summed up at once.
        parts: The smallest number of blocks; with the order of columns, threads share the blocks.

    Raises:
        ValueError: The matrix has more than 2^31 - 1 entries, or NaN.
    """
    dense = weight.detach().cpu().numpy()
    if order == "rows":
        dense = dense.T
    positions, lines = dense.shape  # from here on, entries are sorted by block, line, position
    table, bits = codebook(dense)
    size = 1 << (_POSITION_BITS - bits)
    blocks = max(-(-positions // size), min(parts, positions), 1)
    blocks = -(-blocks // parts) * parts
    starts = np.linspace(0, positions, blocks + 1).round().astype(np.int32)
    entries, values = [], []
    pointers = np.zeros((blocks, lines + 1), np.int64)
    count = 0
    for block in range(blocks):
        part = np.ascontiguousarray(dense[starts[block] : starts[block + 1]].T)
        line, position = np.nonzero(part)
        found = part[line, position]
        packed = position.astype(np.uint16)
        if bits:
            packed = (packed << np.uint16(bits)) | np.searchsorted(table, found).astype(np.uint16)
        else:
            values.append(found)
        entries.append(packed)
        ends = np.searchsorted(line, np.arange(lines + 1))
        pointers[block] = count + ends
        count += len(found)
    if count >= 1 << 31:
        raise ValueError(f"{count} entries: a compressed matrix has less than 2^31")
    stored = np.concatenate(values).astype(np.float32) if not bits else _padded(table)
    return CompressedMatrix(
        order,
        (weight.shape[0], weight.shape[1]),
        bits,
        stored,
        np.concatenate(entries),
        starts,
        pointers.astype(np.int32),
    )


def codebook(dense: NDArray[Any]) -> tuple[NDArray[np.float32], int]:
    """The distinct nonzero values in ascending order, and the number of bits of a code.

    No values and 0 bits if there are more than 255 of them.

    Raises:
        ValueError: NaN.
    """
    # In a weight that is not shared most values differ, which a sample shows without a full sort.
    few = dense[: 1 + (1 << 16) // max(1, dense.shape[1])]
    for part in (few, dense):
        values = np.unique(part[part != 0])
        if np.isnan(values).any():
            raise ValueError("the weights have NaN")
        if len(values) >= 1 << MAX_CODE_BITS:
            return np.zeros(0, np.float32), 0
    bits = max(1, (len(values) - 1).bit_length())
    return values.astype(np.float32), bits


def _padded(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """The codebook, long enough for a kernel to load it at once."""
    padded = np.zeros(max(_MIN_TABLE, len(table)), np.float32)
    padded[: len(table)] = table
    return padded
