"""Loops over the stored entries of a compressed weight, 16 at a time, for kernels of this package.

An entry is an unsigned 16-bit integer: position * 2^bits + code. Its weight is `table[code]`. With
bits = 0 there are no codes, and the weight of entry k is `table[k]`.

The functions are written in the intermediate language of LLVM, since numba vectorizes neither
scattered additions nor loops of varying length. `add_column` and `dot` need AVX-512; other CPUs
execute equivalent scalar loops. `add_planes` is compiled to the vector instructions of any CPU.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic

from trainer.compress.jit import jit

LANES = 16
"""Entries, or positions of a result, that one instruction processes."""

WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
"""Whether this CPU has AVX-512."""

_intrinsic: Any = _numba_intrinsic  # the functions lose their first argument

_BIT, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_FLOAT, _BYTES = ir.FloatType(), ir.IntType(8).as_pointer()
_MASK, _INTS, _FLOATS = (ir.VectorType(kind, LANES) for kind in (_BIT, _INT, _FLOAT))


class _Entries:
    """Builds the loop over entries `start` to `stop`, and decodes 16 of them in each step."""

    def __init__(self, builder: Any, entries: Any, table: Any, bits: Any) -> None:
        self.builder, self.entries, self.table = builder, entries, table
        self.shift = _splat(builder, builder.trunc(bits, _INT))
        one = _splat(builder, _INT(1))
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
        left = builder.trunc(builder.sub(stop, at), _INT)
        lanes = ir.Constant(_INTS, list(range(LANES)))
        mask = builder.icmp_signed("<", lanes, _splat(builder, left))
        packed = builder.zext(self._load(self.entries, at, _SHORT, mask), _INTS)
        positions = builder.lshr(packed, self.shift)
        body(mask, positions, self._weights(at, packed, mask))
        builder.store(builder.add(at, _LONG(LANES)), place)
        builder.branch(test)
        builder.position_at_end(end)

    def _weights(self, at: Any, packed: Any, mask: Any) -> Any:
        """Look up the weights of 16 entries: in a register, in memory, or one for each entry."""
        builder = self.builder
        codes = builder.and_(packed, self.low)
        found = cgutils.alloca_once(builder, _FLOATS)
        plain = builder.icmp_signed("==", self.bits, _LONG(0))
        with builder.if_else(plain) as (values, coded):
            with values:
                builder.store(self._load(self.table, at, _FLOAT, mask), found)
            with coded:
                few = builder.icmp_signed("<=", self.bits, _LONG(4))
                with builder.if_else(few) as (register, memory):
                    with register:
                        pointer = builder.bitcast(self.table, _FLOATS.as_pointer())
                        table = builder.load(pointer)
                        table.align = 4
                        name = "llvm.x86.avx512.permvar.sf.512"
                        value = _call(builder, name, _FLOATS, table, codes)
                        builder.store(value, found)
                    with memory:
                        builder.store(_gather(builder, self.table, codes, mask), found)
        return builder.load(found)

    def _load(self, base: Any, at: Any, kind: Any, mask: Any) -> Any:
        """16 elements of memory from `at`, zero where the mask is not set."""
        builder, vector = self.builder, ir.VectorType(kind, LANES)
        pointer = builder.bitcast(builder.gep(base, [at]), vector.as_pointer())
        suffix = "v16i16" if kind is _SHORT else "v16f32"
        name = f"llvm.masked.load.{suffix}.p0{'' if _OPAQUE else suffix}"
        align = _INT(2 if kind is _SHORT else 4)
        return _call(builder, name, vector, pointer, align, mask, ir.Constant(vector, None))


_OPAQUE = not hasattr(ir.IntType(8).as_pointer(), "pointee") or getattr(
    ir.IntType(8).as_pointer(), "is_opaque", False
)


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _splat(builder: Any, value: Any) -> Any:
    """A vector of 16 equal elements."""
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _gather(builder: Any, base: Any, indices: Any, mask: Any) -> Any:
    zeros, pointer = ir.Constant(_FLOATS, [0.0] * LANES), builder.bitcast(base, _BYTES)
    name = "llvm.x86.avx512.mask.gather.dps.512"
    return _call(builder, name, _FLOATS, zeros, pointer, indices, mask, _INT(4))


def _scatter(builder: Any, base: Any, indices: Any, mask: Any, values: Any) -> None:
    pointer, name = builder.bitcast(base, _BYTES), "llvm.x86.avx512.mask.scatter.dps.512"
    _call(builder, name, ir.VoidType(), pointer, mask, indices, values, _INT(4))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", _FLOATS, a, b, c)


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The address of an array's first element."""
    return context.make_array(kind)(context, builder, array).data


