"""The inner loop of fused apply, unrolled over the sources."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .emit import (
    FLOAT_LANES,
    LANES,
    MASK_LANES,
    broadcast,
    intrinsic_of_literals,
    load_at,
    load_register,
    store_register,
)

MOST = 9  # sources for which the loop is unrolled; each number of sources takes about a second to compile


@intrinsic_of_literals
def fuse_words(
    typing: Any,
    storage: types.Type,
    count: types.Type,
    sources: types.Type,
    masks: types.Type,
    scale: types.Type,
    out: types.Type,
    words: types.Type,
) -> Any:
    """Fuse whole words: sources, masks: addresses of `count` addresses, scale: of as many fp32.

    Returns a word that is not 0 if some element has several donors; such elements hold the last donor's value.
    """
    if not isinstance(count, types.IntegerLiteral):
        return None
    number = count.literal_value

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        _, _, sources, masks, scale, out, words = args
        i64, i32 = ir.IntType(64), ir.IntType(32)
        source = [load_at(builder, sources, m, i64) for m in range(number)]
        mask = [load_at(builder, masks, m, i64) for m in range(number)]
        factor = [broadcast(builder, load_at(builder, scale, m, ir.FloatType()), FLOAT_LANES) for m in range(number)]
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOAT_LANES, [FLOAT_LANES] * 3), f"llvm.fma.v{LANES}f32"
        )
        shared = cgutils.alloca_once_value(builder, ir.Constant(i32, 0))
        with cgutils.for_range(builder, words) as loop:
            first = builder.mul(loop.index, ir.Constant(i64, LANES))
            total = core = ir.Constant(FLOAT_LANES, None)
            once, twice = ir.Constant(i32, 0), builder.load(shared)
            for m in range(number):
                values = load_register(builder, storage, source[m], first, LANES)
                total = builder.call(fma, [values, factor[m], total])
                held = load_at(builder, mask[m], loop.index, i32)
                core = builder.select(_lanes(builder, held), values, core)
                twice = builder.or_(twice, builder.and_(once, held))
                once = builder.or_(once, held)
            builder.store(twice, shared)
            store_register(builder, storage, out, first, builder.select(_lanes(builder, once), core, total))
        return builder.load(shared)

    return types.uint32(storage, count, types.int64, types.int64, types.int64, types.int64, types.int64), emit


def _lanes(builder: ir.IRBuilder, word: ir.Value) -> ir.Value:
    return builder.bitcast(word, MASK_LANES)
