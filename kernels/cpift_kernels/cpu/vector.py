"""A 32-lane vector type for numba kernels: one lane per bit of a mask word.

numba leaves vectorisation to LLVM's loop vectoriser, which neither packs comparisons into mask words nor widens
bf16. These intrinsics emit LLVM vector operations instead: LLVM lowers the same code to AVX-512, AVX2 or NEON.
Memory is addressed by integers (`tensor.data_ptr()`), so that one compiled signature serves every tensor.

A storage type is named by a sample of the type that holds its bits: BF16 = int16, FP16 = uint16, FP32 = float32;
MIXED = uint8 stands for a storage type that a number tells at run time (0 bf16, 1 fp16, 2 fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.extending import models, overload, register_model

# Any: to a type checker an intrinsic has the arguments of its typing function, not those of the kernels that call it
intrinsic: Any = extending.intrinsic

LANES = 32
BF16, FP16, FP32, MIXED = np.int16(0), np.uint16(0), np.float32(0), np.uint8(0)
WHOLE = 0xFFFFFFFF

_I1, _I32 = ir.IntType(1), ir.IntType(32)
_INTS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_MASK = ir.VectorType(_I1, LANES)
_MEMORY: dict[types.Type, Any] = {
    types.int16: ir.VectorType(ir.IntType(16), LANES),
    types.uint16: ir.VectorType(ir.HalfType(), LANES),
    types.float32: _FLOATS,
}
_LLVM_NAME: dict[types.Type, str] = {types.int16: "i16", types.uint16: "f16", types.float32: "f32"}
_WIDTH: dict[types.Type, int] = {types.int16: 2, types.uint16: 2, types.float32: 4}


class _Lanes(types.Type):
    """Numba type of a vector of 32 int32 or float32."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        super().__init__(name=f"lanes_{name}")
        self.llvm = llvm


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: _Lanes) -> None:
        super().__init__(manager, lanes, lanes.llvm)


INTS, FLOATS = _Lanes("int32", _INTS), _Lanes("float32", _FLOATS)
Emitted = tuple[Any, Callable[..., ir.Value]]


def _constant(value: float, kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _broadcast(builder: ir.IRBuilder, scalar: ir.Value, kind: ir.Type) -> ir.Value:
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), _constant(0, _INTS))


def _widen(builder: ir.IRBuilder, raw: ir.Value, storage: types.Type) -> ir.Value:
    lanes = raw.type.count
    ints, floats = ir.VectorType(_I32, lanes), ir.VectorType(ir.FloatType(), lanes)
    if storage == types.int16:
        return builder.bitcast(builder.shl(builder.zext(raw, ints), ir.Constant(ints, [16] * lanes)), floats)
    return builder.fpext(raw, floats) if storage == types.uint16 else raw


def load_register(
    builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value, lanes: int
) -> ir.Value:
    """Emit a load of `lanes` elements from `element` on, widened to fp32: for intrinsics of other widths than 32."""
    memory = ir.VectorType(_MEMORY[storage].element, lanes)
    offset = builder.mul(element, ir.Constant(ir.IntType(64), _WIDTH[storage]))
    pointer = builder.inttoptr(builder.add(address, offset), memory.as_pointer())
    return _widen(builder, builder.load(pointer, align=_WIDTH[storage]), storage)


def store_register(
    builder: ir.IRBuilder, storage: types.Type, address: ir.Value, element: ir.Value, values: ir.Value
) -> None:
    """Emit a store of 32 values from `element` on, rounded to the storage type."""
    offset = builder.mul(element, ir.Constant(ir.IntType(64), _WIDTH[storage]))
    pointer = builder.inttoptr(builder.add(address, offset), _MEMORY[storage].as_pointer())
    builder.store(_narrow(builder, values, storage), pointer, align=_WIDTH[storage])


def load_at(builder: ir.IRBuilder, address: ir.Value, index: int | ir.Value, kind: ir.Type) -> ir.Value:
    """Emit a load of entry `index` of an array at an address."""
    index = ir.Constant(ir.IntType(64), index) if isinstance(index, int) else index
    return builder.load(builder.gep(builder.inttoptr(address, kind.as_pointer()), [index]))


