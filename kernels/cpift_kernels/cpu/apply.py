"""Fused apply on the CPU: each word of 32 outputs is combined and transplanted in registers and written once.

A single donor's values go through fp32, which leaves their bits as they are; an fp16 signalling NaN alone turns quiet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..streaming import ITEM
from .compiled import in_threads, inner, kernel
from .emit import BF16, FP16, FP32, LANES
from .fuse import MOST, fuse_words
from .segments import storage_kind
from .storage import MIXED, WHOLE, read, write
from .vector import add, divide, fill, fma, select
from .words import read_word

BLOCK = 1 << 12  # elements that the fast path fuses before it looks for shared elements


def fused_apply(out: Tensor, sources: Sequence[Tensor], coefficients: Tensor, masks: Sequence[Tensor | None]) -> None:
    """See `cpift_kernels.fused_apply`."""
    numel, rows = out.numel(), len(coefficients)
    if numel == 0:
        return
    used = [m for m in range(len(sources)) if masks[m] is not None or bool(coefficients[:, m].any())]
    kinds = np.array([storage_kind(sources[m]) for m in used], np.int64)
    addresses = np.array([sources[m].data_ptr() for m in used], np.int64)
    words = np.array([0 if (mask := masks[m]) is None else mask.data_ptr() for m in used], np.int64)
    scale = np.ascontiguousarray(coefficients[:, used].numpy().astype(np.float32))
    kind, width, same = storage_kind(out), numel // rows, bool((kinds == storage_kind(out)).all())
    run = _apply
    if same and 0 < len(used) <= MOST and (rows == 1 or width % LANES == 0) and scale.all():
        run = _fast_apply(len(used), kind)
    size = max(min(ITEM // (4 * len(sources) + 4), numel // (4 * torch.get_num_threads())), 1 << 14) // BLOCK * BLOCK

    def apply(start: int) -> None:
        stop = min(start + size, numel)
        run(kind, out.data_ptr(), same, kinds, addresses, words, scale, width, start, stop)

    in_threads(apply, range(0, numel, size))


@cache
def _fast_apply(count: int, storage: int) -> Callable[..., Any]:
    """`_apply` where all tensors are stored alike, no coefficient is 0 and rows are whole words."""
    marker = (BF16, FP16, FP32)[storage]
    element = 4 if storage == 2 else 2

    def fast_apply(kind, out, same, kinds, sources, words, scale, width, start, stop):  # type: ignore[no-untyped-def]
        table, masks = np.empty(count, np.int64), np.empty(count, np.int64)
        no_mask = np.zeros(BLOCK // LANES, np.uint32)
        first = start
        while first < stop:
            row = first // width
            last = min(first + BLOCK, stop, (row + 1) * width)
            whole = (last - first) // LANES
            for m in range(count):
                table[m] = sources[m] + first * element
                masks[m] = words[m] + first // 8 if words[m] != 0 else no_mask.ctypes.data
            shared = fuse_words(
                marker,
                count,
                table.ctypes.data,
                masks.ctypes.data,
                scale[row].ctypes.data,
                out + first * element,
                whole,
            )
            if shared:  # elements with several donors: rare, since conflicts are usually resolved before
                _apply_as(marker, kind, out, kinds, sources, words, scale, width, first, last)
            elif first + whole * LANES < last:
                _apply_as(marker, kind, out, kinds, sources, words, scale, width, first + whole * LANES, last)
            first = last

    fast_apply.__qualname__ = f"fast_apply_{count}_{storage}"
    return kernel(fast_apply)


@kernel
def _apply(kind, out, same, kinds, sources, words, scale, width, start, stop):  # type: ignore[no-untyped-def]
    """Elements start..stop-1, start a multiple of 32. kinds, sources, words [M]: storage kinds and addresses, words 0
    for no mask; scale [R, M]; width: elements a row; same: all sources have the storage type of out."""
    if not same:
        _apply_as(MIXED, kind, out, kinds, sources, words, scale, width, start, stop)
    elif kind == 0:
        _apply_as(BF16, kind, out, kinds, sources, words, scale, width, start, stop)
    elif kind == 1:
        _apply_as(FP16, kind, out, kinds, sources, words, scale, width, start, stop)
    else:
        _apply_as(FP32, kind, out, kinds, sources, words, scale, width, start, stop)


@inner
def _apply_as(storage, kind, out, kinds, sources, words, scale, width, start, stop):  # type: ignore[no-untyped-def]
    row = start // width
    for first in range(start, stop, LANES):
        bits = np.uint32(WHOLE) if stop - first >= LANES else np.uint32((1 << (stop - first)) - 1)
        while first >= (row + 1) * width:
            row += 1
        fused = _combine(storage, kinds, sources, words, scale[row], first, bits)
        after = (row + 1) * width
        while after < min(first + LANES, stop):  # the word holds the end of one row and the start of the next
            row += 1
            from_here = np.uint32(WHOLE << (after - first))
            fused = select(from_here, _combine(storage, kinds, sources, words, scale[row], first, bits), fused)
            after += width
        write(storage, kind, out, first, fused, bits)


@inner
def _combine(storage, kinds, sources, words, scale, first, bits):  # type: ignore[no-untyped-def]
    """32 fused values from element `first` on, with the coefficients of one row."""
    total, core = fill(np.float32(0)), fill(np.float32(0))
    once, twice = np.uint32(0), np.uint32(0)
    for m in range(len(sources)):
        values = read(storage, kinds[m], sources[m], first, bits)
        if scale[m] != 0:
            total = fma(values, scale[m], total)
        if words[m] != 0:
            held = read_word(words[m] + first // 8)
            core = select(held, values, core)
            twice |= once & held
            once |= held
    if twice != 0:
        core = select(twice, _mean(storage, kinds, sources, words, first, bits), core)
    return select(once, core, total)


@inner
def _mean(storage, kinds, sources, words, first, bits):  # type: ignore[no-untyped-def]
    """The mean of the holders of each element."""
    total, holders = fill(np.float32(0)), fill(np.float32(0))
    for m in range(len(sources)):
        if words[m] != 0:
            held = read_word(words[m] + first // 8)
            values = read(storage, kinds[m], sources[m], first, bits)
            total = select(held, add(total, values), total)
            holders = select(held, add(holders, fill(np.float32(1))), holders)
    return divide(total, holders)
