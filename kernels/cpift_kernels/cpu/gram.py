"""Masked Gram matrix on the CPU: one pass, the running sums of all products in registers.

A running sum (`gram`) is a lane of a register. Where a register holds fewer than there are, a block is walked again for
the next ones, from the cache. Threads take spans of a power of two of blocks, which therefore are added before others.
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

from ..gram import BLOCK, FEW, SUMS, Granularity, add_neighbours, matrices, row_count
from .compiled import cpu_features, in_threads, inner, kernel
from .emit import BF16, FP16, FP32, I32, LANES, intrinsic_of_literals, load_at, load_register, prefetch
from .segments import storage_kind
from .storage import MIXED, WHOLE, read
from .vector import store
from .words import popcount, read_word

SPAN = 1 << 18  # elements of one row that one call sums, BLOCK times a power of two


def masked_gram(
    reference: Tensor, vectors: Sequence[Tensor], excluded: Tensor | None, *, granularity: Granularity = "tensor"
) -> Tensor:
    """See `cpift_kernels.masked_gram`."""
    rows = row_count(reference, granularity)
    width = reference.numel() // rows if rows else 0
    models = [reference, *vectors]
    size = len(models)
    kinds = np.array([storage_kind(model) for model in models], np.int64)
    storage = int(kinds[0]) if (kinds == kinds[0]).all() else 2
    addresses = np.array([model.data_ptr() for model in models], np.int64)
    words = 0 if excluded is None else excluded.data_ptr()
    step, parts = max(1, SPAN // max(width, 1)), -(-width // SPAN)
    sums = np.zeros((rows, max(parts, 1), size * (size + 1) // 2))
    sum_rows = _sum_rows(size, storage)

    def span(first: int, part: int) -> None:
        last, start = min(first + step, rows), part * SPAN
        sum_rows(addresses, kinds, words, first, last, width, start, min(start + SPAN, width), sums[:, part])

    in_threads(lambda s: span(*s), [(row, part) for row in range(0, rows, step) for part in range(parts)])
    return matrices(add_neighbours(torch.from_numpy(sums)), size)


@cache
def _sum_rows(size: int, storage: int) -> Callable[..., Any]:
    """The kernel for `size` vectors that are stored as `storage` (2, fp32, also takes mixed ones)."""
    marker = (BF16, FP16, FP32)[storage]
    element = 4 if storage == 2 else 2
    products = size * (size + 1) // 2

    def sum_rows(addresses, kinds, words, first, last, width, start, stop, out):  # type: ignore[no-untyped-def]
        """Elements start..stop-1 of rows first..last-1: their products to out [rows, P]."""
        table, ends = np.empty(size, np.int64), np.empty(size, np.int64)
        kept = np.empty(BLOCK // LANES, np.uint32)
        scratch = np.empty((size, BLOCK), np.float32)
        end = np.empty((size, LANES), np.float32)
        sums = np.empty((SUMS, products))
        blocks = np.empty((SPAN // BLOCK, products))
        for v in range(size):
            ends[v] = end[v].ctypes.data
        for row in range(first, last):
            count = 0
            for begin in range(row * width + start, row * width + stop, BLOCK):
                elements = min(BLOCK, row * width + stop - begin)
                if _kept_words(words, begin, elements, kept) <= FEW:
                    _sum_few(addresses, kinds, kept, begin, elements, scratch, sums)
                    _add_neighbours(sums, SUMS)
                    blocks[count] = sums[0]
                else:
                    whole = elements // LANES
                    bits = np.uint32((1 << (elements - whole * LANES)) - 1)
                    for v in range(size):
                        table[v] = addresses[v] + begin * element
                        if kinds[v] != storage:
                            table[v] = scratch[v].ctypes.data
                            _widen(kinds[v], addresses[v], begin, whole, table[v])
                        if bits != 0:
                            store(marker, ends[v], read(MIXED, kinds[v], addresses[v], begin + whole * LANES, bits))
                    _sum_words(
                        marker, size, table.ctypes.data, ends.ctypes.data, kept.ctypes.data,
                        whole, whole + np.int64(bits != 0), blocks[count].ctypes.data,
                    )  # fmt: skip
                count += 1
            _add_neighbours(blocks, count)
            out[row] = blocks[0]

    sum_rows.__qualname__ = f"sum_rows_{size}_{storage}"
    return kernel(sum_rows)


@inner
def _add_neighbours(blocks, count):  # type: ignore[no-untyped-def]
    """`gram.add_neighbours` of the first `count`, in place."""
    while count > 1:
        for i in range(count // 2):
            blocks[i] = blocks[2 * i] + blocks[2 * i + 1]
        if count % 2:
            blocks[count // 2] = blocks[count - 1]
        count = (count + 1) // 2


@inner
def _widen(kind, address, begin, words, target):  # type: ignore[no-untyped-def]
    for word in range(words):
        store(FP32, target + 4 * LANES * word, read(MIXED, kind, address, begin + word * LANES, np.uint32(WHOLE)))


@inner
def _kept_words(words, begin, elements, kept):  # type: ignore[no-untyped-def]
    """The complement of the mask from bit `begin` on, which need not start a word; returns its bits set."""
    shift, end, total = begin % LANES, begin + elements, np.int64(0)
    for i in range((elements + LANES - 1) // LANES):
        excluded, left = np.uint32(0), elements - i * LANES
        if words != 0:
            address, first = words + (begin // LANES + i) * 4, begin + i * LANES
            excluded = np.uint32(read_word(address) >> shift)
            if shift > 0 and first + LANES - shift < end:
                excluded = np.uint32(excluded | (read_word(address + 4) << (LANES - shift)))
        inside = np.uint32(WHOLE) if left >= LANES else np.uint32((1 << left) - 1)
        kept[i] = ~excluded & inside
        total += popcount(kept[i])
    return total


@inner
def _sum_few(addresses, kinds, kept, begin, elements, scratch, sums):  # type: ignore[no-untyped-def]
    """The running sums [SUMS, P] of a block with few elements left, in fp64."""
    size = len(addresses)
    sums[:] = 0.0
    for i in range((elements + LANES - 1) // LANES):
        word = kept[i]
        if word == 0:
            continue
        for v in range(size):
            store(FP32, scratch[v].ctypes.data, read(MIXED, kinds[v], addresses[v], begin + i * LANES, word))
        for lane in range(LANES):
            if (word >> np.uint32(lane)) & np.uint32(1) == 0:
                continue
            place = 0
            for a in range(size):
                if a > 0:
                    scratch[a, lane] = scratch[a, lane] - scratch[0, lane]
                for b in range(a + 1):
                    sums[lane % SUMS, place] += np.float64(scratch[a, lane]) * np.float64(scratch[b, lane])
                    place += 1


@intrinsic_of_literals
def _sum_words(
    typing: Any,
    storage: types.Type,
    size: types.Type,
    table: types.Type,
    ends: types.Type,
    kept: types.Type,
    whole: types.Type,
    words: types.Type,
    out: types.Type,
) -> Any:
    """Write the products of (r, x1 − r, ...) over one block: fp64 [P], the lower triangle.

    table: addresses of `whole` words' elements; ends: of the elements of one more word, which memory may not have.
    """
    if not isinstance(size, types.IntegerLiteral):
        return None
    n = size.literal_value

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _, _, table, ends, kept, whole, words, out = args
        sources, last = ([load_at(builder, addresses, v, I64) for v in range(n)] for addresses in (table, ends))
        pairs = [(a, b) for a in range(n) for b in range(a + 1)]
        vector = ir.VectorType(ir.FloatType(), _REGISTER)
        fma = _declare(builder, f"llvm.fma.v{_REGISTER}f32", vector, [vector] * 3)
        found: dict[tuple[int, int], list[ir.Value]] = {pair: [] for pair in pairs}

        def add(builder: Any, sources: Any, first: Any, bits: Any, lanes: int, totals: Any) -> None:
            """The products of one word's elements to `totals`, those of the sums from `lanes` on."""
            for part in range(lanes, LANES, SUMS):
                offset = builder.add(first, _i64(part))
                vectors = _differences(builder, storage, sources, offset, _part_mask(builder, bits, part))
                for (a, b), total in totals.items():
                    builder.store(builder.call(fma, [vectors[a], vectors[b], builder.load(total)]), total)

        for lanes in range(0, SUMS, _REGISTER):
            totals = {pair: cgutils.alloca_once(builder, vector) for pair in pairs}
            for total in totals.values():
                builder.store(ir.Constant(vector, None), total)
            with cgutils.for_range(builder, whole) as loop:
                first = builder.mul(loop.index, _i64(LANES))
                for source in sources if not lanes else []:
                    prefetch(builder, storage, source, first)
                add(builder, sources, first, load_at(builder, kept, loop.index, I32), lanes, totals)
            with builder.if_then(builder.icmp_signed(">", words, whole)):
                add(builder, last, _i64(0), load_at(builder, kept, whole, I32), lanes, totals)
            for pair, total in totals.items():
                found[pair].append(builder.load(total))
        for place, pair in enumerate(pairs):
            pointer = builder.gep(builder.inttoptr(out, ir.DoubleType().as_pointer()), [_i64(place)])
            builder.store(_neighbours(builder, found[pair]), pointer)
        return context.get_dummy_value()

    return types.void(storage, size, *[types.int64] * 6), emit


