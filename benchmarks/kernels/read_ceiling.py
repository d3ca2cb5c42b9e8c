"""The rate at which this machine's threads read memory: the ceiling of every kernel that only reads.

Each thread reads STREAMS runs of a block side by side, one vector register at a time: a single stream leaves a third of
the bandwidth unused where the processor's prefetcher stops at 4 KiB pages, and would make the kernels look better than
they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cpift_kernels.cpu.compiled import in_threads, kernel
from cpift_kernels.cpu.emit import I32, Emitted, intrinsic
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

STREAMS = 8
BLOCK = 1 << 22  # bytes of one call
LINE = 64  # bytes of one load


def read_all(tensors: list[Tensor]) -> int:
    """Read every tensor (all but a last few lines), on torch.get_num_threads() threads; the OR of all words."""
    blocks = [
        (tensor.data_ptr() + start, min(BLOCK, _nbytes(tensor) - start) // (LINE * STREAMS))
        for tensor in tensors
        for start in range(0, _nbytes(tensor), BLOCK)
    ]
    return int(np.bitwise_or.reduce([0, *in_threads(lambda block: _read(*block), blocks)]))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@kernel
def _read(address, lines):  # type: ignore[no-untyped-def]  # compiled by numba, by what it is called with
    """The OR of STREAMS runs of `lines` lines each, one after another in memory."""
    return _read_streams(address, lines)


@intrinsic
def _read_streams(typing: Any, address: types.Type, lines: types.Type) -> Emitted:
    def emit(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        i64, vector = ir.IntType(64), ir.VectorType(I32, LINE // 4)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(STREAMS)]
        run = builder.mul(args[1], ir.Constant(i64, LINE))
        with cgutils.for_range(builder, args[1]) as loop:
            here = builder.add(args[0], builder.mul(loop.index, ir.Constant(i64, LINE)))
            for stream, total in enumerate(totals):
                place = builder.add(here, builder.mul(run, ir.Constant(i64, stream)))
                line = builder.load(builder.inttoptr(place, vector.as_pointer()), align=4)
                builder.store(builder.or_(builder.load(total), line), total)
        joined = builder.load(totals[0])
        for total in totals[1:]:
            joined = builder.or_(joined, builder.load(total))
        signature, name = ir.FunctionType(I32, [vector]), f"llvm.vector.reduce.or.v{LINE // 4}i32"
        return builder.sext(
            builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [joined]), i64
        )

    return types.int64(types.int64, types.int64), emit
