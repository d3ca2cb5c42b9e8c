"""Overlap counts and conflict resolution on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..masks import copy_mask
from ..overlap import ConflictPolicy
from .compiled import in_threads, inner, kernel
from .emit import LANES
from .segments import storage_kind
from .storage import MIXED, WHOLE, read
from .vector import exceeds, fill, magnitude, select, total_of, zeros
from .words import count_common, popcount, read_word, write_word

SPAN = 1 << 17  # words of one mask that one call reads
BLOCK = 1 << 9  # words of each mask that stay in the L1 cache while all pairs are counted
MAGNITUDE, LAST = 0, 1


def overlap_counts_per_tensor(masks: Sequence[Sequence[Tensor]]) -> Tensor:
    """See `cpift_kernels.overlap_counts_per_tensor`."""
    tasks, tensors = len(masks), len(masks[0])
    addresses = np.array([[words.data_ptr() for words in task] for task in masks], np.int64).reshape(tasks, tensors)
    sizes = [words.numel() for words in masks[0]]
    spans = [(t, start, min(start + SPAN, n)) for t, n in enumerate(sizes) for start in range(0, n, SPAN)]

    def count(span: tuple[int, int, int]) -> np.ndarray:
        tensor, start, stop = span
        part = np.zeros((tasks, tasks), np.int64)
        _count_pairs(np.ascontiguousarray(addresses[:, tensor]), start, stop, part)
        return part

    counts = np.zeros((tensors, tasks, tasks), np.int64)
    for (tensor, _, _), part in zip(spans, in_threads(count, spans), strict=True):
        counts[tensor] += part
    return torch.from_numpy(counts)


@kernel
def _count_pairs(masks, start, stop, counts):  # type: ignore[no-untyped-def]
    """Add |Ci ∩ Cj| over the words start..stop-1 to counts [N, N]; masks [N]: addresses."""
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        for i in range(len(masks)):
            for j in range(i, len(masks)):
                common, whole = zeros(), first + (last - first) // LANES * LANES
                for word in range(first, whole, LANES):
                    common = count_common(masks[i] + 4 * word, masks[j] + 4 * word, common)
                total = total_of(common)
                for word in range(whole, last):
                    total += popcount(read_word(masks[i] + 4 * word) & read_word(masks[j] + 4 * word))
                counts[i, j] += total
                if i != j:
                    counts[j, i] += total


def resolve_conflicts(
    policy: ConflictPolicy, pretrained: Tensor, tuned: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Tensor]:
    """See `cpift_kernels.resolve_conflicts`."""
    resolved = [copy_mask(words) for words in masks]
    if policy == "mean":
        return resolved
    kinds = np.array([storage_kind(x) for x in (pretrained, *tuned)], np.int64)
    addresses = np.array([x.data_ptr() for x in (pretrained, *tuned)], np.int64)
    words = np.array([mask.data_ptr() for mask in resolved], np.int64)
    code, numel = (MAGNITUDE if policy == "magnitude" else LAST), pretrained.numel()
    in_threads(
        lambda start: _resolve(code, kinds, addresses, words, start, min(start + SPAN, masks[0].numel()), numel),
        range(0, masks[0].numel(), SPAN),
    )
    return resolved


@kernel
def _resolve(policy, kinds, addresses, masks, start, stop, numel):  # type: ignore[no-untyped-def]
    """Resolve the words start..stop-1 in place; kinds, addresses [N + 1] (base first), masks [N] addresses."""
    for word in range(start, stop):
        once, twice = np.uint32(0), np.uint32(0)
        for mask in masks:
            held = read_word(mask + 4 * word)
            twice = np.uint32(twice | (once & held))
            once = np.uint32(once | held)
        if twice != 0:
            if policy == MAGNITUDE:
                rest = numel - word * LANES
                bits = np.uint32(WHOLE) if rest >= LANES else np.uint32((1 << rest) - 1)
                _keep_largest(kinds, addresses, masks, word, bits)
            else:
                _keep_last(masks, word)


@inner
def _keep_last(masks, word):  # type: ignore[no-untyped-def]
    later = np.uint32(0)
    for i in range(len(masks) - 1, -1, -1):
        held = read_word(masks[i] + 4 * word)
        write_word(masks[i] + 4 * word, np.uint32(held & ~later))
        later = np.uint32(later | held)


@inner
def _keep_largest(kinds, addresses, masks, word, bits):  # type: ignore[no-untyped-def]
    base = read(MIXED, kinds[0], addresses[0], word * LANES, bits)
    best = fill(np.float32(-1))
    for i in range(len(masks)):
        held = read_word(masks[i] + 4 * word)
        claim = magnitude(read(MIXED, kinds[i + 1], addresses[i + 1], word * LANES, bits), base)
        takes = np.uint32(held & exceeds(claim, best))
        best = select(takes, claim, best)
        for j in range(i):
            write_word(masks[j] + 4 * word, np.uint32(read_word(masks[j] + 4 * word) & ~takes))
        write_word(masks[i] + 4 * word, takes)
