"""Freezing on the GPU: zero, save and restore masked elements.

Only the 128-bit groups of `values` that hold a masked element are touched. A saved element's place is its rank in the
mask: the bits before its block (`mask_starts`), before its byte (a scan) and below it in its byte.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..freeze import saved_mismatch
from .common import bit_masks, bytes_within, elements, launch_blocks, mask_bytes, popcount, tile, within

BLOCK = 2048
THREADS = 256


@triton.jit
def count_kernel(mask, counts, numel, base, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """counts [blocks]: set bits of every block of the mask bytes."""
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    there = bytes_within(numel - first, BLOCK, TAIL)
    byte = tl.load(mask + first // 8 + tl.arange(0, BLOCK // 8), mask=there, other=0)
    tl.store(counts + first // BLOCK, tl.sum(popcount(byte.to(tl.uint32)), 0))


@triton.jit
def zero_kernel(values, mask, numel, base, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Zero the masked elements of one block."""
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    there = bytes_within(numel - first, BLOCK, TAIL)
    byte = tl.load(mask + first // 8 + tl.arange(0, BLOCK // 8), mask=there, other=0).to(tl.int32)[:, None]
    # One condition for all eight elements of a byte keeps the accesses 128 bits wide.
    touched = (byte != 0) & within(numel - first, BLOCK, TAIL)
    old = tl.load(values + first + tile(BLOCK), mask=touched, other=0)
    member = (byte & bit_masks(True)) != 0
    tl.store(values + first + tile(BLOCK), tl.where(member, tl.zeros_like(old), old), mask=touched)


@triton.jit
def move_kernel(
    values, mask, starts, saved, numel, base,
    RESTORE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Copy the masked elements of one block to their places in `saved`, or back from there."""
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    there = bytes_within(numel - first, BLOCK, TAIL)
    byte = tl.load(mask + first // 8 + tl.arange(0, BLOCK // 8), mask=there, other=0).to(tl.int32)
    bits = popcount(byte.to(tl.uint32))
    before = tl.load(starts + first // BLOCK) + (tl.cumsum(bits, 0) - bits)
    below = popcount((byte[:, None] & (bit_masks(True) - 1)).to(tl.uint32))
    place = saved + before[:, None] + below
    member = (byte[:, None] & bit_masks(True)) != 0
    touched = (byte[:, None] != 0) & within(numel - first, BLOCK, TAIL)
    old = tl.load(values + first + tile(BLOCK), mask=touched, other=0)
    if RESTORE:
        kept = tl.load(place, mask=member, other=0)
        tl.store(values + first + tile(BLOCK), tl.where(member, kept, old), mask=touched)
    else:
        tl.store(place, old, mask=member)


def zero_masked_(values: Tensor, words: Tensor) -> None:
    """`cpift_kernels.zero_masked_` on CUDA or ROCm tensors, in one launch."""
    numel = values.numel()
    launch_blocks(
        zero_kernel, numel, BLOCK, values.device, elements(values), mask_bytes(words), numel,
        BLOCK=BLOCK, threads=THREADS,
    )  # fmt: skip


def gather_masked(values: Tensor, words: Tensor) -> Tensor:
    """`cpift_kernels.gather_masked` on CUDA or ROCm tensors."""
    starts = mask_starts(words, values.numel())
    saved = torch.empty(int(starts[-1]), dtype=values.dtype, device=values.device)
    _move(values, words, starts, saved, restore=False)
    return saved


def scatter_masked_(values: Tensor, words: Tensor, saved: Tensor, *, starts: Tensor | None = None) -> None:
    """`cpift_kernels.scatter_masked_` on CUDA or ROCm tensors."""
    if starts is None:
        starts = mask_starts(words, values.numel())
        if saved.numel() != int(starts[-1]):
            raise saved_mismatch(saved.numel(), int(starts[-1]))
    _move(values, words, starts, saved, restore=True)


def mask_starts(words: Tensor, numel: int) -> Tensor:
    """`cpift_kernels.mask_starts` on CUDA or ROCm tensors."""
    return torch.nn.functional.pad(block_counts(words, numel).cumsum(0), (1, 0))


def block_counts(words: Tensor, numel: int) -> Tensor:
    """The set bits of every block of a mask: int32 [blocks], without a wait."""
    counts = torch.empty(triton.cdiv(numel, BLOCK), dtype=torch.int32, device=words.device)
    launch_blocks(
        count_kernel, numel, BLOCK, words.device, mask_bytes(words), counts, numel, BLOCK=BLOCK, threads=THREADS
    )
    return counts


def _move(values: Tensor, words: Tensor, starts: Tensor, saved: Tensor, *, restore: bool) -> None:
    numel = values.numel()
    launch_blocks(
        move_kernel, numel, BLOCK, values.device,
        elements(values), mask_bytes(words), starts, elements(saved), numel,
        RESTORE=restore, BLOCK=BLOCK, threads=THREADS,
    )  # fmt: skip
