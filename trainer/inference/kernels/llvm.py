"""Pieces of LLVM's intermediate language, from which the kernels of this package are built.

Numba compiles functions whose body is written in that language (`intrinsic`); values are `llvmlite`
objects, and `builder` appends instructions that compute with them.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic

LANES = 16
"""Entries, or positions of a result, that one instruction processes."""

WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
"""Whether this CPU has AVX-512."""

intrinsic: Any = _numba_intrinsic  # the functions lose their first argument

BIT, SHORT, INT, LONG = (ir.IntType(bits) for bits in (1, 16, 32, 64))
FLOAT, BYTES = ir.FloatType(), ir.IntType(8).as_pointer()
MASK, INTS, FLOATS = (ir.VectorType(kind, LANES) for kind in (BIT, INT, FLOAT))


OPAQUE = not hasattr(BYTES, "pointee") or getattr(BYTES, "is_opaque", False)
"""Whether this version of LLVM has pointers without a type, on which names of functions depend."""


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call one of LLVM's own functions.

    Args:
        name: Of the function.
        result: Its type.
    """
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def splat(builder: Any, value: Any) -> Any:
    """A vector of 16 equal elements."""
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))


def load(builder: Any, base: Any, index: Any, kind: Any = FLOATS) -> Any:
    """16 consecutive elements of memory from `base[index]`."""
    value = builder.load(builder.bitcast(builder.gep(base, [index]), kind.as_pointer()))
    value.align = 4
    return value


def store(builder: Any, value: Any, base: Any, index: Any) -> None:
    """Write 16 floats to memory from `base[index]`."""
    pointer = builder.bitcast(builder.gep(base, [index]), FLOATS.as_pointer())
    builder.store(value, pointer).align = 4


def prefetch_line(builder: Any, base: Any, index: Any) -> None:
    """Load the cache line of `base[index]` ahead of its use."""
    address = builder.bitcast(builder.gep(base, [index]), BYTES)
    name = "llvm.prefetch.p0" + ("" if OPAQUE else "i8")
    call(builder, name, ir.VoidType(), address, INT(0), INT(3), INT(1))


def permute(builder: Any, table: Any, codes: Any) -> Any:
    """16 of the 16 floats in a register, by the lowest four bits of each code."""
    return call(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, table, codes)


def permute_two(builder: Any, low: Any, high: Any, codes: Any) -> Any:
    """16 of the 32 floats in two registers, by the lowest five bits of each code."""
    return call(builder, "llvm.x86.avx512.vpermi2var.ps.512", FLOATS, low, codes, high)


def gather(builder: Any, base: Any, indices: Any, mask: Any) -> Any:
    """`base[index]` for 16 indices, where the mask is set."""
    zeros, pointer = ir.Constant(FLOATS, [0.0] * LANES), builder.bitcast(base, BYTES)
    name = "llvm.x86.avx512.mask.gather.dps.512"
    return call(builder, name, FLOATS, zeros, pointer, indices, mask, INT(4))


def scatter(builder: Any, base: Any, indices: Any, mask: Any, values: Any) -> None:
    """Set `base[index]` for 16 indices, where the mask is set."""
    pointer, name = builder.bitcast(base, BYTES), "llvm.x86.avx512.mask.scatter.dps.512"
    call(builder, name, ir.VoidType(), pointer, mask, indices, values, INT(4))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c for 16 floats each."""
    return call(builder, "llvm.fmuladd.v16f32", FLOATS, a, b, c)


def data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The address of an array's first element."""
    return context.make_array(kind)(context, builder, array).data
