"""A 32-lane vector type for numba kernels: one lane per bit of a mask word.

numba leaves vectorisation to LLVM's loop vectoriser, which neither packs comparisons into mask words nor widens
bf16. These intrinsics emit LLVM vector operations instead: LLVM lowers the same code to AVX-512 or AVX2.
Memory is addressed by integers (`tensor.data_ptr()`), so that one compiled signature serves every tensor.

A storage type is named by a sample of the type that holds its bits: BF16 = int16, FP16 = uint16, FP32 = float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

# Any: to a type checker an intrinsic has the arguments of its typing function, not those of the kernels that call it
intrinsic: Any = extending.intrinsic

LANES = 32
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
_LLVM_NAME: dict[types.Type, str] = {types.int16: "i16", types.uint16: "f16", types.float32: "f32"}
WIDTH: dict[types.Type, int] = {types.int16: 2, types.uint16: 2, types.float32: 4}


class _Lanes(types.Type):
    """Numba type of a vector of 32 int32 or float32."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        super().__init__(name=f"lanes_{name}")
        self.llvm = llvm


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: _Lanes) -> None:
        super().__init__(manager, lanes, lanes.llvm)


INTS, FLOATS = _Lanes("int32", INT_LANES), _Lanes("float32", FLOAT_LANES)
Emitted = tuple[Any, Callable[..., ir.Value]]


def constant(value: float, kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _broadcast(builder: ir.IRBuilder, scalar: ir.Value, kind: ir.Type) -> ir.Value:
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), constant(0, INT_LANES))


def _widen(builder: ir.IRBuilder, raw: ir.Value, storage: types.Type) -> ir.Value:
    lanes = raw.type.count
    ints, floats = ir.VectorType(I32, lanes), ir.VectorType(ir.FloatType(), lanes)
    if storage == types.int16:
        return builder.bitcast(builder.shl(builder.zext(raw, ints), ir.Constant(ints, [16] * lanes)), floats)
    return builder.fpext(raw, floats) if storage == types.uint16 else raw


def load_register(
    builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value, lanes: int
) -> ir.Value:
    """Emit a load of `lanes` elements from `element` on, widened to fp32: for intrinsics of other widths than 32."""
    memory = ir.VectorType(MEMORY[storage].element, lanes)
    offset = builder.mul(element, ir.Constant(ir.IntType(64), WIDTH[storage]))
    pointer = builder.inttoptr(builder.add(address, offset), memory.as_pointer())
    return _widen(builder, builder.load(pointer, align=WIDTH[storage]), storage)


def store_register(
    builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value, values: ir.Value
) -> None:
    """Emit a store of 32 values from `element` on, rounded to the storage type."""
    offset = builder.mul(element, ir.Constant(ir.IntType(64), WIDTH[storage]))
    pointer = builder.inttoptr(builder.add(address, offset), MEMORY[storage].as_pointer())
    builder.store(_narrow(builder, values, storage), pointer, align=WIDTH[storage])


def load_at(builder: ir.IRBuilder, address: ir.Value, index: int | ir.Value, kind: ir.Type) -> ir.Value:
    """Emit a load of entry `index` of an array at an address."""
    index = ir.Constant(ir.IntType(64), index) if isinstance(index, int) else index
    return builder.load(builder.gep(builder.inttoptr(address, kind.as_pointer()), [index]))


def _narrow(builder: ir.IRBuilder, values: ir.Value, storage: types.Type) -> ir.Value:
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


def _pointer(builder: ir.IRBuilder, address: ir.Value, storage: types.Type) -> ir.Value:
    return builder.inttoptr(address, MEMORY[storage].as_pointer())


@intrinsic
def width(typing: Any, storage: types.Type) -> Emitted:
    """Bytes an element of the storage type."""
    return types.int64(storage), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), WIDTH[storage])


@intrinsic
def load(typing: Any, storage: types.Type, address: types.Type) -> Emitted:
    """32 consecutive elements, widened to fp32."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = builder.load(_pointer(builder, args[1], storage), align=WIDTH[storage])
        return _widen(builder, raw, storage)

    return FLOATS(storage, types.int64), emit


@intrinsic
def load_some(typing: Any, storage: types.Type, address: types.Type, bits: types.Type) -> Emitted:
    """The elements whose bit is set in `bits`, 0 elsewhere; memory behind a clear bit is not read."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = MEMORY[storage]
        signature = ir.FunctionType(memory, [memory.as_pointer(), I32, MASK_LANES, memory])
        name = f"llvm.masked.load.v{LANES}{_LLVM_NAME[storage]}.p0"
        masked = cgutils.get_or_insert_function(builder.module, signature, name)
        align = ir.Constant(I32, WIDTH[storage])
        pointer = _pointer(builder, args[1], storage)
        raw = builder.call(masked, [pointer, align, builder.bitcast(args[2], MASK_LANES), ir.Constant(memory, None)])
        return _widen(builder, raw, storage)

    return FLOATS(storage, types.int64, types.uint32), emit


