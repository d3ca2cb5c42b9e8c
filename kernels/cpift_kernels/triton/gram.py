"""Masked Gram matrix on the GPU: the running sums of `gram` in threads, a program several blocks at once.

Up to GROUP vectors are read once. More do not fit the registers: `plan` cuts them into launches, each of which reads
its vectors again.
"""
# ruff: noqa: RUF005 (Triton does not unpack tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gram import BLOCK, FEW, SUMS, add_neighbours, row_count
from . import common
from .common import elements, widen

BLOCKS = 8  # that a program sums, two running sums a thread
GROUP = 8  # vectors whose products with one another one launch takes
ACROSS = 4  # further vectors that one launch multiplies a group with
WORD = 32  # elements of a mask word


@triton.jit
def _read(pointer, at, inside):
    return widen(tl.load(pointer + at, mask=inside, other=0))


@triton.jit
def _add(sums, p, left, right, EXACT: tl.constexpr):
    """(sum p + left·right,): rounded once to fp32, or exact products in fp64."""
    if EXACT:
        return (sums[p] + left.to(tl.float64) * right.to(tl.float64),)
    return (tl.fma(left, right, sums[p]),)


@triton.jit
def _running_sums(
    reference, left, right, excluded, first, column, width, words,
    L: tl.constexpr, R: tl.constexpr, P: tl.constexpr, SUMS: tl.constexpr, UNROLLED: tl.constexpr,
    ALIGNED: tl.constexpr, TAIL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The running sums of every block, and behind them int32 [blocks, SUMS]: how many elements they are of.

    UNROLLED: mask words whose elements are read before their products are added.
    """
    sums = (tl.zeros((first.shape[0], SUMS), tl.float64 if EXACT else tl.float32),) * P
    count = tl.zeros((first.shape[0], SUMS), tl.int32)
    for word in range(0, words, UNROLLED):
        for part in tl.static_range(UNROLLED * 32 // SUMS):
            start = word * 32 + part * SUMS
            lane = tl.arange(0, SUMS)[None, :]
            at, left_of_row = first[:, None] + start + lane, width - column[:, None] - start
            inside = (lane < left_of_row) if TAIL else tl.full((first.shape[0], SUMS), True, tl.int1)
            kept = inside
            if excluded is not None:
                if ALIGNED:
                    if part * SUMS % 32 == 0:
                        there = (left_of_row > 0) if TAIL else tl.full((first.shape[0], 1), True, tl.int1)
                        bits = tl.load(excluded + (first[:, None] + start) // 32, mask=there, other=0)
                    held = bits >> (part * SUMS % 32 + lane)
                else:
                    held = tl.load(excluded + at // 32, mask=inside, other=0) >> (at % 32).to(tl.int32)
                kept = inside & ((held & 1) == 0)
            count += kept.to(tl.int32)
            r = _read(reference, at, inside)
            rows = ()
            added = ()
            if R == 0:
                rows = (tl.where(kept, r, 0.0),)
                added = _add(sums, 0, rows[0], rows[0], EXACT)
            for i in tl.static_range(L):
                d = tl.where(kept, _read(left[i], at, inside) - r, 0.0)
                rows = rows + (d,)
                if R == 0:
                    for a in tl.static_range(i + 2):
                        added = added + _add(sums, (i + 1) * (i + 2) // 2 + a, rows[a], d, EXACT)
            for j in tl.static_range(R):
                d = tl.where(kept, _read(right[j], at, inside) - r, 0.0)
                for a in tl.static_range(L):
                    added = added + _add(sums, j * L + a, rows[a], d, EXACT)
            sums = added
    return sums + (count,)


@triton.jit
def neighbours_added(sums, LEVELS: tl.constexpr):
    """fp64 [blocks] of [blocks, 2**LEVELS]: `gram.add_neighbours`."""
    sums = sums.to(tl.float64)
    for _ in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2)))
        sums = even + odd
    return tl.reshape(sums, (sums.shape[0],))


# A version for each multiple of 16 among them would take seconds to compile in the middle of a merge, and be no faster:
# where a block begins is told to be aligned.
@triton.jit(do_not_specialize=["width", "chunks", "blocks", "words", "base"])
def gram_kernel(
    reference, left, right, excluded, partial, width, chunks, blocks, words, base,
    L: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    SUMS: tl.constexpr, LEVELS: tl.constexpr, FEW: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
    ALIGNED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Inner products of BLOCKS blocks, of which a row has `chunks`; `words`: mask words that a block has at most.

    Without `right` (R = 0): the lower triangle, row by row, of the Gram matrix of (r, left − r). With it: the L x R
    products of left − r with right − r. partial [blocks, P]: fp64.
    """
    block = (tl.program_id(0) + base) * BLOCKS + tl.arange(0, BLOCKS)
    exists = (block < blocks) if TAIL else tl.full((BLOCKS,), True, tl.int1)
    row = block // chunks if ROWS else tl.zeros_like(block)
    column = (block - row * chunks).to(tl.int64) * BLOCK
    first = row.to(tl.int64) * width + column
    if ALIGNED:
        first = tl.multiple_of(first, 32)
    block = block.to(tl.int64)
    column = tl.where(exists, column, width) if TAIL else column
    found = _running_sums(
        reference, left, right, excluded, first, column, width, words, L, R, P, SUMS, UNROLLED, ALIGNED, TAIL, False
    )
    count = tl.sum(found[P], 1)
    few = (count > 0) & (count <= FEW)
    for p in tl.static_range(P):
        tl.store(partial + block * P + p, neighbours_added(found[p], LEVELS), mask=exists & (few == 0))
    if tl.max(few.to(tl.int32), 0) > 0:
        exact = _running_sums(  # seldom: not unrolled, it would only take time to compile
            reference, left, right, excluded, first, column, width, words, L, R, P, SUMS, 1, ALIGNED, TAIL, True
        )
        for p in tl.static_range(P):
            tl.store(partial + block * P + p, neighbours_added(exact[p], LEVELS), mask=exists & few)


def masked_gram(
    reference: Tensor,
    vectors: Sequence[Tensor],
    excluded: Tensor | None,
    *,
    granularity: Literal["tensor", "row"] = "tensor",
) -> Tensor:
    """`cpift_kernels.masked_gram` on CUDA or ROCm tensors."""
    rows, size = row_count(reference, granularity), len(vectors) + 1
    gram = torch.zeros(rows, size, size, dtype=torch.float64)
    if reference.numel() == 0:
        return gram
    launches = [
        (left, right, block_sums(reference, vectors, left, right, excluded, rows)) for left, right in plan(size - 1)
    ]
    for left, right, sums in launches:
        a, b = torch.tensor(pairs_of(left, right)).T
        gram[:, a, b] = gram[:, b, a] = add_neighbours(sums).cpu()
    return gram


def plan(vectors: int) -> list[tuple[range, range | None]]:
    """The launches over so many vectors: a group with itself and the reference, or with vectors of a later group."""
    groups = [range(start, min(start + GROUP, vectors)) for start in range(0, vectors, GROUP)]
    launches: list[tuple[range, range | None]] = [(group, None) for group in groups]
    for g, left in enumerate(groups):
        for other in groups[g + 1 :]:
            launches += [(left, other[i : i + ACROSS]) for i in range(0, len(other), ACROSS)]
    return launches


def pairs_of(left: range, right: range | None) -> list[tuple[int, int]]:
    """The places in a Gram matrix, in or below its diagonal, of the products of a launch over these vectors."""
    if right is None:
        index = [0, *(i + 1 for i in left)]
        return [(a, b) for number, a in enumerate(index) for b in index[: number + 1]]
    return [(j + 1, i + 1) for j in right for i in left]


def block_sums(
    reference: Tensor,
    vectors: Sequence[Tensor],
    left: range,
    right: range | None,
    excluded: Tensor | None,
    rows: int,
) -> Tensor:
    """fp64 [rows, blocks a row, P]: the products of one group of vectors."""
    width, device = reference.numel() // rows, reference.device
    pairs = len(left) * len(right) if right else (len(left) + 1) * (len(left) + 2) // 2
    chunks = triton.cdiv(width, BLOCK)
    blocks, whole = rows * chunks, 0 if rows > 1 and width % BLOCK else rows * width // (BLOCK * BLOCKS)
    partial = torch.empty(blocks, pairs, dtype=torch.float64, device=device)
    groups = (tuple(elements(vectors[i]) for i in group) for group in (left, right or ()))
    arguments = (
        elements(reference), *groups, excluded, partial, width, chunks, blocks, triton.cdiv(min(width, BLOCK), WORD)
    )  # fmt: skip
    options = {
        "L": len(left), "R": len(right or ()), "P": pairs, "BLOCK": BLOCK, "BLOCKS": BLOCKS, "SUMS": SUMS,
        "LEVELS": SUMS.bit_length() - 1, "FEW": FEW,
        "UNROLLED": 2 if len(left) + len(right or ()) < GROUP else 1, "ROWS": rows > 1,
        "ALIGNED": rows == 1 or width % WORD == 0, "threads": BLOCKS * SUMS // 2,
    }  # fmt: skip
    for first, last, tail in ((0, whole, False), (whole, triton.cdiv(blocks, BLOCKS), True)):
        if first < last:
            common.launch(gram_kernel, last - first, device, *arguments, base=first, TAIL=tail, **options)
    return partial.view(rows, chunks, pairs)
