"""How far a model has moved, on the GPU: a program a block, one launch for whole blocks and one for the rest."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..magnitudes import BLOCK, Magnitudes
from .common import elements, launch_blocks, read, within

THREADS = 256


@triton.jit
def magnitudes_kernel(
    origin, tuned, largest, changed, sums, numel, base,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """largest [blocks] fp32 bits and changed [blocks] int32; sums [blocks, 3] fp64: |Δ|, Δ², θ0²."""
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    block = first // BLOCK
    inside = within(numel - first, BLOCK, TAIL)
    x0 = read(origin, first, inside, BLOCK)
    moved = tl.abs(read(tuned, first, inside, BLOCK) - x0)
    key = moved.to(tl.int32, bitcast=True)  # orders as the magnitudes do, a NaN above all
    tl.store(largest + block, tl.max(tl.max(key, 1), 0))
    tl.store(changed + block, tl.sum(tl.sum((key > 0).to(tl.int32), 1), 0))
    wide, weight = moved.to(tl.float64), x0.to(tl.float64)
    tl.store(sums + 3 * block, tl.sum(tl.sum(wide, 1), 0))
    tl.store(sums + 3 * block + 1, tl.sum(tl.sum(wide * wide, 1), 0))
    tl.store(sums + 3 * block + 2, tl.sum(tl.sum(weight * weight, 1), 0))


def delta_magnitudes(pretrained: Tensor, tuned: Tensor) -> Magnitudes:
    """`cpift_kernels.delta_magnitudes` on CUDA or ROCm tensors."""
    numel, device = pretrained.numel(), pretrained.device
    blocks = triton.cdiv(numel, BLOCK)
    largest, changed = torch.empty(2, blocks, dtype=torch.int32, device=device)
    sums = torch.empty(blocks, 3, dtype=torch.float64, device=device)
    launch_blocks(
        magnitudes_kernel, numel, BLOCK, device, elements(pretrained), elements(tuned), largest, changed, sums, numel,
        BLOCK=BLOCK, threads=THREADS,
    )  # fmt: skip
    l1, squares, origin_squares = sums.cpu().T.contiguous()
    return Magnitudes(largest.cpu().view(torch.float32), changed.cpu().long(), l1, squares, origin_squares)
