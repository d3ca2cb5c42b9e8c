"""A 32-lane vector type for numba kernels: one lane per bit of a mask word.

numba leaves vectorisation to LLVM's loop vectoriser, which neither packs comparisons into mask words nor widens
bf16. These intrinsics emit LLVM vector operations instead: LLVM lowers the same code to AVX-512 or AVX2.
Memory is addressed by integers (`tensor.data_ptr()`), so that one compiled signature serves every tensor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from .emit import (
    FLOAT_LANES,
    I32,
    INT_LANES,
    LANES,
    LLVM_NAME,
    MASK_LANES,
    MEMORY,
    WIDTH,
    Emitted,
    broadcast,
    constant,
    intrinsic,
    magnitude_key,
    narrow,
    widen,
)


class Lanes(types.Type):
    """Numba type of a vector of 32 numbers."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        super().__init__(name=f"lanes_{name}")
        self.llvm = llvm


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, lanes.llvm)  # type: ignore[no-untyped-call]  # numba declares no types


INTS, FLOATS = Lanes("int32", INT_LANES), Lanes("float32", FLOAT_LANES)


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
        return widen(builder, raw, storage)

    return FLOATS(storage, types.int64), emit


@intrinsic
def load_some(typing: Any, storage: types.Type, address: types.Type, bits: types.Type) -> Emitted:
    """The elements whose bit is set in `bits`, 0 elsewhere; memory behind a clear bit is not read."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = MEMORY[storage]
        signature = ir.FunctionType(memory, [memory.as_pointer(), I32, MASK_LANES, memory])
        name = f"llvm.masked.load.v{LANES}{LLVM_NAME[storage]}.p0"
        masked = cgutils.get_or_insert_function(builder.module, signature, name)
        align = ir.Constant(I32, WIDTH[storage])
        pointer = _pointer(builder, args[1], storage)
        raw = builder.call(masked, [pointer, align, builder.bitcast(args[2], MASK_LANES), ir.Constant(memory, None)])
        return widen(builder, raw, storage)

    return FLOATS(storage, types.int64, types.uint32), emit


@intrinsic
def store(typing: Any, storage: types.Type, address: types.Type, values: types.Type) -> Emitted:
    """Round 32 values to the storage type, to nearest even, and write them."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = narrow(builder, args[2], storage)
        builder.store(raw, _pointer(builder, args[1], storage), align=WIDTH[storage])
        return context.get_dummy_value()

    return types.void(storage, types.int64, FLOATS), emit


@intrinsic
def store_some(typing: Any, storage: types.Type, address: types.Type, values: types.Type, bits: types.Type) -> Emitted:
    """`store` of the elements whose bit is set in `bits`; the memory behind a clear bit is not touched."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = MEMORY[storage]
        signature = ir.FunctionType(ir.VoidType(), [memory, memory.as_pointer(), I32, MASK_LANES])
        name = f"llvm.masked.store.v{LANES}{LLVM_NAME[storage]}.p0"
        masked = cgutils.get_or_insert_function(builder.module, signature, name)
        raw, pointer = narrow(builder, args[2], storage), _pointer(builder, args[1], storage)
        align = ir.Constant(I32, WIDTH[storage])
        builder.call(masked, [raw, pointer, align, builder.bitcast(args[3], MASK_LANES)])
        return context.get_dummy_value()

    return types.void(storage, types.int64, FLOATS, types.uint32), emit


@intrinsic
def fill(typing: Any, value: types.Type) -> Emitted:
    """32 times one fp32 value."""
    return FLOATS(types.float32), lambda context, builder, sig, args: broadcast(builder, args[0], FLOAT_LANES)


@intrinsic
def fma(typing: Any, values: types.Type, factor: types.Type, total: types.Type) -> Emitted:
    """total + factor * values, rounded once; factor is one fp32 number."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        signature = ir.FunctionType(FLOAT_LANES, [FLOAT_LANES] * 3)
        fused = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{LANES}f32")
        return builder.call(fused, [args[0], broadcast(builder, args[1], FLOAT_LANES), args[2]])

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
    return INTS(FLOATS, FLOATS), lambda context, builder, sig, args: magnitude_key(builder, *args)


@intrinsic
def magnitude(typing: Any, tuned: types.Type, pretrained: types.Type) -> Emitted:
    """|tuned − pretrained|."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(magnitude_key(builder, *args), FLOAT_LANES)

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
        return builder.bitcast(builder.icmp_signed(">", args[0], broadcast(builder, args[1], INT_LANES)), I32)

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
