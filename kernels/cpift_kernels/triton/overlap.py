"""Overlap counts and conflict resolution on the GPU: one read of every mask."""
# ruff: noqa: RUF005 (Triton does not unpack tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    bit_masks,
    elements,
    launch_blocks,
    mask_bytes,
    pack,
    popcount,
    read,
    within,
    word_bytes_within,
)

WORDS = 1024  # of every mask that one program counts: a 128-bit load a thread
BLOCK = 2048  # elements that one program settles
THREADS = 256


@triton.jit
def overlap_kernel(
    masks, partial, words, base, N: tl.constexpr, P: tl.constexpr, WORDS: tl.constexpr, TAIL: tl.constexpr
):
    """partial [programs, P]: intersections of one run of words, lower triangle row by row."""
    first = tl.program_id(0).to(tl.int64) * WORDS + base
    offsets = tl.arange(0, WORDS)
    inside = (offsets < words - first) if TAIL else tl.full((WORDS,), True, tl.int1)
    loaded = ()
    for i in tl.static_range(N):
        loaded = loaded + (tl.load(masks[i] + first + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True),)
        for j in tl.static_range(i + 1):
            common = tl.sum(popcount(loaded[i] & loaded[j]), 0)
            tl.store(partial + first // WORDS * P + i * (i + 1) // 2 + j, common)


@triton.jit
def conflict_kernel(
    pretrained, tuned, masks, settled, numel, base,
    N: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Give every contested element of one block to one task.

    masks[N], settled[N]: mask bytes before and after. The models are read only where a byte holds a contested bit.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    row = tl.arange(0, BLOCK // 8)
    written = word_bytes_within(numel - first, BLOCK, TAIL)
    held = tl.zeros((BLOCK // 8,), tl.int32)
    contested = tl.zeros((BLOCK // 8,), tl.int32)
    members = ()
    for i in tl.static_range(N):
        members = members + (tl.load(masks[i] + first // 8 + row, mask=written, other=0).to(tl.int32),)
        contested = contested | (held & members[i])
        held = held | members[i]
    if MAGNITUDE:
        needed = (contested[:, None] != 0) & within(numel - first, BLOCK, TAIL)
        origin = read(pretrained, first, needed, BLOCK)
        best = tl.full((BLOCK // 8, 8), -1.0, tl.float32)
        claims = ()
        for i in tl.static_range(N):
            claim = tl.abs(read(tuned[i], first, needed, BLOCK) - origin)
            takes = ((members[i][:, None] & bit_masks(True)) != 0) & (claim > best)
            best = tl.where(takes, claim, best)
            claims = claims + (pack(takes),)
    else:
        claims = members
    # Whoever takes an element has it until another takes it.
    later = tl.zeros((BLOCK // 8,), tl.int32)
    for back in tl.static_range(N):
        won = members[N - 1 - back] & ((claims[N - 1 - back] & ~later) | ~contested)
        tl.store(settled[N - 1 - back] + first // 8 + row, won.to(tl.uint8), mask=written)
        later = later | claims[N - 1 - back]


def overlap_counts_per_tensor(masks: Sequence[Sequence[Tensor]]) -> Tensor:
    """`cpift_kernels.overlap_counts_per_tensor` on CUDA or ROCm tensors."""
    tasks, tensors = len(masks), len(masks[0])
    counts = torch.zeros(tensors, tasks, tasks, dtype=torch.int64)
    if tensors:
        a, b = torch.tril_indices(tasks, tasks)
        lower = torch.stack([_intersections([task[t] for task in masks]) for t in range(tensors)]).cpu()
        counts[:, a, b] = counts[:, b, a] = lower
    return counts


def _intersections(masks: list[Tensor]) -> Tensor:
    """int64 [N (N + 1) / 2] on the device: the lower triangle of one tensor's counts."""
    return launch_overlaps(masks).sum(0, dtype=torch.int64)


def launch_overlaps(masks: list[Tensor]) -> Tensor:
    """int32 [runs of WORDS words, N (N + 1) / 2]: the same of each run."""
    words, device = masks[0].numel(), masks[0].device
    pairs = len(masks) * (len(masks) + 1) // 2
    partial = torch.empty(triton.cdiv(words, WORDS), pairs, dtype=torch.int32, device=device)
    launch_blocks(
        overlap_kernel, words, WORDS, device, tuple(masks), partial, words,
        N=len(masks), P=pairs, WORDS=WORDS, threads=THREADS,
    )  # fmt: skip
    return partial


def resolve_conflicts(
    policy: str, pretrained: Tensor, tuned: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Tensor]:
    """`cpift_kernels.resolve_conflicts` on CUDA or ROCm tensors."""
    if policy == "mean":
        return [words.clone() for words in masks]
    settled = [torch.empty_like(words) for words in masks]
    numel = pretrained.numel()
    launch_blocks(
        conflict_kernel, numel, BLOCK, pretrained.device,
        elements(pretrained), tuple(map(elements, tuned)), tuple(map(mask_bytes, masks)),
        tuple(map(mask_bytes, settled)), numel,
        N=len(masks), MAGNITUDE=policy == "magnitude", BLOCK=BLOCK, threads=THREADS,
    )  # fmt: skip
    return settled
