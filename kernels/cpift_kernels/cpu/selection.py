"""Exact global top-k of |θi − θ0| with one pass over the models.

1. A sample gives, for every task and k, a bracket around the k-th largest update (`bracket`).
2. One pass marks everything before the bracket in the mask and collects what lies inside it (the *candidates*, one or
   two thousandths of the elements), for all tasks and all k at once. |Δ| is never stored.
3. The missing elements are the largest candidates, exactly. If the counts show that a bracket missed, it is drawn
   again, wider, from a new sample, and the pass is repeated for it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..checks import words_for
from ..selection import CoreMask
from ..streaming import Ints
from .bracket import ATTEMPTS, draw_brackets, elements_kept
from .candidates import SKIP, Candidates, mark_all
from .compiled import in_threads, kernel
from .emit import LANES
from .order import kth_largest
from .segments import Segments
from .words import read_word, write_word


def select_cores(
    pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]], counts: Sequence[int]
) -> list[list[CoreMask]]:
    """See `cpift_kernels.select_cores`."""
    segments = Segments.of(pretrained, tuned)
    masks = [[_new_masks(pretrained) for _ in counts] for _ in tuned]
    words = np.array([[segments.word_addresses(mask) for mask in task] for task in masks], np.int64)
    words = words.reshape(len(tuned), len(counts), -1)
    cores: dict[tuple[int, int], CoreMask] = {}
    for attempt in range(ATTEMPTS):
        brackets = draw_brackets(segments, counts, attempt)
        for done in cores:
            brackets[done][0] = SKIP
        cores |= _mark_and_finish(segments, masks, words, counts, brackets)
        if len(cores) == len(tuned) * len(counts):
            break
    return [[cores[task, k] for k in range(len(counts))] for task in range(len(tuned))]


def _mark_and_finish(
    segments: Segments, masks: list[list[list[Tensor]]], words: Ints, counts: Sequence[int], brackets: Ints
) -> dict[tuple[int, int], CoreMask]:
    """One pass over the models; the cores of the tasks and k whose bracket did not miss."""
    candidates = mark_all(segments, words, brackets)

    def finish(key: tuple[int, int]) -> CoreMask | None:
        task, k = key
        return _finish(masks[task][k], counts[k], brackets[key], words[key], candidates[key])

    return {key: core for key, core in zip(candidates, in_threads(finish, candidates), strict=True) if core is not None}


def _new_masks(pretrained: Sequence[Tensor]) -> list[Tensor]:
    return [_new_mask(words_for(tensor.numel())) for tensor in pretrained]


def _new_mask(words: int) -> Tensor:
    if words == 0:
        return torch.empty(0, dtype=torch.int32)  # of stride 1, unlike an empty array from numpy
    return torch.from_numpy(np.empty(words, np.int32))  # numpy asks for huge pages, torch does not


def _finish(masks: list[Tensor], requested: int, bracket: Ints, words: Ints, candidates: Candidates) -> CoreMask | None:
    """Add the largest candidates to the mask; None if the bracket missed."""
    kept = elements_kept(bracket, requested, candidates.marked, len(candidates.keys))
    if kept is None:
        return None
    if kept == 0:
        return CoreMask(masks, 0, requested, math.inf)
    least = _set_largest(words, candidates.per_segment, candidates.keys, candidates.places, kept - candidates.marked)
    return CoreMask(masks, kept, requested, float(np.int32(least).view(np.float32)))


@kernel
def _set_largest(words, found, keys, places, count):  # type: ignore[no-untyped-def]
    """Set the bits of the `count` largest candidates, see `set_chosen`; returns the last one's key."""
    key, ties = kth_largest(keys, count)
    set_chosen(words, found, keys, places, key, ties)
    return key


@kernel
def set_chosen(words, found, keys, places, key, ties):  # type: ignore[no-untyped-def]
    """Set the bits of the candidates above `key` and of the first `ties` at it; returns the ties that are left.

    words [S]: addresses; found [S]: candidates a segment; keys, places [C]: of the candidates, in linear order.
    """
    i = 0
    for segment in range(found.shape[0]):
        for _ in range(found[segment]):
            tied = keys[i] == key
            chosen = (keys[i] > key) | (tied & (ties > 0))
            ties -= tied
            word, bit = words[segment] + places[i] // LANES * 4, places[i] % LANES
            write_word(word, np.uint32(read_word(word) | (np.uint32(chosen) << bit)))  # no branch to mispredict
            i += 1
    return max(ties, 0)
