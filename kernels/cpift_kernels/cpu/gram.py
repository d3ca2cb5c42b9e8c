"""Masked Gram matrix on the CPU: one pass, all products of a run of elements in registers.

A block of BLOCK elements is summed in fp32, 8 or 16 lanes side by side (so at most BLOCK / 8 additions long), blocks in
fp64. A block with few elements left is summed in fp64 throughout (`gram.FEW`). Blocks, and the spans that threads take,
are cut by position, so the sums have one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from ..gram import FEW, Granularity, row_count
from .compiled import cpu_features, in_threads, inner, kernel
from .emit import BF16, FP16, FP32, LANES, intrinsic_of_literals, load_at, load_register, prefetch
from .segments import storage_kind
from .storage import MIXED, WHOLE, read
from .vector import store
from .words import popcount, read_word

BLOCK = 1 << 12  # elements summed in fp32
SPAN = 1 << 18  # elements of one row that one call sums, a multiple of BLOCK
# Kernels exist for these numbers of vectors; others repeat their last vector. Each takes about a second to compile.
SIZES = (2, 3, 4, 5, 7, 9, 13, 17)


def masked_gram(
    reference: Tensor, vectors: Sequence[Tensor], excluded: Tensor | None, *, granularity: Granularity = "tensor"
) -> Tensor:
    """See `cpift_kernels.masked_gram`."""
    rows = row_count(reference, granularity)
    width = reference.numel() // rows if rows else 0
    models = [reference, *vectors]
    size = next(size for size in SIZES if size >= len(models))
    models += [models[-1]] * (size - len(models))
    kinds = np.array([storage_kind(model) for model in models], np.int64)
    storage = int(kinds[0]) if (kinds == kinds[0]).all() else 2
    addresses = np.array([model.data_ptr() for model in models], np.int64)
    words = 0 if excluded is None else excluded.data_ptr()
    grams = np.zeros((rows, size, size))
    sum_rows = _sum_rows(size, storage)

    def span(first: int, last: int, start: int, stop: int) -> np.ndarray:
        part = np.zeros((last - first, size, size))
        sum_rows(addresses, kinds, words, first, last, width, start, stop, part)
        return part

    spans = _spans(rows, width)
    for (first, last, _, _), part in zip(spans, in_threads(lambda s: span(*s), spans), strict=True):
        grams[first:last] += part
    n = len(vectors) + 1
    return torch.from_numpy(grams[:, :n, :n].copy())


def _spans(rows: int, width: int) -> list[tuple[int, int, int, int]]:
    """(first row, last row, start, stop): several short rows together, or a part of a long one."""
    if width > SPAN:
        return [(r, r + 1, start, min(start + SPAN, width)) for r in range(rows) for start in range(0, width, SPAN)]
    step = SPAN // max(width, 1)
    return [(r, min(r + step, rows), 0, width) for r in range(0, rows, step)]


@cache
def _sum_rows(size: int, storage: int) -> Callable[..., Any]:
    """The kernel for `size` vectors that are stored as `storage` (2, fp32, also takes mixed ones)."""
    marker = (BF16, FP16, FP32)[storage]
    element = 4 if storage == 2 else 2

    def sum_rows(addresses, kinds, words, first, last, width, start, stop, out):  # type: ignore[no-untyped-def]
        """Add the Gram matrices of elements start..stop-1 of rows first..last-1 to out [last - first, size, size]."""
        table = np.empty(size, np.int64)
        kept = np.empty(BLOCK // LANES, np.uint32)
        scratch = np.empty((size, BLOCK), np.float32)
        for row in range(first, last):
            for begin in range(row * width + start, row * width + stop, BLOCK):
                end = min(begin + BLOCK, row * width + stop)
                whole = (end - begin) // LANES
                _kept_words(words, begin, end, kept)
                if _count(kept, end - begin) <= FEW:
                    _sum_few(addresses, kinds, kept, begin, end, scratch, out[row - first])
                    continue
                for v in range(size):
                    table[v] = addresses[v] + begin * element
                    if kinds[v] != storage:
                        table[v] = scratch[v].ctypes.data
                        _widen(kinds[v], addresses[v], begin, whole, table[v])
                sums = out[row - first].ctypes.data
                _sum_words(marker, size, table.ctypes.data, kept.ctypes.data, whole, sums)
                rest = end - begin - whole * LANES
                if rest > 0:
                    bits = np.uint32((1 << rest) - 1)
                    for v in range(size):
                        table[v] = scratch[v].ctypes.data
                        store(marker, table[v], read(MIXED, kinds[v], addresses[v], end - rest, bits))
                    _sum_words(marker, size, table.ctypes.data, kept.ctypes.data + 4 * whole, 1, sums)

    sum_rows.__qualname__ = f"sum_rows_{size}_{storage}"
    return kernel(sum_rows)


@inner
def _widen(kind, address, begin, words, target):  # type: ignore[no-untyped-def]
    for word in range(words):
        store(FP32, target + 4 * LANES * word, read(MIXED, kind, address, begin + word * LANES, np.uint32(WHOLE)))


@inner
def _kept_words(words, begin, end, kept):  # type: ignore[no-untyped-def]
    """The complement of the mask from bit `begin` on, which need not start a word."""
    shift = begin % LANES
    for i in range((end - begin + LANES - 1) // LANES):
        excluded = np.uint32(0)
        if words != 0:
            address, first = words + (begin // LANES + i) * 4, begin + i * LANES
            excluded = np.uint32(read_word(address) >> shift)
            if shift > 0 and first + LANES - shift < end:
                excluded = np.uint32(excluded | (read_word(address + 4) << (LANES - shift)))
        kept[i] = ~excluded


@inner
def _count(kept, elements):  # type: ignore[no-untyped-def]
    """Bits set among the first `elements`; those after them are cleared in the last word."""
    rest = elements % LANES
    if rest > 0:
        kept[elements // LANES] &= np.uint32((1 << rest) - 1)
    total = np.int64(0)
    for i in range((elements + LANES - 1) // LANES):
        total += popcount(kept[i])
    return total


@inner
def _sum_few(addresses, kinds, kept, begin, end, scratch, out):  # type: ignore[no-untyped-def]
    """Add the products of a block with few elements, in fp64."""
    size = len(addresses)
    for i in range((end - begin + LANES - 1) // LANES):
        word = kept[i]
        if word == 0:
            continue
        for v in range(size):
            store(FP32, scratch[v].ctypes.data, read(MIXED, kinds[v], addresses[v], begin + i * LANES, word))
        for lane in range(LANES):
            if (word >> np.uint32(lane)) & np.uint32(1) == 0:
                continue
            for v in range(1, size):
                scratch[v, lane] = scratch[v, lane] - scratch[0, lane]
            for a in range(size):
                for b in range(size):
                    out[a, b] += np.float64(scratch[a, lane]) * np.float64(scratch[b, lane])


@intrinsic_of_literals
def _sum_words(
    typing: Any,
    storage: types.Type,
    size: types.Type,
    table: types.Type,
    kept: types.Type,
    words: types.Type,
    sums: types.Type,
) -> Any:
    """Add the products of (r, x1 − r, ...) over whole words to the fp64 matrix at `sums`."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    n = size.literal_value

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _, _, table, kept, words, sums = args
        sources = [load_at(builder, table, v, ir.IntType(64)) for v in range(n)]
        pairs = [(a, b) for a in range(n) for b in range(a, n)]
        vector = ir.VectorType(ir.FloatType(), _REGISTER)
        totals = {pair: cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for pair in pairs}
        fma = _declare(builder, f"llvm.fma.v{_REGISTER}f32", vector, [vector] * 3)
        with cgutils.for_range(builder, words) as loop:
            bits = load_at(builder, kept, loop.index, ir.IntType(32))
            first = builder.mul(loop.index, _i64(LANES))
            for source in sources:
                prefetch(builder, storage, source, first)
            for part in range(0, LANES, _REGISTER):
                offset = builder.add(first, _i64(part))
                vectors = _differences(builder, storage, sources, offset, _part_mask(builder, bits, part))
                for a, b in pairs:
                    product = builder.call(fma, [vectors[a], vectors[b], builder.load(totals[a, b])])
                    builder.store(product, totals[a, b])
        for a, b in pairs:
            _add_to_sum(builder, builder.load(totals[a, b]), sums, {a * n + b, b * n + a})
        return context.get_dummy_value()

    return types.void(storage, size, types.int64, types.int64, types.int64, types.int64), emit