def _narrow(builder: ir.IRBuilder, values: ir.Value, storage: types.Type) -> ir.Value:
    """Round to nearest even; by hand for bf16, whose machine instruction flushes subnormals."""
    if storage == types.uint16:
        return builder.fptrunc(values, _MEMORY[storage])
    if storage == types.float32:
        return values
    bits = builder.bitcast(values, _INTS)
    high = builder.lshr(bits, _constant(16, _INTS))
    even = builder.add(builder.and_(high, _constant(1, _INTS)), _constant(0x7FFF, _INTS))
    rounded = builder.lshr(builder.add(bits, even), _constant(16, _INTS))
    is_nan = builder.fcmp_unordered("uno", values, values)
    # a NaN keeps its bits; one whose payload lies in the dropped bits becomes a quiet NaN
    dropped = builder.icmp_signed("==", builder.and_(high, _constant(0x7F, _INTS)), _constant(0, _INTS))
    kept = builder.select(dropped, builder.or_(high, _constant(0x40, _INTS)), high)
    return builder.trunc(builder.select(is_nan, kept, rounded), _MEMORY[storage])


def _pointer(builder: ir.IRBuilder, address: ir.Value, storage: types.Type) -> ir.Value:
    return builder.inttoptr(address, _MEMORY[storage].as_pointer())


@intrinsic
def width(typing: Any, storage: types.Type) -> Emitted:
    """Bytes an element of the storage type."""
    return types.int64(storage), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), _WIDTH[storage])


@intrinsic
def load(typing: Any, storage: types.Type, address: types.Type) -> Emitted:
    """32 consecutive elements, widened to fp32."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = builder.load(_pointer(builder, args[1], storage), align=_WIDTH[storage])
        return _widen(builder, raw, storage)

    return FLOATS(storage, types.int64), emit


@intrinsic
def load_some(typing: Any, storage: types.Type, address: types.Type, bits: types.Type) -> Emitted:
    """The elements whose bit is set in `bits`, 0 elsewhere; memory behind a clear bit is not read."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = _MEMORY[storage]
        signature = ir.FunctionType(memory, [memory.as_pointer(), _I32, _MASK, memory])
        name = f"llvm.masked.load.v{LANES}{_LLVM_NAME[storage]}.p0"
        masked = cgutils.get_or_insert_function(builder.module, signature, name)
        align = ir.Constant(_I32, _WIDTH[storage])
        pointer = _pointer(builder, args[1], storage)
        raw = builder.call(masked, [pointer, align, builder.bitcast(args[2], _MASK), ir.Constant(memory, None)])
        return _widen(builder, raw, storage)

    return FLOATS(storage, types.int64, types.uint32), emit


@intrinsic
def store(typing: Any, storage: types.Type, address: types.Type, values: types.Type) -> Emitted:
    """Round 32 values to the storage type, to nearest even, and write them."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = _narrow(builder, args[2], storage)
        builder.store(raw, _pointer(builder, args[1], storage), align=_WIDTH[storage])
        return context.get_dummy_value()

    return types.void(storage, types.int64, FLOATS), emit


@intrinsic
def store_some(typing: Any, storage: types.Type, address: types.Type, values: types.Type, bits: types.Type) -> Emitted:
    """`store` of the elements whose bit is set in `bits`; the memory behind a clear bit is not touched."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = _MEMORY[storage]
        signature = ir.FunctionType(ir.VoidType(), [memory, memory.as_pointer(), _I32, _MASK])
        name = f"llvm.masked.store.v{LANES}{_LLVM_NAME[storage]}.p0"
        masked = cgutils.get_or_insert_function(builder.module, signature, name)
        raw, pointer = _narrow(builder, args[2], storage), _pointer(builder, args[1], storage)
        align = ir.Constant(_I32, _WIDTH[storage])
        builder.call(masked, [raw, pointer, align, builder.bitcast(args[3], _MASK)])
        return context.get_dummy_value()

    return types.void(storage, types.int64, FLOATS, types.uint32), emit


@intrinsic
def fill(typing: Any, value: types.Type) -> Emitted:
    """32 times one fp32 value."""
    return FLOATS(types.float32), lambda context, builder, sig, args: _broadcast(builder, args[0], _FLOATS)