@intrinsic
def store(typing: Any, storage: types.Type, address: types.Type, values: types.Type) -> Emitted:
    """Round 32 values to the storage type, to nearest even, and write them."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = _narrow(builder, args[2], storage)
        builder.store(raw, _pointer(builder, args[1], storage), align=WIDTH[storage])
        return context.get_dummy_value()

    return types.void(storage, types.int64, FLOATS), emit


@intrinsic
def store_some(typing: Any, storage: types.Type, address: types.Type, values: types.Type, bits: types.Type) -> Emitted:
    """`store` of the elements whose bit is set in `bits`; the memory behind a clear bit is not touched."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = MEMORY[storage]
        signature = ir.FunctionType(ir.VoidType(), [memory, memory.as_pointer(), I32, MASK_LANES])
        name = f"llvm.masked.store.v{LANES}{_LLVM_NAME[storage]}.p0"
        masked = cgutils.get_or_insert_function(builder.module, signature, name)
        raw, pointer = _narrow(builder, args[2], storage), _pointer(builder, args[1], storage)
        align = ir.Constant(I32, WIDTH[storage])
        builder.call(masked, [raw, pointer, align, builder.bitcast(args[3], MASK_LANES)])
        return context.get_dummy_value()

    return types.void(storage, types.int64, FLOATS, types.uint32), emit


@intrinsic
def fill(typing: Any, value: types.Type) -> Emitted:
    """32 times one fp32 value."""
    return FLOATS(types.float32), lambda context, builder, sig, args: _broadcast(builder, args[0], FLOAT_LANES)


@intrinsic
def fma(typing: Any, values: types.Type, factor: types.Type, total: types.Type) -> Emitted:
    """total + factor * values, rounded once; factor is one fp32 number."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        signature = ir.FunctionType(FLOAT_LANES, [FLOAT_LANES] * 3)
        fused = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{LANES}f32")
        return builder.call(fused, [args[0], _broadcast(builder, args[1], FLOAT_LANES), args[2]])

    return FLOATS(FLOATS, types.float32, FLOATS), emit


@intrinsic
def add(typing: Any, left: types.Type, right: types.Type) -> Emitted:
    """left + right."""
    return FLOATS(FLOATS, FLOATS), lambda context, builder, sig, args: builder.fadd(*args)


@intrinsic
def divide(typing: Any, left: types.Type, right: types.Type) -> Emitted:
    """left / right."""
    return FLOATS(FLOATS, FLOATS), lambda context, builder, sig, args: builder.fdiv(*args)


@intrinsic
def select(typing: Any, bits: types.Type, chosen: types.Type, otherwise: types.Type) -> Emitted:
    """Lane i of `chosen` where bit i is set, of `otherwise` elsewhere."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.bitcast(args[0], MASK_LANES), args[1], args[2])

    return FLOATS(types.uint32, FLOATS, FLOATS), emit


@intrinsic
def magnitude_bits(typing: Any, tuned: types.Type, pretrained: types.Type) -> Emitted:
    """|tuned − pretrained| as int32 bit patterns, which order as the magnitudes do."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        difference = builder.bitcast(builder.fsub(args[0], args[1]), INT_LANES)
        return builder.and_(difference, constant(0x7FFFFFFF, INT_LANES))

    return INTS(FLOATS, FLOATS), emit


@intrinsic
def magnitude(typing: Any, tuned: types.Type, pretrained: types.Type) -> Emitted:
    """|tuned − pretrained|."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(builder.fsub(args[0], args[1]), INT_LANES)
        return builder.bitcast(builder.and_(bits, constant(0x7FFFFFFF, INT_LANES)), FLOAT_LANES)

    return FLOATS(FLOATS, FLOATS), emit


@intrinsic
def exceeds(typing: Any, left: types.Type, right: types.Type) -> Emitted:
    """A mask word: bit i says left[i] > right[i]."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.fcmp_ordered(">", *args), I32)

    return types.uint32(FLOATS, FLOATS), emit


@intrinsic
def above(typing: Any, keys: types.Type, threshold: types.Type) -> Emitted:
    """A mask word: bit i says keys[i] > threshold."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.icmp_signed(">", args[0], _broadcast(builder, args[1], INT_LANES)), I32)

    return types.uint32(INTS, types.int32), emit


@intrinsic
def load_one(typing: Any, storage: types.Type, address: types.Type) -> Emitted:
    """One element, widened to fp32."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = MEMORY[storage].element
        raw = builder.load(builder.inttoptr(args[1], memory.as_pointer()), align=WIDTH[storage])
        if storage == types.int16:
            return builder.bitcast(builder.shl(builder.zext(raw, I32), ir.Constant(I32, 16)), ir.FloatType())
        return builder.fpext(raw, ir.FloatType()) if storage == types.uint16 else raw

    return types.float32(storage, types.int64), emit


@intrinsic
def zeros(typing: Any) -> Emitted:
    """32 times the int32 0."""
    return INTS(), lambda context, builder, sig, args: constant(0, INT_LANES)


@intrinsic
def larger(typing: Any, left: types.Type, right: types.Type) -> Emitted:
    """The larger of two signed int32, lane by lane."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.icmp_signed(">", *args), *args)

    return INTS(INTS, INTS), emit


@intrinsic
def total_of(typing: Any, values: types.Type) -> Emitted:
    """The sum of 32 int32, which must fit one."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(I32, [INT_LANES]), f"llvm.vector.reduce.add.v{LANES}i32"
        )
        return builder.sext(builder.call(reduce, [args[0]]), ir.IntType(64))

    return types.int64(INTS), emit


@intrinsic
def write_ints(typing: Any, address: types.Type, values: types.Type) -> Emitted:
    """Write 32 int32 to an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], INT_LANES.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, INTS), emit
