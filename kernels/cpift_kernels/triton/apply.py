"""Fused apply on the GPU: one read of every source, one write of the fused tensor."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    all_registers,
    bit_masks,
    elements,
    launch_rows,
    mask_bytes,
    member_bits,
    narrow,
    read,
    row_block,
    tile,
    within,
)

THREADS = 256


@triton.jit
def _quotient(total, count):
    """total / count to the nearest fp32, for small whole counts, without the subroutine that `div_rn` calls.

    Such a quotient never lies halfway between two fp32 numbers, so fp64 with a reciprocal good to 2**-52 rounds right.
    """
    divisor = count.to(tl.float64)
    inverse = (1.0 / count).to(tl.float64)
    inverse = inverse * (2.0 - divisor * inverse)
    inverse = inverse * (2.0 - divisor * inverse)
    return (total.to(tl.float64) * inverse).to(tl.float32)


@triton.jit
def apply_kernel(
    out, sources, masks, scales, width, base, chunks, numbers,
    M: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Fuse one block of one row.

    out [rows * width]; sources[M]: elements; masks[M]: mask bytes or None; scales [rows, M]: fp32 coefficients.
    numbers: None; or of one row, which rows of `scales` each UNIT elements have, int32.
    """
    row = tl.program_id(0).to(tl.int64) // chunks
    column = tl.program_id(0).to(tl.int64) % chunks * BLOCK + base
    first = row * width + column
    if numbers is not None:
        row = tl.load(numbers + first // UNIT).to(tl.int64)
    select = bit_masks(ALIGNED)
    inside = within(width - column, BLOCK, TAIL)
    held = tl.zeros_like(select)  # by at least one mask
    contested = tl.zeros_like(select)  # by at least two
    combined = tl.zeros((BLOCK // 8, 8), tl.float32)
    donated = tl.zeros((BLOCK // 8, 8), tl.float32)
    for m in tl.static_range(M):
        x = read(sources[m], first, inside, BLOCK)
        scale = tl.load(scales + row * M + m)
        combined = tl.where(scale == 0.0, combined, tl.fma(x, tl.zeros_like(x) + scale, combined))
        if masks[m] is not None:
            bits = member_bits(masks[m], first, width - column, BLOCK, ALIGNED, TAIL)
            contested = contested | (held & bits)
            held = held | bits
            donated = tl.where((bits & select) != 0, x, donated)
    if tl.max(contested) > 0:
        # Rare unless the conflict policy is `mean`: the sources of this block come from the cache again.
        total, holders = tl.zeros_like(donated), tl.zeros_like(donated)
        for m in tl.static_range(M):
            if masks[m] is not None:
                x = read(sources[m], first, inside, BLOCK)
                member = (member_bits(masks[m], first, width - column, BLOCK, ALIGNED, TAIL) & select) != 0
                total = tl.where(member, total + x, total)
                holders = tl.where(member, holders + 1.0, holders)
        donated = tl.where(holders > 1.0, _quotient(total, holders), donated)
    fused = narrow(tl.where((held & select) != 0, donated, combined), out.dtype.element_ty)
    tl.store(out + first + tile(BLOCK), fused, mask=inside)


def fused_apply(out: Tensor, sources: Sequence[Tensor], coefficients: Tensor, masks: Sequence[Tensor | None]) -> None:
    """`cpift_kernels.fused_apply` on CUDA or ROCm tensors."""
    if out.numel() == 0:
        return
    _launch(out, sources, masks, coefficients.to(out.device, torch.float32), coefficients.shape[0], None, 1)


def apply_by_number(
    out: Tensor, sources: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor, numbers: Tensor, unit: int
) -> None:
    """`fused_apply` where each `unit` elements have a row of `scales`, fp32, by its number in `numbers`, int32."""
    _launch(out, sources, masks, scales, 1, numbers, unit)


def _launch(
    out: Tensor, sources: Sequence[Tensor], masks: Sequence[Tensor | None], scales: Tensor, rows: int,
    numbers: Tensor | None, unit: int,
) -> None:  # fmt: skip
    width = out.numel() // rows
    vector = 16 // min(tensor.element_size() for tensor in (out, *sources))  # elements of a 128-bit access
    block = row_block(rows, width, THREADS * vector)
    launch_rows(
        apply_kernel, rows, width, block, out.device,
        elements(out), tuple(map(elements, sources)), tuple(None if m is None else mask_bytes(m) for m in masks),
        scales, width, numbers=numbers, UNIT=unit,
        M=len(sources), BLOCK=block, threads=max(block // vector, 64), registers=all_registers(out, *sources),
    )  # fmt: skip