_REGISTER = 16 if cpu_features().get("avx512f") else 8  # fp32 lanes of a vector register


def _i64(value: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), value)


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _part_mask(builder: ir.IRBuilder, bits: ir.Value, part: int) -> ir.Value:
    shifted = builder.lshr(bits, ir.Constant(ir.IntType(32), part))
    part_bits = builder.trunc(shifted, ir.IntType(_REGISTER))
    return builder.bitcast(part_bits, ir.VectorType(ir.IntType(1), _REGISTER))


def _differences(
    builder: ir.IRBuilder, storage: types.Type, sources: list[ir.Value], offset: ir.Value, mask: ir.Value
) -> list[ir.Value]:
    """(r, x1 − r, ...) of one register's elements, 0 where the mask is clear."""
    values = [load_register(builder, storage, source, offset, _REGISTER) for source in sources]
    vectors = [values[0], *(builder.fsub(value, values[0]) for value in values[1:])]
    return [builder.select(mask, vector, ir.Constant(vector.type, None)) for vector in vectors]


def _add_to_sum(builder: ir.IRBuilder, total: ir.Value, sums: ir.Value, places: set[int]) -> None:
    double = ir.DoubleType()
    wide = ir.VectorType(double, _REGISTER)
    reduce = _declare(builder, f"llvm.vector.reduce.fadd.v{_REGISTER}f64", double, [double, wide])
    total = builder.call(reduce, [ir.Constant(double, 0.0), builder.fpext(total, wide)])
    for place in sorted(places):
        pointer = builder.gep(builder.inttoptr(sums, double.as_pointer()), [_i64(place)])
        builder.store(builder.fadd(builder.load(pointer), total), pointer)
