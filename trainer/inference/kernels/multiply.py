"""Products with a compressed weight, as `trainer.inference.matrix` stores it, in float32.

Arrays: `entries` and `table` as in the module `vectors`; `pointers` int32 [blocks, lines + 1],
where the entries of line i in block b begin; `starts` int32 [blocks + 1], the positions where a
block begins and ends. A line is a column in `multiply_columns`, a row in the others.
"""

import numpy as np

from trainer.compress.jit import jit
from trainer.inference.kernels.llvm import LANES
from trainer.inference.kernels.vectors import (
    add_column,
    add_planes_1,
    add_planes_4,
    dot,
    prefetch,
)

TILE = 4 * LANES
"""Positions of a result that are computed together."""


@jit
def multiply_columns(entries, pointers, starts, bits, table, x, out, first, last):  # type: ignore[no-untyped-def]
    """out += W x, one column after the other; columns whose input is zero are skipped.

    Args:
        x: [N, columns]. NaN counts as not zero.
        out: [N, rows], contiguous.
        first, last: the blocks of rows to compute.
    """
    columns = x.shape[1]
    nonzero = np.empty(columns + 1, np.int32)
    for n in range(x.shape[0]):
        count = 0
        for j in range(columns):
            nonzero[count] = j
            count += x[n, j] != 0
        for b in range(first, last):
            rows = out[n, starts[b] :]
            for q in range(count):
                if q + 1 < count:
                    ahead = nonzero[q + 1]
                    prefetch(entries, pointers[b, ahead], pointers[b, ahead + 1])
                j = nonzero[q]
                add_column(entries, pointers[b, j], pointers[b, j + 1], bits, table, x[n, j], rows)


@jit
def multiply_rows(entries, pointers, starts, bits, table, x, out, first, last):  # type: ignore[no-untyped-def]
    """out += W x, one row after the other.

    Args:
        x: [N, columns].
        out: [N, rows], contiguous.
        first, last: the rows to compute.
    """
    for n in range(x.shape[0]):
        for b in range(len(starts) - 1):
            inputs = x[n, starts[b] :]
            for i in range(first, last):
                out[n, i] += dot(entries, pointers[b, i], pointers[b, i + 1], bits, table, inputs)


@jit
def multiply_planes(entries, pointers, starts, bits, table, offsets, x, out, first, last):  # type: ignore[no-untyped-def]
    """out[i, p] += sum over j of W[i, j] * x[offsets[j] + p], for all positions p.

    For many samples, and for convolutions: weight j of a row is multiplied with the plane of inputs
    that begins at `offsets[j]` (Park et al., Faster CNNs with direct sparse convolutions and guided
    pruning, ICLR 2017, arXiv:1608.01409).

    Args:
        offsets: int32 [columns].
        x: [inputs], with padding at the end for the positions that round `out` up.
        out: [rows, positions], positions divisible by 16.
        first, last: the rows to compute.
    """
    positions = out.shape[1]
    flat = out.reshape(-1)
    place = 0
    while place < positions:
        wide = place + TILE <= positions
        for b in range(len(starts) - 1):
            local = offsets[starts[b] :]
            for i in range(first, last):
                start, stop = pointers[b, i], pointers[b, i + 1]
                at = i * positions + place
                if wide:
                    add_planes_4(entries, start, stop, bits, table, local, x, place, flat, at)
                else:
                    add_planes_1(entries, start, stop, bits, table, local, x, place, flat, at)
        place += TILE if wide else LANES


@jit
def convolve(entries, pointers, starts, bits, table, offsets, geometry, x, bias, out, first, last):  # type: ignore[no-untyped-def]
    """A convolution of images, zeros around them; it computes the outputs `first` to `last`.

    The inputs are copied to planes, one for each channel and each step of a stride, so that inputs
    of one weight are consecutive in memory: [C, stride y, stride x, rows,
    columns].

    Args:
        offsets: int32 [weights of an output], where a plane begins, as for `multiply_planes`.
        geometry: stride y, stride x, rows and columns of a plane, rows above and columns to the
            left of the image, groups.
        x: [N, C, H, W].
        bias: [outputs].
        out: [N, outputs, height, width].
    """
    sy, sx, rows, columns, top, left, groups = geometry
    samples, channels, height, width = x.shape
    high, wide = out.shape[2:]
    positions = (high * columns + LANES - 1) // LANES * LANES
    size = rows * columns
    plane = channels // groups * sy * sx * size
    in_group = out.shape[1] // groups
    memory = np.zeros(channels * sy * sx * size + positions, np.float32)
    sums = np.empty((out.shape[1], positions), np.float32)
    for n in range(samples):
        for c in range(channels):
            for i in range(height):
                y = i + top
                for j in range(width):
                    at = j + left
                    line = (c * sy + y % sy) * sx + at % sx
                    memory[line * size + y // sy * columns + at // sx] = x[n, c, i, j]
        for o in range(first, last):
            sums[o] = bias[o]
        for group in range(groups):
            start, stop = max(first, group * in_group), min(last, (group + 1) * in_group)
            if start < stop:
                multiply_planes(
                    entries,
                    pointers,
                    starts,
                    bits,
                    table,
                    offsets,
                    memory[group * plane :],
                    sums,
                    start,
                    stop,
                )
        for o in range(first, last):
            for i in range(high):
                for j in range(wide):
                    out[n, o, i, j] = sums[o, i * columns + j]


@jit
def linear_columns(entries, pointers, starts, bits, table, x, bias, out, first, last):  # type: ignore[no-untyped-def]
    """out = W x + bias; arguments as `multiply_columns`, and bias [rows]."""
    for n in range(x.shape[0]):
        for i in range(starts[first], starts[last]):
            out[n, i] = bias[i]
    multiply_columns(entries, pointers, starts, bits, table, x, out, first, last)


@jit
def linear_rows(entries, pointers, starts, bits, table, x, bias, out, first, last):  # type: ignore[no-untyped-def]
    """out = W x + bias; arguments as `multiply_rows`, and bias [rows]."""
    for n in range(x.shape[0]):
        for i in range(first, last):
            out[n, i] = bias[i]
    multiply_rows(entries, pointers, starts, bits, table, x, out, first, last)


@jit
def to_grid(x, inverse, zero, largest, out):  # type: ignore[no-untyped-def]
    """out = x * inverse rounded, plus zero, between 0 and `largest`: uint8, as x [n]. NaN is 0."""
    for i in range(len(x)):
        value = np.rint(x[i] * inverse) + np.float32(zero)
        out[i] = np.uint8(min(max(value, np.float32(0)), np.float32(largest)))
