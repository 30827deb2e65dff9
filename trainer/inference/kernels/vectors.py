"""Loops over the stored entries of a compressed weight, 16 at a time, for kernels of this package.

An entry is an unsigned 16-bit integer: position * 2^bits + code. Its weight is `table[code]`. With
bits = 0 there are no codes, and the weight of entry k is `table[k]`.

The functions are written in the intermediate language of LLVM, since numba vectorizes neither
scattered additions nor loops of varying length. `add_column` and `dot` need AVX-512; other CPUs
execute equivalent scalar loops. `add_planes` is compiled to the vector instructions of any CPU.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from trainer.compress.jit import jit
from trainer.inference.kernels.llvm import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    LONG,
    OPAQUE,
    SHORT,
    WIDE,
    call,
    data,
    gather,
    intrinsic,
    load,
    multiply_add,
    permute,
    prefetch_line,
    scatter,
    splat,
    store,
)


class _Entries:
    """Builds the loop over entries `start` to `stop`, and decodes 16 of them in each step."""

    def __init__(self, builder: Any, entries: Any, table: Any, bits: Any) -> None:
        self.builder, self.entries, self.table = builder, entries, table
        self.shift = splat(builder, builder.trunc(bits, INT))
        one = splat(builder, INT(1))
        self.low = builder.sub(builder.shl(one, self.shift), one)
        self.bits = bits

    def each(self, start: Any, stop: Any, body: Callable[[Any, Any, Any], None]) -> None:
        """Emit `body(mask, positions, weights)` for all entries, 16 at a time."""
        builder = self.builder
        place = cgutils.alloca_once_value(builder, start)
        test, step, end = (builder.append_basic_block(name) for name in ("test", "step", "end"))
        builder.branch(test)
        builder.position_at_end(test)
        builder.cbranch(builder.icmp_signed("<", builder.load(place), stop), step, end)
        builder.position_at_end(step)
        at = builder.load(place)
        left = builder.trunc(builder.sub(stop, at), INT)
        lanes = ir.Constant(INTS, list(range(LANES)))
        mask = builder.icmp_signed("<", lanes, splat(builder, left))
        packed = builder.zext(self._load(self.entries, at, SHORT, mask), INTS)
        positions = builder.lshr(packed, self.shift)
        body(mask, positions, self._weights(at, packed, mask))
        builder.store(builder.add(at, LONG(LANES)), place)
        builder.branch(test)
        builder.position_at_end(end)

    def _weights(self, at: Any, packed: Any, mask: Any) -> Any:
        """Look up the weights of 16 entries: in a register, in memory, or one for each entry."""
        builder = self.builder
        codes = builder.and_(packed, self.low)
        found = cgutils.alloca_once(builder, FLOATS)
        plain = builder.icmp_signed("==", self.bits, LONG(0))
        with builder.if_else(plain) as (values, coded):
            with values:
                builder.store(self._load(self.table, at, FLOAT, mask), found)
            with coded:
                few = builder.icmp_signed("<=", self.bits, LONG(4))
                with builder.if_else(few) as (register, memory):
                    with register:
                        table = load(builder, self.table, LONG(0))
                        builder.store(permute(builder, table, codes), found)
                    with memory:
                        builder.store(gather(builder, self.table, codes, mask), found)
        return builder.load(found)

    def _load(self, base: Any, at: Any, kind: Any, mask: Any) -> Any:
        """16 elements of memory from `at`, zero where the mask is not set."""
        builder, vector = self.builder, ir.VectorType(kind, LANES)
        pointer = builder.bitcast(builder.gep(base, [at]), vector.as_pointer())
        suffix = "v16i16" if kind is SHORT else "v16f32"
        name = f"llvm.masked.load.{suffix}.p0{'' if OPAQUE else suffix}"
        align = INT(2 if kind is SHORT else 4)
        return call(builder, name, vector, pointer, align, mask, ir.Constant(vector, None))


@intrinsic
def prefetch(typing_context, entries, start, stop):  # type: ignore[no-untyped-def]
    """Load entries `start` to `stop` into the cache ahead of their use."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, stop = arguments
        base = data(context, builder, signature.args[0], entries)
        line = LONG(32)  # entries of a cache line
        with cgutils.for_range_slice(builder, start, stop, line) as (at, _):
            prefetch_line(builder, base, at)
        return context.get_dummy_value()

    return types.void(entries, types.int64, types.int64), generate