@intrinsic
def fma(typing: Any, values: types.Type, factor: types.Type, total: types.Type) -> Emitted:
    """total + factor * values, rounded once; factor is one fp32 number."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        signature = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fused = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{LANES}f32")
        return builder.call(fused, [args[0], _broadcast(builder, args[1], _FLOATS), args[2]])

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
        return builder.select(builder.bitcast(args[0], _MASK), args[1], args[2])

    return FLOATS(types.uint32, FLOATS, FLOATS), emit


@intrinsic
def magnitude_bits(typing: Any, tuned: types.Type, pretrained: types.Type) -> Emitted:
    """|tuned − pretrained| as int32 bit patterns, which order as the magnitudes do."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        difference = builder.bitcast(builder.fsub(args[0], args[1]), _INTS)
        return builder.and_(difference, _constant(0x7FFFFFFF, _INTS))

    return INTS(FLOATS, FLOATS), emit


@intrinsic
def magnitude(typing: Any, tuned: types.Type, pretrained: types.Type) -> Emitted:
    """|tuned − pretrained|."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(builder.fsub(args[0], args[1]), _INTS)
        return builder.bitcast(builder.and_(bits, _constant(0x7FFFFFFF, _INTS)), _FLOATS)

    return FLOATS(FLOATS, FLOATS), emit


@intrinsic
def exceeds(typing: Any, left: types.Type, right: types.Type) -> Emitted:
    """A mask word: bit i says left[i] > right[i]."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.fcmp_ordered(">", *args), _I32)

    return types.uint32(FLOATS, FLOATS), emit


@intrinsic
def above(typing: Any, keys: types.Type, threshold: types.Type) -> Emitted:
    """A mask word: bit i says keys[i] > threshold."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.icmp_signed(">", args[0], _broadcast(builder, args[1], _INTS)), _I32)

    return types.uint32(INTS, types.int32), emit


@intrinsic
def load_one(typing: Any, storage: types.Type, address: types.Type) -> Emitted:
    """One element, widened to fp32."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory = _MEMORY[storage].element
        raw = builder.load(builder.inttoptr(args[1], memory.as_pointer()), align=_WIDTH[storage])
        if storage == types.int16:
            return builder.bitcast(builder.shl(builder.zext(raw, _I32), ir.Constant(_I32, 16)), ir.FloatType())
        return builder.fpext(raw, ir.FloatType()) if storage == types.uint16 else raw

    return types.float32(storage, types.int64), emit


@intrinsic
def bits_of(typing: Any, value: types.Type) -> Emitted:
    """The bit pattern of an fp32 value."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], _I32)


@intrinsic
def popcount(typing: Any, word: types.Type) -> Emitted:
    """The number of set bits of a mask word."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), emit


@intrinsic
def lowest_bit(typing: Any, word: types.Type) -> Emitted:
    """The index of the lowest set bit of a non-zero mask word."""
    return types.uint32(types.uint32), lambda context, builder, sig, args: builder.cttz(args[0], ir.Constant(_I1, 1))


@intrinsic
def zeros(typing: Any) -> Emitted:
    """32 times the int32 0."""
    return INTS(), lambda context, builder, sig, args: _constant(0, _INTS)


@intrinsic
def larger(typing: Any, left: types.Type, right: types.Type) -> Emitted:
    """The larger of two signed int32, lane by lane."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.icmp_signed(">", *args), *args)

    return INTS(INTS, INTS), emit


@intrinsic
def count_common(typing: Any, left: types.Type, right: types.Type, total: types.Type) -> Emitted:
    """total + the bits that 32 mask words at one address share with 32 at another, word by word."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        words = [builder.load(builder.inttoptr(arg, _INTS.as_pointer()), align=4) for arg in args[:2]]
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INTS, [_INTS]), f"llvm.ctpop.v{LANES}i32"
        )
        return builder.add(args[2], builder.call(count, [builder.and_(*words)]))

    return INTS(types.int64, types.int64, INTS), emit


@intrinsic
def total_of(typing: Any, values: types.Type) -> Emitted:
    """The sum of 32 int32, which must fit one."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_I32, [_INTS]), f"llvm.vector.reduce.add.v{LANES}i32"
        )
        return builder.sext(builder.call(reduce, [args[0]]), ir.IntType(64))

    return types.int64(INTS), emit


@intrinsic
def read_word(typing: Any, address: types.Type) -> Emitted:
    """The mask word at an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], _I32.as_pointer()), align=4)

    return types.uint32(types.int64), emit


@intrinsic
def occupied(typing: Any, address: types.Type) -> Emitted:
    """Which of the 32 mask words at an address are not 0: bit i for word i."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        words = builder.load(builder.inttoptr(args[0], _INTS.as_pointer()), align=4)
        return builder.bitcast(builder.icmp_signed("!=", words, _constant(0, _INTS)), _I32)

    return types.uint32(types.int64), emit


@intrinsic
def write_ints(typing: Any, address: types.Type, values: types.Type) -> Emitted:
    """Write 32 int32 to an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], _INTS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, INTS), emit


