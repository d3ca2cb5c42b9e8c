"""Core selection on the GPU: sample a bracket, mark in one pass over all models, finish exactly.

|Δ| is ordered by (magnitude descending, linear index ascending). A sample brackets the k-th element between two cut
points of that order. One pass over the models writes two bit masks per region, the elements before the upper cut
(certainly in) and before the lower cut (possibly in), and counts both. The candidates, those in the second mask alone,
are about 0.1 % of the model; sorting them settles the region exactly. A bracket that missed is widened.

The index half of a cut point acts at block boundaries, so a block compares with one number per cut and any amount of
ties costs nothing.
"""

# ruff: noqa: RUF005 (Triton does not unpack tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment"
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import words_for
from ..selection import CoreMask, nonfinite_update
from .bracket import EVERYTHING, NOTHING, SPREADS, Bracket, cut_tables, draw_samples
from .common import (
    all_registers,
    elements,
    launch_blocks,
    mask_bytes,
    pack,
    popcount,
    read,
    widen,
    within,
    word_bytes_within,
)

BLOCK = 4096  # elements that one program reads of every tensor
TILE = 1024  # of them at a time, 32 bytes of each a thread: what a program does once costs less where it does more
GROUP = 8  # models that one launch marks; more would spill registers, and θ0 is read once a group
SCRATCH_BYTES = 1 << 25  # of lower masks at a time: a slice of each tensor is marked, then its candidates taken


