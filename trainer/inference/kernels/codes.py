"""Products with a weight that is stored as the codes of all its values, zeros included.

A word of 32 bits holds codes of 8 outputs (4 bits each) or 6 (5 bits), and 16 words those of a
vector of outputs, so that one instruction looks up 16 weights in a codebook in registers. That
needs AVX-512; other CPUs execute an equivalent scalar loop.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from trainer.compress.jit import jit
from trainer.inference.kernels.llvm import (
    INTS,
    LANES,
    LONG,
    WIDE,
    data,
    intrinsic,
    load,
    multiply_add,
    permute,
    permute_two,
    prefetch_line,
    splat,
    store,
)

_AHEAD = 8  # columns whose codes are loaded into the cache ahead of their use


def _vector_tile(bits: int, vectors: int) -> Any:
    """A function that computes a tile: the outputs whose codes are in `vectors` * 16 words."""
    codes = 32 // bits  # in a word
    look_up: Any = permute if bits == 4 else permute_two

    @intrinsic
    def add_tile(typing_context, words, start, positions, values, count, table, out, place):  # type: ignore[no-untyped-def]
        """out[place + i] += sum over q < count of W[i, positions[q]] * values[q]."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            _, start, _, _, count, _, _, place = arguments
            words, positions, values, table, out = (
                data(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 3, 5, 6)
            )

            def after(index: Any, number: int) -> Any:
                return builder.add(index, LONG(number * LANES))

            def words_of(position: Any) -> Any:
                column = builder.load(builder.gep(positions, [position]))
                return builder.add(start, builder.mul(column, LONG(vectors * LANES)))

            book = [load(builder, table, LONG(i * LANES)) for i in range(bits - 3)]
            sums = [
                cgutils.alloca_once_value(builder, load(builder, out, after(place, i)))
                for i in range(vectors * codes)
            ]
            with cgutils.for_range_slice(builder, LONG(0), count, LONG(1)) as (q, _):
                factor = splat(builder, builder.load(builder.gep(values, [q])))
                here, later = words_of(q), words_of(builder.add(q, LONG(_AHEAD)))
                for vector in range(vectors):
                    packed = load(builder, words, after(here, vector), INTS)
                    prefetch_line(builder, words, after(later, vector))
                    for code in range(codes):
                        shift = ir.Constant(INTS, [code * bits] * LANES)
                        weights = look_up(builder, *book, builder.lshr(packed, shift))
                        total = sums[vector * codes + code]
                        new = multiply_add(builder, weights, factor, builder.load(total))
                        builder.store(new, total)
            for i, total in enumerate(sums):
                store(builder, builder.load(total), out, after(place, i))
            return context.get_dummy_value()

        long = types.int64
        arguments = (words, long, positions, values, long, table, out, long)
        return types.void(*arguments), generate

    return add_tile


def _scalar_tile(bits: int, vectors: int) -> Any:
    """As `_vector_tile`, for CPUs without AVX-512."""
    codes, mask = 32 // bits, np.uint32(2**bits - 1)

    @jit
    def add_tile(words, start, positions, values, count, table, out, place):  # type: ignore[no-untyped-def]
        for q in range(count):
            first = start + positions[q] * vectors * LANES
            for vector in range(vectors):
                for code in range(codes):
                    shift = np.uint32(code * bits)
                    at = place + (vector * codes + code) * LANES
                    for lane in range(LANES):
                        word = words[first + vector * LANES + lane]
                        out[at + lane] += table[(word >> shift) & mask] * values[q]

    return add_tile


_build = _vector_tile if WIDE else _scalar_tile
_add_4, _add_4_wide, _add_5, _add_5_wide = (_build(b, v) for b in (4, 5) for v in (1, 2))


@jit
def linear_codes(words, bits, table, x, bias, out, first, last):  # type: ignore[no-untyped-def]
    """out = W x + bias, in tiles of outputs; columns whose input is zero are skipped.

    Args:
        words: uint32 [tiles, columns, vectors, 16]: word l of vector v holds, from its lowest bits
            on, the codes of the outputs 16 k + l of that vector for k = 0, 1, ...
        bits: Of a code, 4 or 5.
        table: float32 [32], the codebook.
        x: [N, columns]. NaN counts as not zero.
        bias: [rows].
        out: [N, tiles * outputs of a tile], contiguous.
        first, last: the tiles to compute.
    """
    _, columns, vectors, _ = words.shape
    size = vectors * (32 // bits) * LANES
    flat = words.reshape(-1)
    positions = np.zeros(columns + _AHEAD, np.int64)
    values = np.empty(columns + 1, np.float32)
    for n in range(x.shape[0]):
        count = 0
        for j in range(columns):
            positions[count] = j
            values[count] = x[n, j]
            count += x[n, j] != 0
        row = out[n]
        for tile in range(first, last):
            place, start = tile * size, tile * columns * vectors * LANES
            for i in range(place, place + size):
                row[i] = bias[i] if i < len(bias) else np.float32(0)
            if bits == 4 and vectors == 1:
                _add_4(flat, start, positions, values, count, table, row, place)
            elif bits == 4:
                _add_4_wide(flat, start, positions, values, count, table, row, place)
            elif vectors == 1:
                _add_5(flat, start, positions, values, count, table, row, place)
            else:
                _add_5_wide(flat, start, positions, values, count, table, row, place)
