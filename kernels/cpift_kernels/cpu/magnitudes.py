"""How far a model has moved, on the CPU: 32 lanes side by side, sums in fp64.

A lane adds every 32nd element of a block, in order; lanes are added in order. So the sums have one order on every
processor, and the same bits for every number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from ..magnitudes import BLOCK, Magnitudes
from .compiled import in_threads, kernel
from .emit import LANES, Emitted, constant, intrinsic
from .segments import storage_kind
from .storage import MIXED, WHOLE, read
from .vector import FLOATS, Lanes, above, larger, magnitude, magnitude_bits, write_ints, zeros
from .words import popcount

SPAN = 64  # blocks that one call goes through
_WIDE = ir.VectorType(ir.DoubleType(), LANES)
DOUBLES = Lanes("float64", _WIDE)


def delta_magnitudes(pretrained: Tensor, tuned: Tensor) -> Magnitudes:
    """See `cpift_kernels.delta_magnitudes`."""
    numel = pretrained.numel()
    blocks = -(-numel // BLOCK)
    counts, sums = np.zeros((blocks, 2), np.int64), np.zeros((blocks, 3))
    models = [(storage_kind(x), x.data_ptr()) for x in (pretrained, tuned)]

    def span(first: int) -> None:
        _measure(*models[0], *models[1], numel, first, min(first + SPAN, blocks), counts, sums)

    in_threads(span, range(0, blocks, SPAN))
    largest = torch.from_numpy(counts[:, 0].astype(np.int32)).view(torch.float32)
    l1, squares, origin_squares = (torch.from_numpy(column.copy()) for column in sums.T)
    return Magnitudes(largest, torch.from_numpy(counts[:, 1].copy()), l1, squares, origin_squares)


@intrinsic
def doubles(typing: Any) -> Emitted:
    """32 times the fp64 0."""
    return DOUBLES(), lambda context, builder, sig, args: constant(0.0, _WIDE)


@intrinsic
def add_wide(typing: Any, total: types.Type, values: types.Type) -> Emitted:
    """total + values, in fp64."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.fadd(args[0], builder.fpext(args[1], _WIDE))

    return DOUBLES(DOUBLES, FLOATS), emit


@intrinsic
def add_squares(typing: Any, total: types.Type, values: types.Type) -> Emitted:
    """total + values², in fp64, where the square of an fp32 number is exact."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        wide = builder.fpext(args[1], _WIDE)
        return builder.fadd(args[0], builder.fmul(wide, wide))

    return DOUBLES(DOUBLES, FLOATS), emit


@intrinsic
def write_doubles(typing: Any, address: types.Type, values: types.Type) -> Emitted:
    """Write 32 fp64 to an address."""

    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], _WIDE.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, DOUBLES), emit


@kernel
def _measure(kind0, origin, kind, tuned, numel, first, last, counts, sums):  # type: ignore[no-untyped-def]
    """Of the blocks first..last-1: counts [blocks, 2] largest (as bits) and changed; sums [blocks, 3]."""
    peaks, lanes = np.zeros(LANES, np.int32), np.zeros((3, LANES))
    for block in range(first, last):
        end = min((block + 1) * BLOCK, numel)
        peak, changed = zeros(), 0
        l1, squares, origin_squares = doubles(), doubles(), doubles()
        for element in range(block * BLOCK, end, LANES):
            bits = np.uint32(WHOLE) if end - element >= LANES else np.uint32((1 << (end - element)) - 1)
            x0 = read(MIXED, kind0, origin, element, bits)
            x = read(MIXED, kind, tuned, element, bits)
            key, moved = magnitude_bits(x, x0), magnitude(x, x0)
            peak = larger(key, peak)
            changed += popcount(above(key, np.int32(0)))
            l1, squares = add_wide(l1, moved), add_squares(squares, moved)
            origin_squares = add_squares(origin_squares, x0)
        write_ints(peaks.ctypes.data, peak)
        write_doubles(lanes[0].ctypes.data, l1)
        write_doubles(lanes[1].ctypes.data, squares)
        write_doubles(lanes[2].ctypes.data, origin_squares)
        counts[block, 1] = changed
        for lane in range(LANES):
            counts[block, 0] = max(counts[block, 0], peaks[lane])
            for column in range(3):
                sums[block, column] += lanes[column, lane]