@triton.jit
def mark_kernel(
    pretrained, tuned, upper, lower, lower_stride, counts, faults, cuts, edges, start, numel, base,
    N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Mark one block of N models against K cut pairs each.

    pretrained, tuned[N]: elements of the slice; upper[N * K], lower [N * K, lower_stride]: mask bytes;
    counts [blocks, N * K]: elements above the upper cut | those above the lower one << 16; faults [blocks]: whether
    any Δ is NaN or Inf; cuts, edges [N * K, 2]: key bits and linear index of the upper and lower cut;
    start: linear index of the slice's first element.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    above, below, found = (), (), ()
    for c in tl.static_range(N * K):
        # Non-negative floats order like their bits, so the cut's bits serve as a float.
        high = tl.load(cuts + 2 * c) - (start + first < tl.load(edges + 2 * c)).to(tl.int32)
        low = tl.load(cuts + 2 * c + 1) - (start + first < tl.load(edges + 2 * c + 1)).to(tl.int32)
        above = above + (high.to(tl.float32, bitcast=True),)
        below = below + (low.to(tl.float32, bitcast=True),)
        found = found + (tl.zeros((TILE // 8,), tl.int32),)
    fault = tl.zeros((TILE // 8, 8), tl.float32)
    for turn in tl.range(0, BLOCK, TILE):
        at = first + turn
        row = at // 8 + tl.arange(0, TILE // 8)
        inside = within(numel - at, TILE, TAIL)
        written = word_bytes_within(numel - at, TILE, TAIL)
        origin = read(pretrained, at, inside, TILE)
        counted = ()
        for i in tl.static_range(N):
            delta = read(tuned[i], at, inside, TILE) - origin
            fault += delta * 0.0  # NaN from the first NaN or Inf on
            for k in tl.static_range(K):
                sure = pack(tl.abs(delta) > above[i * K + k])
                possible = pack(tl.abs(delta) > below[i * K + k])
                tl.store(upper[i * K + k] + row, sure.to(tl.uint8), mask=written)
                tl.store(lower + lower_stride * (i * K + k) + row, possible.to(tl.uint8), mask=written)
                both = popcount(sure.to(tl.uint32)) + (popcount(possible.to(tl.uint32)) << 16)
                counted = counted + (found[i * K + k] + both,)
        found = counted
    for c in tl.static_range(N * K):
        tl.store(counts + first // BLOCK * (N * K) + c, tl.sum(found[c], 0))
    tl.store(faults + first // BLOCK, tl.max(tl.max((fault != fault).to(tl.int32), 1), 0))


@triton.jit
def collect_kernel(
    pretrained, tuned, upper, lower, ranks, keys, indices, start, numel, base,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Write key bits and linear index of every element in `lower` but not in `upper`, in order.

    upper, lower: int32 words of one slice; ranks [blocks]: candidates before each block.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK + base
    word = tl.arange(0, BLOCK // 32)
    inside = (word * 32 < numel - first) if TAIL else tl.full((BLOCK // 32,), True, tl.int1)
    sure = tl.load(upper + first // 32 + word, mask=inside, other=0)
    possible = tl.load(lower + first // 32 + word, mask=inside, other=0)
    bits = (possible & ~sure).to(tl.uint32, bitcast=True)
    left = popcount(bits)
    rank = tl.load(ranks + first // BLOCK) + tl.cumsum(left, 0) - left
    while tl.max(left, 0) > 0:  # one bit of every word a turn: candidates are few
        live = left > 0
        position = first + word * 32 + popcount((bits & (0 - bits)) - 1)
        value = widen(tl.load(tuned + position, mask=live, other=0))
        origin = widen(tl.load(pretrained + position, mask=live, other=0))
        tl.store(keys + rank, tl.abs(value - origin).to(tl.int32, bitcast=True), mask=live)
        tl.store(indices + rank, start + position, mask=live)
        bits = bits & (bits - 1)
        left -= 1
        rank += 1


@dataclass
class Region:
    """One region while it is being selected: its upper mask so far, counts, and candidates in linear order."""

    words: list[Tensor]
    sure: int
    possible: int
    keys: list[Tensor]
    indices: list[Tensor]


def select_cores(
    pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]], counts: Sequence[int]
) -> list[list[CoreMask]]:
    """`cpift_kernels.select_cores` on CUDA or ROCm tensors."""
    return [
        [core or _retry(pretrained, model, count) for core, count in zip(cores, counts, strict=True)]
        for model, cores in zip(tuned, _attempt(pretrained, tuned, counts, 0), strict=True)
    ]


def _retry(pretrained: Sequence[Tensor], model: Sequence[Tensor], count: int) -> CoreMask:
    """A region whose bracket missed, with another sample and a wider bracket; the last one spans everything."""
    for attempt in range(1, len(SPREADS)):
        core = _attempt(pretrained, [model], [count], attempt)[0][0]
        if core is not None:
            return core
    raise AssertionError("the widest bracket holds every element that moved")


def _attempt(
    pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]], counts: Sequence[int], attempt: int
) -> list[list[CoreMask | None]]:
    """One pass over the models; None for a region whose bracket missed."""
    brackets = [
        [sample.bracket(count, SPREADS[attempt]) for count in counts]
        for sample in draw_samples(pretrained, tuned, attempt)
    ]
    regions = mark_models(pretrained, tuned, brackets)
    sizes = [tensor.numel() for tensor in pretrained]
    return [
        [_finish(*item, sizes) for item in zip(row, cuts, counts, strict=True)]
        for row, cuts in zip(regions, brackets, strict=True)
    ]


def mark_models(
    pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]], brackets: Sequence[Sequence[Bracket]]
) -> list[list[Region]]:
    """The pass over all models, slice by slice: upper masks, counts and candidates of every region."""
    regions = [[Region([], 0, 0, [], []) for _ in row] for row in brackets]
    groups = [slice(i, i + GROUP) for i in range(0, len(tuned), GROUP)] if regions and regions[0] else []
    masks = sum(map(len, brackets[:GROUP]))
    start = 0
    for t, origin in enumerate(pretrained):
        numel, device = origin.numel(), origin.device
        for region in (region for row in regions for region in row):
            region.words.append(torch.empty(words_for(numel), dtype=torch.int32, device=device))
        limit = max(SCRATCH_BYTES * 8 // max(masks, 1) // BLOCK, 1) * BLOCK
        for offset in range(0, numel, limit):
            part = slice(offset, min(offset + limit, numel))
            models = [elements(model[t])[part] for model in tuned]
            for group in groups:
                rows = regions[group]
                uppers = [core.words[t][part.start // 32 : words_for(part.stop)] for row in rows for core in row]
                try:
                    _mark_slice(elements(origin)[part], models[group], uppers, brackets[group], rows, start + offset)
                except ArithmeticError:
                    raise blame(origin, {task: model[t] for task, model in enumerate(tuned)}, t) from None
        start += numel
    return regions


def _mark_slice(
    origin: Tensor,
    models: list[Tensor],
    uppers: list[Tensor],
    brackets: Sequence[Sequence[Bracket]],
    regions: list[list[Region]],
    start: int,
) -> None:
    """Mark one slice and take its candidates; ArithmeticError if a Δ in it is NaN or Inf."""
    found = marked(origin, models, uppers, brackets, start)
    for region, (sure, keys, indices) in zip((region for row in regions for region in row), found, strict=True):
        region.sure += sure
        region.possible += sure + len(keys)
        region.keys.append(keys)
        region.indices.append(indices)


def marked(
    origin: Tensor, models: list[Tensor], uppers: list[Tensor], brackets: Sequence[Sequence[Bracket]], start: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Fill the masks `uppers`; of each in turn how many bits are set, and the candidates' key bits and linear indices
    [C], in order. Waits for the device once. Raises ArithmeticError if a Δ is NaN or Inf."""
    tables = [table.to(origin.device) for table in cut_tables(brackets)]
    marks = begin_marks(origin, models, uppers, tables, start)
    yield from marks.collected(marks.totals.tolist())


@dataclass
class Marks:
    """One slice whose masks are being filled. totals int64 [1 + 2·N·K]: whether any Δ is NaN or Inf, bits above each
    upper cut, bits above each lower one."""

    origin: Tensor
    models: list[Tensor]
    uppers: list[Tensor]
    start: int
    lower: Tensor
    before: Tensor  # candidates before each block
    totals: Tensor

    def collected(self, totals: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As `marked`; totals: those of the slice, read by the host."""
        faulty, *counts = totals
        if faulty:
            raise ArithmeticError
        masks, by_model = len(self.uppers), len(self.uppers) // len(self.models)
        for c, upper in enumerate(self.uppers):
            certain, maximal = counts[c], counts[masks + c]
            model, amount = self.models[c // by_model], maximal - certain
            yield (
                certain,
                *launch_collect(self.origin, model, upper, self.lower[c], self.before[c], amount, self.start),
            )


def begin_marks(
    origin: Tensor, models: list[Tensor], uppers: list[Tensor], tables: Sequence[Tensor], start: int
) -> Marks:
    """Launch what fills the masks `uppers`, without a wait; tables: `cut_tables` on the device."""
    lower, counts, faults = launch_mark(origin, models, uppers, tables, start)
    sure, possible = (counts & 0xFFFF).T.long(), (counts >> 16).T.long()
    before = (possible - sure).cumsum(1) - (possible - sure)
    totals = torch.cat([faults.sum()[None], sure.sum(1), possible.sum(1)])
    return Marks(origin, models, uppers, start, lower, before, totals)


def launch_mark(
    origin: Tensor, models: list[Tensor], uppers: list[Tensor], tables: Sequence[Tensor], start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `uppers`; the lower mask words [N * K, ...], counts [blocks, N * K] and faults [blocks] of `mark_kernel`."""
    numel, device = origin.numel(), origin.device
    lower = torch.empty(len(uppers), triton.cdiv(numel, 512) * 16, dtype=torch.int32, device=device)
    counts = torch.empty(triton.cdiv(numel, BLOCK), len(uppers), dtype=torch.int32, device=device)
    faults = torch.empty(len(counts), dtype=torch.int32, device=device)
    launch_blocks(
        mark_kernel, numel, BLOCK, device,
        origin, tuple(models), tuple(map(mask_bytes, uppers)), mask_bytes(lower.view(-1)), 4 * lower.stride(0),
        counts, faults, *tables, start, numel,
        N=len(models), K=len(uppers) // len(models), BLOCK=BLOCK, TILE=TILE, threads=TILE * origin.element_size() // 32,
        registers=all_registers(origin, *models),
    )  # fmt: skip
    return lower, counts, faults


def launch_collect(
    origin: Tensor, model: Tensor, upper: Tensor, lower: Tensor, before: Tensor, amount: int, start: int
) -> tuple[Tensor, Tensor]:
    """Key bits and linear indices of the `amount` candidates of one slice; before [blocks]: those before each block."""
    keys = torch.empty(amount, dtype=torch.int32, device=origin.device)
    indices = torch.empty(amount, dtype=torch.int64, device=origin.device)
    if amount == 0:
        return keys, indices
    launch_blocks(
        collect_kernel, origin.numel(), BLOCK, origin.device,
        origin, model, upper, lower, before, keys, indices, start, origin.numel(),
        BLOCK=BLOCK, threads=BLOCK // 16,
    )  # fmt: skip
    return keys, indices


def blame(origin: Tensor, models: Mapping[int, Tensor], tensor: int) -> ValueError:
    """The error that names the first task, by its number, whose update of `tensor` is not finite."""
    for task, model in models.items():
        if not (model.float() - origin.float()).isfinite().all():
            return nonfinite_update(tensor, task)
    raise AssertionError(f"tensor {tensor} was flagged, yet every update of it is finite")


def _finish(region: Region, bracket: Bracket, count: int, sizes: Sequence[int]) -> CoreMask | None:
    """Settle the candidates; None if the bracket missed."""
    wanted = min(count, region.possible)
    if wanted == 0 and bracket.lower in (EVERYTHING, NOTHING):
        return CoreMask(region.words, 0, count, math.inf)
    complete = region.possible >= count or bracket.lower == EVERYTHING
    if not complete or region.sure >= wanted:  # equality would leave the threshold unknown
        return None
    keys, indices = torch.cat(region.keys), torch.cat(region.indices)
    ordered, order = keys.sort(descending=True, stable=True)
    taken = wanted - region.sure
    _set_bits(region.words, sizes, indices[order[:taken]].sort().values)
    return CoreMask(region.words, wanted, count, float(ordered[taken - 1].view(torch.float32)))


def _set_bits(words: Sequence[Tensor], sizes: Sequence[int], indices: Tensor) -> None:
    """Set the bits at ascending linear `indices`, none of which is set."""
    ends = torch.tensor(sizes, device=indices.device).cumsum(0)
    parts = indices.tensor_split(torch.searchsorted(indices, ends)[:-1].cpu())
    for mask, part, end, size in zip(words, parts, ends.tolist(), sizes, strict=True):
        local = part - (end - size)
        mask.index_add_(0, local // 32, (1 << local % 32).to(torch.int32))  # distinct bits: adding sets them
