"""Mask words and single elements: the scalar side of the vector kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .emit import I1, I32, INT_LANES, LANES, MASK_LANES, WIDTH, Emitted, constant, intrinsic
from .vector import INTS


@intrinsic
def bits_of(typing: Any, value: types.Type) -> Emitted:
    """The bit pattern of an fp32 value."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], I32)


@intrinsic
def popcount(typing: Any, word: types.Type) -> Emitted:
    """The number of set bits of a mask word."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), emit


@intrinsic
def lowest_bit(typing: Any, word: types.Type) -> Emitted:
    """The index of the lowest set bit of a non-zero mask word."""
    return types.uint32(types.uint32), lambda context, builder, sig, args: builder.cttz(args[0], ir.Constant(I1, 1))


@intrinsic
def count_common(typing: Any, left: types.Type, right: types.Type, total: types.Type) -> Emitted:
    """total + the bits that 32 mask words at one address share with 32 at another, word by word."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        words = [builder.load(builder.inttoptr(arg, INT_LANES.as_pointer()), align=4) for arg in args[:2]]
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(INT_LANES, [INT_LANES]), f"llvm.ctpop.v{LANES}i32"
        )
        return builder.add(args[2], builder.call(count, [builder.and_(*words)]))

    return INTS(types.int64, types.int64, INTS), emit


@intrinsic
def read_word(typing: Any, address: types.Type) -> Emitted:
    """The mask word at an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], I32.as_pointer()), align=4)

    return types.uint32(types.int64), emit


@intrinsic
def occupied(typing: Any, address: types.Type) -> Emitted:
    """Which of the 32 mask words at an address are not 0: bit i for word i."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        words = builder.load(builder.inttoptr(args[0], INT_LANES.as_pointer()), align=4)
        return builder.bitcast(builder.icmp_signed("!=", words, constant(0, INT_LANES)), I32)

    return types.uint32(types.int64), emit


@intrinsic
def write_word(typing: Any, address: types.Type, word: types.Type) -> Emitted:
    """Write a mask word to an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], I32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), emit


@intrinsic
def move(typing: Any, storage: types.Type, source: types.Type, target: types.Type) -> Emitted:
    """Copy the bits of one element."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw, align = ir.IntType(8 * WIDTH[storage]).as_pointer(), WIDTH[storage]
        value = builder.load(builder.inttoptr(args[1], raw), align=align)
        builder.store(value, builder.inttoptr(args[2], raw), align=align)
        return context.get_dummy_value()

    return types.void(storage, types.int64, types.int64), emit


@intrinsic
def clear(typing: Any, storage: types.Type, address: types.Type, bits: types.Type) -> Emitted:
    """Set to +0 those of 32 elements whose bit is set; the others keep their bits."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory, align = ir.VectorType(ir.IntType(8 * WIDTH[storage]), LANES), WIDTH[storage]
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        kept = builder.select(
            builder.bitcast(args[2], MASK_LANES), ir.Constant(memory, None), builder.load(pointer, align=align)
        )
        builder.store(kept, pointer, align=align)
        return context.get_dummy_value()

    return types.void(storage, types.int64, types.uint32), emit


@intrinsic
def clear_one(typing: Any, storage: types.Type, address: types.Type) -> Emitted:
    """Set one element to +0."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        raw = ir.IntType(8 * WIDTH[storage])
        builder.store(ir.Constant(raw, 0), builder.inttoptr(args[1], raw.as_pointer()), align=WIDTH[storage])
        return context.get_dummy_value()

    return types.void(storage, types.int64), emit


@intrinsic
def fetch(typing: Any, address: types.Type) -> Emitted:
    """Ask for the cache line at an address, to be written soon."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], pointer), *(ir.Constant(I32, n) for n in (1, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def compress(typing: Any, storage: types.Type, source: types.Type, target: types.Type, bits: types.Type) -> Emitted:
    """Copy those of 32 elements whose bit is set to consecutive places; memory behind a clear bit is not read."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory, name = _raw(storage)
        chosen, align = builder.bitcast(args[3], MASK_LANES), ir.Constant(I32, WIDTH[storage])
        pointer = builder.inttoptr(args[1], memory.as_pointer())
        load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(memory, [memory.as_pointer(), I32, MASK_LANES, memory]),
            f"llvm.masked.load.{name}.p0",
        )
        values = builder.call(load, [pointer, align, chosen, ir.Constant(memory, None)])
        single = memory.element.as_pointer()
        store = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [memory, single, MASK_LANES]),
            f"llvm.masked.compressstore.{name}",
        )
        builder.call(store, [values, builder.inttoptr(args[2], single), chosen])
        return context.get_dummy_value()

    return types.void(storage, types.int64, types.int64, types.uint32), emit


@intrinsic
def expand(typing: Any, storage: types.Type, source: types.Type, target: types.Type, bits: types.Type) -> Emitted:
    """Copy consecutive elements to those of 32 places whose bit is set; the other places keep their bits."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        memory, name = _raw(storage)
        chosen, single = builder.bitcast(args[3], MASK_LANES), memory.element.as_pointer()
        load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(memory, [single, MASK_LANES, memory]),
            f"llvm.masked.expandload.{name}",
        )
        values = builder.call(load, [builder.inttoptr(args[1], single), chosen, ir.Constant(memory, None)])
        store = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [memory, memory.as_pointer(), I32, MASK_LANES]),
            f"llvm.masked.store.{name}.p0",
        )
        pointer = builder.inttoptr(args[2], memory.as_pointer())
        builder.call(store, [values, pointer, ir.Constant(I32, WIDTH[storage]), chosen])
        return context.get_dummy_value()

    return types.void(storage, types.int64, types.int64, types.uint32), emit


def _raw(storage: types.Type) -> tuple[ir.VectorType, str]:
    """32 elements as integers of their width, and LLVM's name for that."""
    bits = 8 * WIDTH[storage]
    return ir.VectorType(ir.IntType(bits), LANES), f"v{LANES}i{bits}"
