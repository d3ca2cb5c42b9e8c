"""The inner loop of selection, unrolled over the tasks: one read of the base serves all of them.

Side by side the models are so many streams that memory keeps up, which it does not when they are read one pair after
another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .bracket import LARGEST
from .compiled import inner
from .emit import (
    BF16,
    FP16,
    FP32,
    I32,
    INT_LANES,
    LANES,
    broadcast,
    constant,
    intrinsic_of_literals,
    load_at,
    load_register,
    magnitude_key,
    prefetch,
)
from .storage import load_kind, load_some_kind
from .vector import above, larger, magnitude_bits, zeros
from .words import popcount, write_word

GROUPS = (4, 2, 1)  # tasks that one call takes; a kernel holds the loop for each


@intrinsic_of_literals
def mark_words(
    typing: Any,
    storage: types.Type,
    count: types.Type,
    sources: types.Type,
    masks: types.Type,
    inside: types.Type,
    cuts: types.Type,
    words: types.Type,
    marked: types.Type,
) -> Any:
    """Mark whole words of `count` tasks.

    sources: address of the addresses of base and tasks; masks, inside: of the addresses where the words of each task
    go: |Δ| > high, and low < |Δ| ≤ high; cuts: of (high, low) as int32 bits, task by task; marked: of one int64 a task,
    to which the elements above high are added. Returns whether every |Δ| is finite.
    """
    if not isinstance(count, types.IntegerLiteral):
        return None
    number = count.literal_value

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _, _, sources, masks, inside, cuts, words, marked = args
        i64 = ir.IntType(64)
        base, *tuned = (load_at(builder, sources, m, i64) for m in range(number + 1))
        mask, between = ([load_at(builder, table, m, i64) for m in range(number)] for table in (masks, inside))
        cut = [broadcast(builder, load_at(builder, cuts, m, I32), INT_LANES) for m in range(2 * number)]
        totals = [cgutils.alloca_once_value(builder, ir.Constant(i64, 0)) for _ in range(number)]
        peak = cgutils.alloca_once_value(builder, constant(0, INT_LANES))
        count_bits = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, [I32]), "llvm.ctpop.i32")
        with cgutils.for_range(builder, words) as loop:
            first = builder.mul(loop.index, ir.Constant(i64, LANES))
            for source in (base, *tuned):
                prefetch(builder, storage, source, first)
            origin = load_register(builder, storage, base, first, LANES)
            highest = builder.load(peak)
            for m in range(number):
                key = magnitude_key(builder, load_register(builder, storage, tuned[m], first, LANES), origin)
                highest = builder.select(builder.icmp_signed(">", key, highest), key, highest)
                high, low = (builder.bitcast(builder.icmp_signed(">", key, c), I32) for c in cut[2 * m : 2 * m + 2])
                _store_word(builder, mask[m], loop.index, high)
                _store_word(builder, between[m], loop.index, builder.xor(low, high))
                found = builder.zext(builder.call(count_bits, [high]), i64)
                builder.store(builder.add(builder.load(totals[m]), found), totals[m])
            builder.store(highest, peak)
        for m in range(number):
            place = builder.gep(builder.inttoptr(marked, i64.as_pointer()), [ir.Constant(i64, m)])
            builder.store(builder.add(builder.load(place), builder.load(totals[m])), place)
        beyond = builder.icmp_signed(">", builder.load(peak), constant(LARGEST, INT_LANES))
        return builder.icmp_unsigned("==", builder.bitcast(beyond, I32), ir.Constant(I32, 0))

    arguments = (types.int64,) * 6
    return types.boolean(storage, count, *arguments), emit


def _store_word(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, word: ir.Value) -> None:
    builder.store(word, builder.gep(builder.inttoptr(address, I32.as_pointer()), [index]))


def _mark_group(number: int) -> Callable[..., Any]:
    """`mark_words` for `number` tasks, the storage type being a number."""

    @inner
    def mark(kind, sources, masks, inside, cuts, words, marked):  # type: ignore[no-untyped-def]
        if kind == 0:
            return mark_words(BF16, number, sources, masks, inside, cuts, words, marked)
        if kind == 1:
            return mark_words(FP16, number, sources, masks, inside, cuts, words, marked)
        return mark_words(FP32, number, sources, masks, inside, cuts, words, marked)

    return mark


mark_four, mark_two, mark_one = (_mark_group(number) for number in GROUPS)


@inner
def mark_some(kind, x, kind0, x0, first, stop, words, inside, high, low):  # type: ignore[no-untyped-def]
    """`mark_words` for one task, any two storage types, up to element `stop`: the last word need not be whole.

    Returns the elements above high and, as a word, whether some |Δ| is not finite.
    """
    marked, peak = 0, zeros()
    for word in range(first, (stop + LANES - 1) // LANES):
        element = word * LANES
        if stop - element >= LANES:
            key = magnitude_bits(load_kind(kind, x, element), load_kind(kind0, x0, element))
        else:
            bits = np.uint32((1 << (stop - element)) - 1)
            key = magnitude_bits(load_some_kind(kind, x, element, bits), load_some_kind(kind0, x0, element, bits))
        selected = above(key, high)
        peak = larger(key, peak)
        write_word(words + 4 * word, selected)
        write_word(inside + 4 * (word - first), above(key, low) ^ selected)
        marked += popcount(selected)
    return marked, above(peak, LARGEST)