@intrinsic
def _add_column(typing_context, entries, start, stop, bits, table, x, out):  # type: ignore[no-untyped-def]
    """out[position] += weight * x for all entries; no position may occur twice among them."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, stop, bits, table, x, out = arguments
        entries, table, out = (
            data(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 6)
        )
        factor = splat(builder, x)

        def add(mask: Any, positions: Any, weights: Any) -> None:
            before = gather(builder, out, positions, mask)
            after = multiply_add(builder, weights, factor, before)
            scatter(builder, out, positions, mask, after)

        _Entries(builder, entries, table, bits).each(start, stop, add)
        return context.get_dummy_value()

    longs = (types.int64,) * 3
    return types.void(entries, *longs, table, types.float32, out), generate


@intrinsic
def _dot(typing_context, entries, start, stop, bits, table, x):  # type: ignore[no-untyped-def]
    """The sum of weight * x[position] over all entries."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, stop, bits, table, x = arguments
        entries, table, x = (
            data(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 5)
        )
        sums = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES))

        def add(mask: Any, positions: Any, weights: Any) -> None:
            inputs = gather(builder, x, positions, mask)
            builder.store(multiply_add(builder, weights, inputs, builder.load(sums)), sums)

        _Entries(builder, entries, table, bits).each(start, stop, add)
        name = "llvm.vector.reduce.fadd.v16f32"
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [FLOAT(0.0), builder.load(sums)], fastmath=["reassoc"])

    return types.float32(entries, *(types.int64,) * 3, table, x), generate


@jit
def _add_column_scalar(entries, start, stop, bits, table, x, out):  # type: ignore[no-untyped-def]
    """As `_add_column`, for CPUs without AVX-512."""
    if bits == 0:
        for k in range(start, stop):
            out[entries[k]] += table[k] * x
    else:
        for k in range(start, stop):
            out[entries[k] >> bits] += table[entries[k] & ((1 << bits) - 1)] * x


@jit
def _dot_scalar(entries, start, stop, bits, table, x):  # type: ignore[no-untyped-def]
    """As `_dot`, for CPUs without AVX-512."""
    total = types.float32(0)
    if bits == 0:
        for k in range(start, stop):
            total += table[k] * x[entries[k]]
    else:
        for k in range(start, stop):
            total += table[entries[k] & ((1 << bits) - 1)] * x[entries[k] >> bits]
    return total


add_column, dot = (_add_column, _dot) if WIDE else (_add_column_scalar, _dot_scalar)


def _planes(vectors: int) -> Any:
    """A function that adds weighted pieces of `vectors` * 16 consecutive inputs."""

    @intrinsic
    def add_planes(  # type: ignore[no-untyped-def]
        typing_context, entries, start, stop, bits, table, offsets, x, shift, out, place
    ):
        """out[place + i] += sum of weight * x[offsets[position] + shift + i]."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            _, start, stop, bits, _, _, _, shift, _, place = arguments
            entries, table, offsets, x, out = (
                data(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 5, 6, 8)
            )

            def piece(base: Any, index: Any, number: int) -> Any:
                return load(builder, base, builder.add(index, LONG(number * LANES)))

            sums = [
                cgutils.alloca_once_value(builder, piece(out, place, i)) for i in range(vectors)
            ]
            plain = builder.icmp_signed("==", bits, LONG(0))
            low = builder.sub(builder.shl(LONG(1), bits), LONG(1))
            with cgutils.for_range_slice(builder, start, stop, LONG(1)) as (at, _):
                packed = builder.zext(builder.load(builder.gep(entries, [at])), LONG)
                code = builder.select(plain, at, builder.and_(packed, low))
                weight = splat(builder, builder.load(builder.gep(table, [code])))
                position = builder.lshr(packed, bits)
                offset = builder.sext(builder.load(builder.gep(offsets, [position])), LONG)
                index = builder.add(offset, shift)
                for i in range(vectors):
                    new = multiply_add(builder, weight, piece(x, index, i), builder.load(sums[i]))
                    builder.store(new, sums[i])
            for i in range(vectors):
                at = builder.add(place, LONG(i * LANES))
                store(builder, builder.load(sums[i]), out, at)
            return context.get_dummy_value()

        long = types.int64
        arguments = (entries, long, long, long, table, offsets, x, long, out, long)
        return types.void(*arguments), generate

    return add_planes


add_planes_4, add_planes_1 = _planes(4), _planes(1)
