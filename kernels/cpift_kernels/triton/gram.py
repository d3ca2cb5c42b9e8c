"""Masked Gram matrix on the GPU: fp32 products summed inside a thread, fp64 across threads, blocks in fixed order.

What a program sums is a run; a run with few elements left is summed again, in fp64 (`gram.FEW`). Up to GROUP vectors
are read once. More do not fit the registers: `plan` cuts them into launches, each of which reads its vectors again.
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

from ..gram import FEW, row_count
from ..masks import unpack_mask
from .common import bit_masks, elements, launch_rows, mask_bytes, member_bits, read, row_block, within
from .freeze import BLOCK as COUNTED
from .freeze import mask_starts

BLOCK = 1024
TILES = 8  # blocks a program adds up before it writes: 64 fp32 products a thread
GROUP = 8  # vectors whose products with one another one launch takes
ACROSS = 4  # further vectors that one launch multiplies a group with
AT_ONCE = 1 << 24  # values of runs with few elements that are gathered at once


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
    rows, size = row_count(reference, granularity), len(vectors) + 1
    gram = torch.zeros(rows, size, size, dtype=torch.float64)
    if reference.numel() == 0:
        return gram
    width = reference.numel() // rows
    if width <= FEW:
        return _sums_of_few([reference, *vectors], excluded, width, list(range(rows)), width).cpu()
    block = row_block(rows, width, BLOCK)
    run = block * (TILES if rows == 1 else min(TILES, triton.cdiv(width, block)))
    launches = [
        (left, right, _run(reference, vectors, left, right, excluded, rows, block, run // block))
        for left, right in plan(size - 1)
    ]
    elements_left = _elements_left(excluded, reference, rows, width, run)
    few = elements_left <= FEW
    for left, right, values in launches:
        if right is None:
            index = torch.tensor([0, *(i + 1 for i in left)])
            a, b = torch.tril_indices(len(index), len(index))
            a, b = index[a], index[b]
        else:
            b, a = (x.flatten() + 1 for x in torch.meshgrid(torch.tensor(right), torch.tensor(left), indexing="ij"))
        gram[:, a, b] = gram[:, b, a] = torch.where(few[..., None], 0.0, values).sum(1).cpu()
    again = (few & (elements_left > 0)).flatten().nonzero().flatten().tolist()
    if again:
        sums = _sums_of_few([reference, *vectors], excluded, width, again, run).cpu()
        gram.index_add_(0, torch.tensor(again) // elements_left.shape[1], sums)
    return gram


def _elements_left(excluded: Tensor | None, reference: Tensor, rows: int, width: int, run: int) -> Tensor:
    """int64 [rows, runs a row]: the elements of each run that are not excluded."""
    chunks = triton.cdiv(width, run)
    edges = (torch.arange(chunks + 1, device=reference.device) * run).clamp(max=width)
    sizes = edges.diff()
    if excluded is None:
        return sizes.repeat(rows, 1)
    if rows == 1:  # a run is whole blocks of the kernel that counts masks
        return (sizes - mask_starts(excluded, width)[(edges + COUNTED - 1) // COUNTED].diff())[None]
    taken = torch.nn.functional.pad(unpack_mask(excluded, rows * width).view(rows, width), (0, chunks * run - width))
    return sizes - taken.view(rows, chunks, run).sum(2)


def _sums_of_few(
    models: Sequence[Tensor], excluded: Tensor | None, width: int, runs: Sequence[int], run: int
) -> Tensor:
    """fp64 [len(runs), N+1, N+1]: the Gram matrices of some runs, by their numbers over all rows, in fp64."""
    device, chunks = models[0].device, triton.cdiv(width, run)
    kept = None if excluded is None else ~unpack_mask(excluded, models[0].numel())
    flat, parts = [model.reshape(-1) for model in models], []
    step = max(1, AT_ONCE // (run * len(models)))
    for at in range(0, len(runs), step):
        number = torch.tensor(runs[at : at + step], device=device)[:, None]
        column = number % chunks * run + torch.arange(run, device=device)
        inside = column < width
        place = torch.where(inside, number // chunks * width + column, 0)
        inside = inside if kept is None else inside & kept[place]
        base = flat[0][place].float()
        vectors = torch.stack([base, *(model[place].float() - base for model in flat[1:])], 1)
        vectors = torch.where(inside[:, None], vectors, 0.0).double()
        parts.append(vectors @ vectors.transpose(1, 2))
    return torch.cat(parts)


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
    block: int,
    tiles: int,
) -> Tensor:
    """fp64 [rows, runs a row, P]: the products of one launch, a run of `tiles` blocks a program."""
    width, device = reference.numel() // rows, reference.device
    pairs = len(left) * len(right) if right else (len(left) + 1) * (len(left) + 2) // 2
    chunks = triton.cdiv(width, block * tiles)
    partial = torch.empty(rows * chunks, pairs, dtype=torch.float64, device=device)
    groups = (tuple(elements(vectors[i]) for i in group) for group in (left, right or ()))
    launch_rows(
        gram_kernel, rows, width, block * tiles, device, elements(reference), *groups,
        None if excluded is None else mask_bytes(excluded), partial, width,
        L=len(left), R=len(right or ()), P=pairs, BLOCK=block, TILES=tiles, threads=max(block // 8, 64),
    )  # fmt: skip
    return partial.view(rows, chunks, pairs)
