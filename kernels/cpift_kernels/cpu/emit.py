"""What the vector intrinsics are emitted from: LLVM types, and loads, stores and rounding of whole registers.

A storage type is named by a sample of the type that holds its bits: BF16 = int16, FP16 = uint16, FP32 = float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

Emitted = tuple[Any, Callable[..., ir.Value]]
# An intrinsic has the arguments of the kernels that call it, not those of its typing function.
intrinsic: Callable[[Callable[..., Emitted]], Callable[..., Any]] = extending.intrinsic
# The same, of numbers and types that are known when the kernel is compiled.
intrinsic_of_literals: Callable[[Callable[..., Emitted]], Callable[..., Any]] = extending.intrinsic(prefer_literal=True)

LANES = 32
AHEAD = 2048  # bytes
BF16, FP16, FP32 = np.int16(0), np.uint16(0), np.float32(0)

I1, I32 = ir.IntType(1), ir.IntType(32)
INT_LANES = ir.VectorType(I32, LANES)
FLOAT_LANES = ir.VectorType(ir.FloatType(), LANES)
MASK_LANES = ir.VectorType(I1, LANES)
MEMORY: dict[types.Type, Any] = {
    types.int16: ir.VectorType(ir.IntType(16), LANES),
    types.uint16: ir.VectorType(ir.HalfType(), LANES),
    types.float32: FLOAT_LANES,
}
LLVM_NAME: dict[types.Type, str] = {types.int16: "i16", types.uint16: "f16", types.float32: "f32"}
WIDTH: dict[types.Type, int] = {types.int16: 2, types.uint16: 2, types.float32: 4}


def constant(value: float, kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def broadcast(builder: ir.IRBuilder, scalar: ir.Value, kind: ir.Type) -> ir.Value:
    """Emit a vector of 32 times one scalar."""
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), constant(0, INT_LANES))


def widen(builder: ir.IRBuilder, raw: ir.Value, storage: types.Type) -> ir.Value:
    """Emit the fp32 values of a register as it is stored."""
    lanes = raw.type.count
    ints, floats = ir.VectorType(I32, lanes), ir.VectorType(ir.FloatType(), lanes)
    if storage == types.int16:
        return builder.bitcast(builder.shl(builder.zext(raw, ints), ir.Constant(ints, [16] * lanes)), floats)
    return builder.fpext(raw, floats) if storage == types.uint16 else raw


def magnitude_key(builder: ir.IRBuilder, tuned: ir.Value, pretrained: ir.Value) -> ir.Value:
    """Emit |tuned − pretrained| as int32 bit patterns, which order as the magnitudes do."""
    difference = builder.bitcast(builder.fsub(tuned, pretrained), INT_LANES)
    return builder.and_(difference, constant(0x7FFFFFFF, INT_LANES))


def load_register(
    builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value, lanes: int
) -> ir.Value:
    """Emit a load of `lanes` elements from `element` on, widened to fp32: for intrinsics of other widths than 32."""
    memory = ir.VectorType(MEMORY[storage].element, lanes)
    offset = builder.mul(element, ir.Constant(ir.IntType(64), WIDTH[storage]))
    pointer = builder.inttoptr(builder.add(address, offset), memory.as_pointer())
    return widen(builder, builder.load(pointer, align=WIDTH[storage]), storage)


def store_register(
    builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value, values: ir.Value
) -> None:
    """Emit a store of 32 values from `element` on, rounded to the storage type."""
    offset = builder.mul(element, ir.Constant(ir.IntType(64), WIDTH[storage]))
    pointer = builder.inttoptr(builder.add(address, offset), MEMORY[storage].as_pointer())
    builder.store(narrow(builder, values, storage), pointer, align=WIDTH[storage])


def load_at(builder: ir.IRBuilder, address: ir.Value, index: int | ir.Value, kind: ir.Type) -> ir.Value:
    """Emit a load of entry `index` of an array at an address."""
    index = ir.Constant(ir.IntType(64), index) if isinstance(index, int) else index
    return builder.load(builder.gep(builder.inttoptr(address, kind.as_pointer()), [index]))


def narrow(builder: ir.IRBuilder, values: ir.Value, storage: types.Type) -> ir.Value:
    """Round to nearest even; by hand for bf16, whose machine instruction flushes subnormals."""
    if storage == types.uint16:
        return builder.fptrunc(values, MEMORY[storage])
    if storage == types.float32:
        return values
    bits = builder.bitcast(values, INT_LANES)
    high = builder.lshr(bits, constant(16, INT_LANES))
    even = builder.add(builder.and_(high, constant(1, INT_LANES)), constant(0x7FFF, INT_LANES))
    rounded = builder.lshr(builder.add(bits, even), constant(16, INT_LANES))
    is_nan = builder.fcmp_unordered("uno", values, values)
    # a NaN keeps its bits; one whose payload lies in the dropped bits becomes a quiet NaN
    dropped = builder.icmp_signed("==", builder.and_(high, constant(0x7F, INT_LANES)), constant(0, INT_LANES))
    kept = builder.select(dropped, builder.or_(high, constant(0x40, INT_LANES)), high)
    return builder.trunc(builder.select(is_nan, kept, rounded), MEMORY[storage])


def prefetch(builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value) -> None:
    """Emit prefetches of the 32 elements that come AHEAD bytes after `element`.

    The processor's own prefetcher stops at every 4 KiB page, and models are mapped by such pages. A prefetch past the
    end of a tensor is harmless.
    """
    pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    begin = builder.add(address, builder.mul(element, ir.Constant(ir.IntType(64), WIDTH[storage])))
    for line in range(AHEAD, AHEAD + LANES * WIDTH[storage], 64):
        ahead = builder.inttoptr(builder.add(begin, ir.Constant(ir.IntType(64), line)), pointer)
        builder.call(function, [ahead, *(ir.Constant(I32, n) for n in (0, 3, 1))])  # to read, to keep, data