def _register() -> int:
    """fp32 lanes of a vector register."""
    features = cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


_REGISTER = _register()
I64 = ir.IntType(64)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _part_mask(builder: ir.IRBuilder, bits: ir.Value, part: int) -> ir.Value:
    shifted = builder.lshr(bits, ir.Constant(I32, part))
    part_bits = builder.trunc(shifted, ir.IntType(_REGISTER))
    return builder.bitcast(part_bits, ir.VectorType(ir.IntType(1), _REGISTER))


def _differences(
    builder: ir.IRBuilder, storage: types.Type, sources: list[ir.Value], offset: ir.Value, mask: ir.Value
) -> list[ir.Value]:
    """(r, x1 − r, ...) of one register's elements, 0 where the mask is clear."""
    values = [load_register(builder, storage, source, offset, _REGISTER) for source in sources]
    vectors = [values[0], *(builder.fsub(value, values[0]) for value in values[1:])]
    return [builder.select(mask, vector, ir.Constant(vector.type, None)) for vector in vectors]


def _neighbours(builder: ir.IRBuilder, registers: list[ir.Value]) -> ir.Value:
    """`gram.add_neighbours` of the running sums, which lie in registers one after another, in fp64."""
    sums = [builder.fpext(register, ir.VectorType(ir.DoubleType(), _REGISTER)) for register in registers]
    while (count := sums[0].type.count) > 1:
        even, odd = (ir.Constant(ir.VectorType(I32, count // 2), list(range(i, count, 2))) for i in (0, 1))
        sums = [builder.fadd(*(builder.shuffle_vector(x, x, places) for places in (even, odd))) for x in sums]
    scalars = [builder.extract_element(x, ir.Constant(I32, 0)) for x in sums]
    while len(scalars) > 1:
        scalars = [builder.fadd(left, right) for left, right in zip(scalars[0::2], scalars[1::2], strict=True)]
    return scalars[0]
