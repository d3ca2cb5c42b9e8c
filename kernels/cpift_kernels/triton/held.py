"""Held elements on the GPU: a list of tensors put back in one launch for each size of its elements (2 and 4 bytes).

A program is a block of a tensor that holds a set bit. What it needs stands in tables on the device, made once: its
tensor, its place there and among what is saved, and the addresses of the tensors and masks. The table of addresses is
written again only when the list has moved. So a step allocates nothing, reads nothing back and can be captured in a
graph, once `restore_` or `pull_` has run outside it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..held import HeldElements
from . import common
from .common import bit_masks, bytes_within, elements, mask_bytes, popcount, tile, within
from .freeze import BLOCK, THREADS, block_counts

INTEGERS = {2: torch.int16, 4: torch.int32}  # elements move as bits


@triton.jit
def move_list_kernel(
    addresses, masks, sizes, which, blocks, before, saved,
    RESTORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the masked elements of one block of one tensor to their places in `saved`, or back from there."""
    program = tl.program_id(0)
    tensor = tl.load(which + program)
    first = tl.load(blocks + program).to(tl.int64) * BLOCK
    address = tl.load(addresses + tensor)
    left = tl.load(sizes + tensor) - first
    mask = tl.load(masks + tensor).to(tl.pointer_type(tl.uint8)) + first // 8
    byte = tl.load(mask + tl.arange(0, BLOCK // 8), mask=bytes_within(left, BLOCK, True), other=0).to(tl.int32)
    bits = popcount(byte.to(tl.uint32))
    rank = tl.load(before + program) + (tl.cumsum(bits, 0) - bits)
    place = saved + rank[:, None] + popcount((byte[:, None] & (bit_masks(True) - 1)).to(tl.uint32))
    member = (byte[:, None] & bit_masks(True)) != 0
    values = address.to(tl.pointer_type(saved.dtype.element_ty))
    if not RESTORE:
        member = member & within(left, BLOCK, True)
        tl.store(place, tl.load(values + first + tile(BLOCK), mask=member, other=0), mask=member)
    elif (address % 16 == 0) & (left >= BLOCK):
        # One condition for all eight elements of a byte keeps the accesses 128 bits wide.
        target = tl.multiple_of(values, 16) + first + tile(BLOCK)
        touched = (byte != 0)[:, None] & within(left, BLOCK, False)
        kept = tl.load(place, mask=member, other=0)
        tl.store(target, tl.where(member, kept, tl.load(target, mask=touched, other=0)), mask=touched)
    else:
        member = member & within(left, BLOCK, True)
        tl.store(values + first + tile(BLOCK), tl.load(place, mask=member, other=0), mask=member)


@triton.jit(do_not_specialize=["numel"], do_not_specialize_on_alignment=["blocks"])
def zero_blocks_kernel(values, mask, blocks, numel, BLOCK: tl.constexpr):
    """Zero the masked elements of one of the listed blocks of a tensor."""
    first = tl.load(blocks + tl.program_id(0)).to(tl.int64) * BLOCK
    left = numel - first
    byte = tl.load(mask + first // 8 + tl.arange(0, BLOCK // 8), mask=bytes_within(left, BLOCK, True), other=0)
    member = (byte.to(tl.int32)[:, None] & bit_masks(True)) != 0
    target = values + first + tile(BLOCK)
    if left >= BLOCK:
        touched = (byte != 0)[:, None] & within(left, BLOCK, False)
        old = tl.load(target, mask=touched, other=0)
        tl.store(target, tl.where(member, tl.zeros_like(old), old), mask=touched)
    else:
        nothing = tl.zeros((BLOCK // 8, 8), values.dtype.element_ty)
        tl.store(target, nothing, mask=member & within(left, BLOCK, True))


def zero_blocks(values: Tensor, words: Tensor, blocks: Tensor) -> None:
    """`zero_masked_` of the listed blocks (int32) alone, in one launch."""
    common.launch(
        zero_blocks_kernel, len(blocks), values.device,
        elements(values), mask_bytes(words), blocks, values.numel(),
        BLOCK=BLOCK, threads=THREADS,
    )  # fmt: skip


@dataclass(frozen=True)
class Moves:
    """The programs of one launch over tensors whose elements have one size, in the order of what they save.

    places: the tensors, by their place in the list. which, blocks [programs] int32: a program's tensor and block;
    before [programs] int64: how many elements are saved before its own. programs, counts: of each of `places` its
    programs and its elements saved.
    """

    places: list[int]
    which: Tensor
    blocks: Tensor
    before: Tensor
    programs: list[int]
    counts: list[int]
    saved: Tensor

    @staticmethod
    def make(places: list[int], counts: Sequence[NDArray[np.int32]], dtype: torch.dtype, device: torch.device) -> Moves:
        """counts: set bits in each block of the mask of each of `places`."""
        touched = [np.flatnonzero(of_blocks) for of_blocks in counts]
        bits = np.concatenate([of_blocks[blocks] for of_blocks, blocks in zip(counts, touched, strict=True)])
        before = np.cumsum(bits, dtype=np.int64) - bits
        programs = [len(blocks) for blocks in touched]
        which = np.repeat(np.array(places, np.int32), programs)
        totals = [int(of_blocks.sum(dtype=np.int64)) for of_blocks in counts]
        tables = (which, np.concatenate(touched).astype(np.int32), before)
        tensors, blocks, ranks = (torch.from_numpy(table).to(device) for table in tables)
        saved = torch.empty(sum(totals), dtype=dtype, device=device)
        return Moves(places, tensors, blocks, ranks, programs, totals, saved)

    @property
    def nbytes(self) -> int:
        """Memory without what is saved."""
        return self.which.nbytes + self.blocks.nbytes + self.before.nbytes

    def move(self, addresses: Tensor, masks: Tensor, sizes: Tensor, saved: Tensor, *, restore: bool) -> None:
        """One launch over all its tensors; addresses, masks, sizes: int64, by place in the list."""
        common.launch(
            move_list_kernel, len(self.which), saved.device,
            addresses, masks, sizes, self.which, self.blocks, self.before, saved,
            RESTORE=restore, BLOCK=BLOCK, threads=THREADS,
        )  # fmt: skip


class HeldOnGpu(HeldElements):
    """See `HeldElements`."""

    def __init__(self, values: Sequence[Tensor], words: Sequence[Tensor]):
        super().__init__(values, words, "triton")

    def _save(self, values: Sequence[Tensor]) -> None:
        self._device = values[0].device if values else torch.device("cpu")
        self._masks = self._table([mask.data_ptr() for mask in self._words])
        self._numels = self._table(self._sizes)
        self._addresses, self._known = self._table([0] * len(values)), [0] * len(values)
        self._now: list[Tensor] = []
        self._moves = list(self._listed(values))
        self._saved = [torch.empty(0)] * len(values)
        self._of_blocks = list(self._saved)
        for moves in self._moves:
            parts = zip(moves.saved.split(moves.counts), moves.blocks.split(moves.programs), strict=True)
            for place, (saved, blocks) in zip(moves.places, parts, strict=True):
                self._saved[place] = saved.view(values[place].dtype)
                self._of_blocks[place] = blocks
        self._move(values, [moves.saved for moves in self._moves], restore=False)

    def _listed(self, values: Sequence[Tensor]) -> Iterator[Moves]:
        """One wait for the counts of all masks."""
        found = [block_counts(mask, size) for mask, size in zip(self._words, self._sizes, strict=True)]
        if not found:
            return
        counts = torch.cat(found).cpu().numpy()
        of_tensors = np.split(counts, np.cumsum([len(one) for one in found])[:-1])
        for size, dtype in INTEGERS.items():
            places = [place for place, x in enumerate(values) if x.element_size() == size]
            if places:
                yield Moves.make(places, [of_tensors[place] for place in places], dtype, self._device)

    def _table(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    @property
    def nbytes(self) -> int:
        tables = 8 * 3 * len(self._sizes) + sum(moves.nbytes for moves in self._moves)
        return super().nbytes + tables + sum(now.nbytes for now in self._now)

    def replace(self, place: int, values: Tensor) -> None:
        self._check_same(f"values for tensor {place}", values, place)
        self._saved[place].copy_(self._gather(values, self._words[place]))

    def zero_(self, place: int, gradient: Tensor) -> None:
        self._check_one("gradient", gradient, self._sizes[place])
        zero_blocks(gradient, self._words[place], self._of_blocks[place])

    def restore_(self, values: Sequence[Tensor]) -> None:
        self._check(values)
        self._move(values, [moves.saved for moves in self._moves], restore=True)

    def pull_(self, values: Sequence[Tensor], shares: Sequence[float]) -> None:
        self._check(values)
        if not self._now:
            self._now = [torch.empty_like(moves.saved) for moves in self._moves]
        self._move(values, self._now, restore=False)
        for moves, now in zip(self._moves, self._now, strict=True):
            for share, dtype, start, stop in self._runs(moves, shares):
                held, here = (flat[start:stop].view(dtype) for flat in (moves.saved, now))
                here.lerp_(held, share)
        self._move(values, self._now, restore=True)

    def pull_each_(self, values: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
        self._check(values)
        self._check_shares(shares)
        if not self._now:
            self._now = [torch.empty_like(moves.saved) for moves in self._moves]
        self._move(values, self._now, restore=False)
        for moves, now in zip(self._moves, self._now, strict=True):
            for place, here in zip(moves.places, now.split(moves.counts), strict=True):
                here.view(shares[place].dtype).lerp_(self._saved[place], shares[place])
        self._move(values, self._now, restore=True)

    def _runs(self, moves: Moves, shares: Sequence[float]) -> Iterator[tuple[float, torch.dtype, int, int]]:
        """Runs of what is saved that move by one share: mostly one, for few optimizers have rates by tensor."""
        start = 0
        counts = dict(zip(moves.places, moves.counts, strict=True))
        for (share, dtype), run in groupby(moves.places, lambda place: (shares[place], self._saved[place].dtype)):
            stop = start + sum(counts[place] for place in run)
            yield share, dtype, start, stop
            start = stop

    def _move(self, values: Sequence[Tensor], saved: Sequence[Tensor], *, restore: bool) -> None:
        addresses = [x.data_ptr() for x in values]
        if addresses != self._known:
            self._addresses.copy_(torch.tensor(addresses, dtype=torch.int64))
            self._known = addresses
        for moves, flat in zip(self._moves, saved, strict=True):
            moves.move(self._addresses, self._masks, self._numels, flat, restore=restore)


def hold_masked(values: Sequence[Tensor], words: Sequence[Tensor]) -> HeldElements:
    """See `cpift_kernels.hold_masked`."""
    return HeldOnGpu(values, words)
