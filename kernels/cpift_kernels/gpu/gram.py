"""Masked Gram matrix on the GPU: fp32 products summed inside a thread, fp64 across threads, blocks in fixed order.

Up to GROUP vectors are read once. More do not fit the registers: `plan` cuts them into launches, each of which reads
its vectors again.
"""
# ruff: noqa: RUF005 (Triton does not unpack tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import bit_masks, elements, launch_rows, mask_bytes, member_bits, read, row_block, within

BLOCK = 1024
TILES = 8  # blocks a program adds up before it writes: 64 fp32 products a thread
GROUP = 8  # vectors whose products with one another one launch takes
ACROSS = 4  # further vectors that one launch multiplies a group with


@triton.jit
def gram_kernel(
    reference, left, right, excluded, partial, width, base, chunks,
    L: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    ALIGNED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Inner products of one run of TILES blocks of one row.

    Without `right` (R = 0): the lower triangle, row by row, of the Gram matrix of (r, left − r). With it: the L x R
    products of left − r with right − r. partial [programs, P]: fp64.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    column = program % chunks * (BLOCK * TILES) + base
    select = bit_masks(ALIGNED)
    sums = (tl.zeros((BLOCK // 8,), tl.float32),) * P
    for t in range(TILES):
        start = column + t * BLOCK
        first = row * width + start
        inside = within(width - start, BLOCK, TAIL)
        kept = inside
        if excluded is not None:
            kept = inside & ((member_bits(excluded, first, width - start, BLOCK, ALIGNED, TAIL) & select) == 0)
        r = read(reference, first, inside, BLOCK)
        rows = ()
        added = ()
        if R == 0:
            rows = (tl.where(kept, r, 0.0),)
            added = (sums[0] + tl.sum(rows[0] * rows[0], 1),)
        for i in tl.static_range(L):
            d = tl.where(kept, read(left[i], first, inside, BLOCK) - r, 0.0)
            rows = rows + (d,)
            if R == 0:
                for a in tl.static_range(i + 2):
                    added = added + (sums[(i + 1) * (i + 2) // 2 + a] + tl.sum(rows[a] * d, 1),)
        for j in tl.static_range(R):
            d = tl.where(kept, read(right[j], first, inside, BLOCK) - r, 0.0)
            for a in tl.static_range(L):
                added = added + (sums[j * L + a] + tl.sum(rows[a] * d, 1),)
        sums = added
    slot = program + base // (BLOCK * TILES)
    for p in tl.static_range(P):
        tl.store(partial + slot * P + p, tl.sum(sums[p].to(tl.float64), 0))


def masked_gram(
    reference: Tensor,
    vectors: Sequence[Tensor],
    excluded: Tensor | None,
    *,
    granularity: Literal["tensor", "row"] = "tensor",
) -> Tensor:
    """`cpift_kernels.masked_gram` on CUDA or ROCm tensors."""
    rows = reference.shape[0] if granularity == "row" and reference.dim() >= 2 else 1
    size = len(vectors) + 1
    gram = torch.zeros(rows, size, size, dtype=torch.float64)
    if reference.numel() == 0:
        return gram
    for left, right in plan(size - 1):
        values = _run(reference, vectors, left, right, excluded, rows)
        if right is None:
            index = torch.tensor([0, *(i + 1 for i in left)])
            a, b = torch.tril_indices(len(index), len(index))
            a, b = index[a], index[b]
        else:
            b, a = (x.flatten() + 1 for x in torch.meshgrid(torch.tensor(right), torch.tensor(left), indexing="ij"))
        gram[:, a, b] = gram[:, b, a] = values
    return gram


def plan(vectors: int) -> list[tuple[range, range | None]]:
    """The launches over so many vectors: a group with itself and the reference, or with vectors of a later group."""
    groups = [range(start, min(start + GROUP, vectors)) for start in range(0, vectors, GROUP)]
    launches: list[tuple[range, range | None]] = [(group, None) for group in groups]
    for g, left in enumerate(groups):
        for other in groups[g + 1 :]:
            launches += [(left, other[i : i + ACROSS]) for i in range(0, len(other), ACROSS)]
    return launches


def _run(
    reference: Tensor,
    vectors: Sequence[Tensor],
    left: range,
    right: range | None,
    excluded: Tensor | None,
    rows: int,
) -> Tensor:
    """fp64 [rows, P] on the CPU: the products of one launch, its programs' partial sums added in order."""
    width, device = reference.numel() // rows, reference.device
    block = row_block(rows, width, BLOCK)
    tiles = TILES if rows == 1 else min(TILES, triton.cdiv(width, block))
    pairs = len(left) * len(right) if right else (len(left) + 1) * (len(left) + 2) // 2
    chunks = triton.cdiv(width, block * tiles)
    partial = torch.empty(rows * chunks, pairs, dtype=torch.float64, device=device)
    groups = (tuple(elements(vectors[i]) for i in group) for group in (left, right or ()))
    launch_rows(
        gram_kernel, rows, width, block * tiles, device, elements(reference), *groups,
        None if excluded is None else mask_bytes(excluded), partial, width,
        L=len(left), R=len(right or ()), P=pairs, BLOCK=block, TILES=tiles, threads=max(block // 8, 64),
    )  # fmt: skip
    return partial.view(rows, chunks, pairs).sum(1).cpu()