@intrinsic
def write_word(typing: Any, address: types.Type, word: types.Type) -> Emitted:
    """Write a mask word to an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], _I32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), emit


@intrinsic
def move(typing: Any, storage: types.Type, source: types.Type, target: types.Type) -> Emitted:
    """Copy the bits of one element."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw, align = ir.IntType(8 * _WIDTH[storage]).as_pointer(), _WIDTH[storage]
        value = builder.load(builder.inttoptr(args[1], raw), align=align)
        builder.store(value, builder.inttoptr(args[2], raw), align=align)
        return context.get_dummy_value()

    return types.void(storage, types.int64, types.int64), emit


@intrinsic
def clear(typing: Any, storage: types.Type, address: types.Type, bits: types.Type) -> Emitted:
    """Set to +0 those of 32 elements whose bit is set; the others keep their bits."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory, align = ir.VectorType(ir.IntType(8 * _WIDTH[storage]), LANES), _WIDTH[storage]
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        kept = builder.select(
            builder.bitcast(args[2], _MASK), ir.Constant(memory, None), builder.load(pointer, align=align)
        )
        builder.store(kept, pointer, align=align)
        return context.get_dummy_value()

    return types.void(storage, types.int64, types.uint32), emit


@njit
def load_kind(kind, address, first):  # type: ignore[no-untyped-def]
    """`load` of elements first..first+31 where the storage type is a number: 0 bf16, 1 fp16, 2 fp32."""
    if kind == 0:
        return load(BF16, address + 2 * first)
    if kind == 1:
        return load(FP16, address + 2 * first)
    return load(FP32, address + 4 * first)


@njit
def load_some_kind(kind, address, first, bits):  # type: ignore[no-untyped-def]
    """`load_some` where the storage type is a number."""
    if kind == 0:
        return load_some(BF16, address + 2 * first, bits)
    if kind == 1:
        return load_some(FP16, address + 2 * first, bits)
    return load_some(FP32, address + 4 * first, bits)


@njit
def load_one_kind(kind, address, index):  # type: ignore[no-untyped-def]
    """`load_one` of element `index` where the storage type is a number."""
    if kind == 0:
        return load_one(BF16, address + 2 * index)
    if kind == 1:
        return load_one(FP16, address + 2 * index)
    return load_one(FP32, address + 4 * index)


@njit
def store_kind(kind, address, first, values):  # type: ignore[no-untyped-def]
    """`store` from element `first` on where the storage type is a number."""
    if kind == 0:
        store(BF16, address + 2 * first, values)
    elif kind == 1:
        store(FP16, address + 2 * first, values)
    else:
        store(FP32, address + 4 * first, values)


@njit
def store_some_kind(kind, address, first, values, bits):  # type: ignore[no-untyped-def]
    """`store_some` from element `first` on where the storage type is a number."""
    if kind == 0:
        store_some(BF16, address + 2 * first, values, bits)
    elif kind == 1:
        store_some(FP16, address + 2 * first, values, bits)
    else:
        store_some(FP32, address + 4 * first, values, bits)


def read(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
    """32 elements from `first` on, 0 where a bit is clear; storage MIXED looks at the number `kind`."""


def write(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
    """Write the elements whose bit is set; storage MIXED looks at the number `kind`."""


@overload(read, inline="always")
def _read(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
    if storage == types.uint8:

        def mixed(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
            if bits == WHOLE:
                return load_kind(kind, address, first)
            return load_some_kind(kind, address, first, bits)

        return mixed

    def fixed(storage, kind, address, first, bits):  # type: ignore[no-untyped-def]
        if bits == WHOLE:
            return load(storage, address + width(storage) * first)
        return load_some(storage, address + width(storage) * first, bits)

    return fixed


@overload(write, inline="always")
def _write(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
    if storage == types.uint8:

        def mixed(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
            if bits == WHOLE:
                store_kind(kind, address, first, values)
            else:
                store_some_kind(kind, address, first, values, bits)

        return mixed

    def fixed(storage, kind, address, first, values, bits):  # type: ignore[no-untyped-def]
        if bits == WHOLE:
            store(storage, address + width(storage) * first, values)
        else:
            store_some(storage, address + width(storage) * first, values, bits)

    return fixed