@_intrinsic
def prefetch(typing_context, entries, start, stop):  # type: ignore[no-untyped-def]
    """Load entries `start` to `stop` into the cache ahead of their use."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, stop = arguments
        base = _data(context, builder, signature.args[0], entries)
        line = _LONG(32)  # entries of a cache line
        with cgutils.for_range_slice(builder, start, stop, line) as (at, _):
            address = builder.bitcast(builder.gep(base, [at]), _BYTES)
            name = "llvm.prefetch.p0" + ("" if _OPAQUE else "i8")
            _call(builder, name, ir.VoidType(), address, _INT(0), _INT(3), _INT(1))
        return context.get_dummy_value()

    return types.void(entries, types.int64, types.int64), generate


@_intrinsic
def _add_column(typing_context, entries, start, stop, bits, table, x, out):  # type: ignore[no-untyped-def]
    """out[position] += weight * x for all entries; no position may occur twice among them."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, stop, bits, table, x, out = arguments
        entries, table, out = (
            _data(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 6)
        )
        factor = _splat(builder, x)

        def add(mask: Any, positions: Any, weights: Any) -> None:
            before = _gather(builder, out, positions, mask)
            after = _multiply_add(builder, weights, factor, before)
            _scatter(builder, out, positions, mask, after)

        _Entries(builder, entries, table, bits).each(start, stop, add)
        return context.get_dummy_value()

    longs = (types.int64,) * 3
    return types.void(entries, *longs, table, types.float32, out), generate


@_intrinsic
def _dot(typing_context, entries, start, stop, bits, table, x):  # type: ignore[no-untyped-def]
    """The sum of weight * x[position] over all entries."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        entries, start, stop, bits, table, x = arguments
        entries, table, x = (
            _data(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 5)
        )
        sums = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES))

        def add(mask: Any, positions: Any, weights: Any) -> None:
            inputs = _gather(builder, x, positions, mask)
            builder.store(_multiply_add(builder, weights, inputs, builder.load(sums)), sums)

        _Entries(builder, entries, table, bits).each(start, stop, add)
        name = "llvm.vector.reduce.fadd.v16f32"
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [_FLOAT(0.0), builder.load(sums)], fastmath=["reassoc"])

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

    @_intrinsic
    def add_planes(  # type: ignore[no-untyped-def]
        typing_context, entries, start, stop, bits, table, offsets, x, shift, out, place
    ):
        """out[place + i] += sum of weight * x[offsets[position] + shift + i]."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            _, start, stop, bits, _, _, _, shift, _, place = arguments
            entries, table, offsets, x, out = (
                _data(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 5, 6, 8)
            )

            def piece(base: Any, index: Any, number: int) -> Any:
                address = builder.gep(base, [builder.add(index, _LONG(number * LANES))])
                return builder.bitcast(address, _FLOATS.as_pointer())

            def read(base: Any, index: Any, number: int) -> Any:
                value = builder.load(piece(base, index, number))
                value.align = 4
                return value

            sums = [cgutils.alloca_once_value(builder, read(out, place, i)) for i in range(vectors)]
            plain = builder.icmp_signed("==", bits, _LONG(0))
            low = builder.sub(builder.shl(_LONG(1), bits), _LONG(1))
            with cgutils.for_range_slice(builder, start, stop, _LONG(1)) as (at, _):
                packed = builder.zext(builder.load(builder.gep(entries, [at])), _LONG)
                code = builder.select(plain, at, builder.and_(packed, low))
                weight = _splat(builder, builder.load(builder.gep(table, [code])))
                position = builder.lshr(packed, bits)
                offset = builder.sext(builder.load(builder.gep(offsets, [position])), _LONG)
                index = builder.add(offset, shift)
                for i in range(vectors):
                    new = _multiply_add(builder, weight, read(x, index, i), builder.load(sums[i]))
                    builder.store(new, sums[i])
            for i in range(vectors):
                builder.store(builder.load(sums[i]), piece(out, place, i)).align = 4
            return context.get_dummy_value()

        long = types.int64
        arguments = (entries, long, long, long, table, offsets, x, long, out, long)
        return types.void(*arguments), generate

    return add_planes


add_planes_4, add_planes_1 = _planes(4), _planes(1)
