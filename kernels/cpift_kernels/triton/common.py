"""What every Triton kernel of this package shares: bit-level helpers and launch plumbing.

bf16 tensors reach the kernels as int16: widening is then a shift and narrowing a hand-written round to nearest even, so
that the compiled kernel and Triton's interpreter (which truncates fp32 to bf16) agree bit for bit. Packed masks reach
the kernels as bytes: one byte covers the eight elements that one thread holds, so no thread needs a neighbour's bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton 3.10 changes the default: whether a·b + c may contract is part of what these kernels compute.
FUSED = {"enable_fp_fusion": True}


@triton.jit
def widen(x):
    """fp32 value of loaded fp16 or fp32 elements, or of the int16 bits of bf16 ones; exact."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 `x` rounded to nearest even in `dtype` (tl.int16 stands for bf16 bits); a NaN stays a NaN."""
    if dtype == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding would carry a NaN's mantissa into its exponent: keep the top bits and set the quiet one.
        return tl.where(x == x, rounded, (bits >> 16) | 0x40).to(tl.int16)
    return x.to(dtype)


@triton.jit
def tile(BLOCK: tl.constexpr):
    """Offsets [BLOCK // 8, 8] of a block: row b holds the eight elements of mask byte b."""
    return tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def within(left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Which elements of a block exist when `left` remain; the constant True where no bound is needed.

    Triton drops a constant mask, so one load expression serves both launches of `launch_blocks`.
    """
    return (tile(BLOCK) < left) if TAIL else tl.full((BLOCK // 8, 8), True, tl.int1)


@triton.jit
def bytes_within(left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Which mask bytes of a block hold any of the `left` elements that remain."""
    return (tl.arange(0, BLOCK // 8) * 8 < left) if TAIL else tl.full((BLOCK // 8,), True, tl.int1)


@triton.jit
def read(pointer, first, inside, BLOCK: tl.constexpr):
    """The block of `pointer` that starts at element `first`, in fp32; 0 outside."""
    return widen(tl.load(pointer + first + tile(BLOCK), mask=inside, other=0))


@triton.jit
def pack(bits):
    """int32 [B] whose bit j is bits[:, j], from int1 [B, 8]."""
    return tl.sum(tl.where(bits, (1 << tl.arange(0, 8))[None, :], 0), 1)


@triton.jit
def popcount(x):
    """Set bits of each uint32 as int32; LLVM recognises the pattern and emits the hardware's instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def word_bytes_within(left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """`bytes_within` and the padding bytes up to the end of the last word: what a mask's writer writes."""
    return bytes_within((left + 31) // 32 * 32, BLOCK, TAIL)


@triton.jit
def bit_masks(ALIGNED: tl.constexpr):
    """int32 [1, 8]: what selects each column's bit in the rows that `member_bits` loads."""
    if ALIGNED:
        return (1 << tl.arange(0, 8))[None, :]
    return tl.full((1, 8), 1, tl.int32)


@triton.jit
def member_bits(mask, first, left, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, TAIL: tl.constexpr):
    """Membership of the block at element `first`, `left` elements before its row's end; test it with `bit_masks`.

    int32: [BLOCK // 8, 1] mask bytes where blocks start at a byte, else [BLOCK // 8, 8] single bits.
    """
    if ALIGNED:
        byte = tl.load(mask + first // 8 + tl.arange(0, BLOCK // 8), mask=bytes_within(left, BLOCK, TAIL), other=0)
        bits = byte.to(tl.int32)[:, None]
    else:
        position = first + tile(BLOCK)
        byte = tl.load(mask + position // 8, mask=within(left, BLOCK, TAIL), other=0)
        bits = (byte.to(tl.int32) >> (position % 8).to(tl.int32)) & 1
    return bits


def elements(tensor: Tensor) -> Tensor:
    """The flat view that a kernel receives: bf16 as its int16 bits, other dtypes as they are. No copy."""
    flat = tensor.view(-1)
    return flat.view(torch.int16) if tensor.dtype == torch.bfloat16 else flat


def mask_bytes(words: Tensor) -> Tensor:
    """Packed int32 words as uint8: element j is bit j % 8 of byte j // 8. No copy."""
    return words.view(torch.uint8)


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, threads: int, registers: int | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """Run `programs` programs of `threads` threads each on the tensors' device and its current stream.

    registers: the most a thread may hold on NVIDIA, see `all_registers`.
    """
    if programs == 0:
        return
    current: AbstractContextManager[object] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    warp = 64 if torch.version.hip else 32
    if registers and not torch.version.hip:
        options["maxnreg"] = registers
    with current:
        kernel[(programs,)](*args, **options, num_warps=threads // warp, **FUSED)


def all_registers(*tensors: Tensor) -> int | None:
    """Every register there is for fp16, where ptxas may stop early and spill; None, its own choice, else."""
    return 255 if any(tensor.dtype == torch.float16 for tensor in tensors) else None


def launch_blocks(kernel: Any, numel: int, block: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Cover `numel` elements: whole blocks without a bounds mask, then one masked program for the rest.

    A bounds mask known only at run time would split every 128-bit access into single elements. The kernel
    takes `base` (the first element of its first program) and TAIL.
    """
    whole = numel // block
    launch(kernel, whole, device, *args, base=0, TAIL=False, **options)
    if numel % block:
        launch(kernel, 1, device, *args, base=whole * block, TAIL=True, **options)


def launch_rows(
    kernel: Any, rows: int, width: int, block: int, device: torch.device, *args: Any, **options: Any
) -> None:
    """Cover `rows` rows of `width` elements, no block crossing a row; one row is covered by `launch_blocks`.

    The kernel also takes `chunks`, the programs a row, and ALIGNED: whether every row starts at a mask byte.
    """
    if rows == 1:
        launch_blocks(kernel, width, block, device, *args, chunks=max(width // block, 1), ALIGNED=True, **options)
        return
    chunks = triton.cdiv(width, block)
    options |= {"ALIGNED": width % 8 == 0, "TAIL": width % block != 0}
    launch(kernel, rows * chunks, device, *args, base=0, chunks=chunks, **options)


def row_block(rows: int, width: int, block: int) -> int:
    """Elements a program reads at a time: `block`, or less where rows are short; a power of two."""
    return block if rows == 1 else min(block, max(256, triton.next_power_of_2(width)))
