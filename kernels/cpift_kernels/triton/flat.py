"""Many tensors in one buffer on the GPU: one launch walks them all, and nothing waits.

The buffers are whole programs of every kernel, so the kernels of single tensors do: what they find of a block is of one
tensor, and what is wanted by tensor is added up behind them by the tables of the layout.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..flat import PAD, FlatLayout
from . import apply, common, gram, overlap
from .common import popcount, widen
from .gram import neighbours_added
from .selection import BLOCK

SUMMED = 256  # threads of a program that adds up the blocks of one run


@triton.jit(do_not_specialize=["stride", "blocks", "room", "pairs"], do_not_specialize_on_alignment=["places"])
def collect_all_kernel(
    pretrained, tuned, upper, lower, ranks, places, keys, found, stride, blocks, room, pairs,
    N: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Of one block of N models, each against `pairs` cut pairs: key bits and place of every element in `lower` but not
    in `upper`, in order.

    upper, lower: int32 words [N * pairs, stride]; ranks [N * pairs, blocks]: candidates of all regions before each
    block; places [blocks * BLOCK / UNIT]: where each UNIT elements begin within their segment; keys, found [room]: what
    has no room is left out.
    """
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    word = tl.arange(0, BLOCK // 32)
    begin = tl.load(places + first // UNIT) + (first % UNIT).to(tl.int32)
    for i in tl.static_range(N):
        for k in range(pairs):
            c = (i * pairs + k).to(tl.int64)
            sure = tl.load(upper + c * stride + first // 32 + word)
            possible = tl.load(lower + c * stride + first // 32 + word)
            bits = (possible & ~sure).to(tl.uint32, bitcast=True)
            left = popcount(bits)
            rank = tl.load(ranks + c * blocks + block) + tl.cumsum(left, 0) - left
            while tl.max(left, 0) > 0:  # one bit of every word a turn: candidates are few
                live = left > 0
                inside = word * 32 + popcount((bits & (0 - bits)) - 1)
                value = widen(tl.load(tuned[i] + first + inside, mask=live, other=0))
                origin = widen(tl.load(pretrained + first + inside, mask=live, other=0))
                kept = live & (rank < room)
                tl.store(keys + rank, tl.abs(value - origin).to(tl.int32, bitcast=True), mask=kept)
                tl.store(found + rank, begin + inside, mask=kept)
                bits = bits & (bits - 1)
                left -= 1
                rank += 1


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["firsts", "counts"])
def sum_blocks_kernel(partial, firsts, counts, sums, pairs, MOST: tl.constexpr, LEVELS: tl.constexpr):
    """sums [runs, pairs] fp64: of one run and pair `gram.add_neighbours` of the sums of its blocks, MOST at most."""
    run = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    block = tl.arange(0, MOST)
    at = (tl.load(firsts + run).to(tl.int64) + block) * pairs + pair
    values = tl.load(partial + at, mask=block < tl.load(counts + run), other=0.0)
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), neighbours_added(tl.reshape(values, (1, MOST)), LEVELS))


def collect_all(
    origin: Tensor, models: Sequence[Tensor], upper: Tensor, lower: Tensor, ranks: Tensor, places: Tensor, room: int
) -> tuple[Tensor, Tensor]:
    """Key bits and places within their segments of the candidates of all regions, int32 [room] each, region by region;
    upper, lower: int32 [regions, words]; ranks int64 [regions, blocks]; places: of this part of a layout's table."""
    keys, found = (torch.empty(room, dtype=torch.int32, device=origin.device) for _ in range(2))
    common.launch(
        collect_all_kernel, origin.numel() // BLOCK, origin.device,
        origin, tuple(models), upper, lower, ranks, places, keys, found, upper.stride(0), ranks.shape[1], room,
        len(upper) // len(models), N=len(models), BLOCK=BLOCK, UNIT=PAD, threads=BLOCK // 32,
    )  # fmt: skip
    return keys, found


def sum_blocks(partial: Tensor, blocks: Tensor, sums: Tensor, most: int) -> None:
    """Write sums [runs, pairs] of partial [blocks, pairs]; blocks: `FlatLayout.blocks`, of which a run has `most`."""
    size = triton.next_power_of_2(most)
    common.launch(
        sum_blocks_kernel, sums.numel(), sums.device, partial, *blocks, sums, sums.shape[1],
        MOST=size, LEVELS=size.bit_length() - 1, threads=min(max(size, 64), SUMMED),
    )  # fmt: skip


def flat_overlaps(masks: Sequence[Tensor], layout: FlatLayout) -> Tensor:
    """`cpift_kernels.flat_overlaps` on CUDA or ROCm tensors."""
    tasks, device = len(masks), masks[0].device
    lower = overlap.launch_overlaps(list(masks)).long()
    counts = torch.zeros(len(layout.sizes), lower.shape[1], dtype=torch.int64, device=device)
    return _squares(counts.index_add_(0, layout.numbers(device), lower), tasks)


def flat_gram(
    reference: Tensor, vectors: Sequence[Tensor], excluded: Tensor | None, layout: FlatLayout, run: int
) -> Tensor:
    """`cpift_kernels.flat_gram` on CUDA or ROCm tensors."""
    plan, device = gram.plan(len(vectors)), reference.device
    pairs = [gram.pairs_of(left, right) for left, right in plan]
    runs = layout.blocks(device, run).shape[1]
    sums = torch.empty(runs, sum(map(len, pairs)), dtype=torch.float64, device=device)
    if not runs:
        return _squares(sums, len(vectors) + 1)
    words, bits = layout.padding(device)
    outside = (
        torch.zeros(layout.total // 32, dtype=torch.int32, device=device) if excluded is None else excluded.clone()
    )
    outside[words] |= bits  # or a block with few elements of a tensor would be taken for a full one
    partial = [gram.block_sums(reference, vectors, *groups, outside, 1)[0] for groups in plan]
    together = partial[0] if len(partial) == 1 else torch.cat(partial, 1)
    sum_blocks(together, layout.blocks(device, run), sums, layout.most_blocks(run))
    if len(plan) > 1:
        places = {pair: place for place, pair in enumerate(pair for group in pairs for pair in group)}
        order = [places[a, b] for a in range(len(vectors) + 1) for b in range(a + 1)]
        sums = torch.stack([sums[:, place] for place in order], 1)  # a table of places would be waited for
    return _squares(sums, len(vectors) + 1)


def _squares(lower: Tensor, size: int) -> Tensor:
    """[R, size, size] of [R, P]: symmetric matrices of their lower triangles, row by row."""
    a, b = torch.tril_indices(size, size, device=lower.device)
    whole = lower.new_empty(len(lower), size, size)
    whole[:, a, b] = whole[:, b, a] = lower
    return whole


def flat_apply(
    out: Tensor, sources: Sequence[Tensor], coefficients: Tensor, masks: Sequence[Tensor | None], layout: FlatLayout
) -> None:
    """`cpift_kernels.flat_apply` on CUDA or ROCm tensors."""
    apply.apply_by_number(out, sources, masks, coefficients, layout.numbers(out.device), PAD)
