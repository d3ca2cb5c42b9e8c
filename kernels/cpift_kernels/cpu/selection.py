"""Exact global top-k of |θi − θ0| with one pass over the models.

1. A sample gives, for every task and k, a bracket around the k-th largest update (`bracket`).
2. One pass marks everything before the bracket in the mask and collects what lies inside it (the *candidates*, about
   0.2 % of the elements), for all tasks and all k at once. |Δ| is never stored.
3. The missing elements are the largest candidates, exactly. If the counts show that a bracket missed, it is drawn
   again, wider, from a new sample, and the pass is repeated for it alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import words_for
from ..selection import CoreMask, nonfinite_update
from .bracket import ATTEMPTS, LARGEST, draw_brackets, largest
from .compiled import in_threads, inner, kernel
from .segments import Ints, Segments
from .storage import load_kind, load_one_kind, load_some_kind
from .vector import BF16, FP16, FP32, LANES, above, larger, load, magnitude_bits, width, zeros
from .words import bits_of, lowest_bit, occupied, popcount, read_word, write_word

ROOM = 1 << 17  # candidates that one call of the kernel returns for a task and k, before it is called again
SKIP = -1  # the high key of a bracket that needs no pass


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
        for (task, k), found in _mark_all(segments, words, brackets).items():
            core = _finish(masks[task][k], counts[k], brackets[task, k], words[task, k], found)
            if core is not None:
                cores[task, k] = core
        if len(cores) == len(tuned) * len(counts):
            break
    return [[cores[task, k] for k in range(len(counts))] for task in range(len(tuned))]


def _new_masks(pretrained: Sequence[Tensor]) -> list[Tensor]:
    return [_new_mask(words_for(tensor.numel())) for tensor in pretrained]


def _new_mask(words: int) -> Tensor:
    if words == 0:
        return torch.empty(0, dtype=torch.int32)  # of stride 1, unlike an empty array from numpy
    return torch.from_numpy(np.empty(words, np.int32))  # numpy asks for huge pages, torch does not


@dataclass
class _Found:
    """For one task and k: the number of elements before the bracket, and the candidates in linear order.

    keys, places (within their segment) [C]; per_segment [S]: candidates in each segment.
    """

    marked: int
    keys: NDArray[np.int32]
    places: NDArray[np.uint32]
    per_segment: Ints


def _finish(masks: list[Tensor], requested: int, bracket: Ints, words: Ints, found: _Found) -> CoreMask | None:
    """Add the largest candidates to the mask; None if the bracket missed."""
    everything = bracket[2] == 0  # then the candidates reach down to the last element that moved
    kept = min(requested, found.marked + len(found.keys)) if everything else requested
    missing = kept - found.marked
    if kept == 0:
        return CoreMask(masks, 0, requested, math.inf)
    if not 0 < missing <= len(found.keys):
        return None
    chosen, least, _ = largest(found.keys, missing)
    _set_bits(words, found.per_segment, found.places, chosen)
    return CoreMask(masks, kept, requested, float(np.int32(least).view(np.float32)))


def _mark_all(segments: Segments, words: Ints, brackets: Ints) -> dict[tuple[int, int], _Found]:
    """One pass over the models for every (task, k) that is not to be skipped."""
    items = list(segments.items(torch.get_num_threads()))
    parts = in_threads(lambda item: _mark_item(item, segments, words, brackets), items)
    return {
        (task, k): _Found(
            sum(part[task, k].marked for part in parts),
            np.concatenate([np.zeros(0, np.int32), *(part[task, k].keys for part in parts)]),
            np.concatenate([np.zeros(0, np.uint32), *(part[task, k].places for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part[task, k].per_segment for part in parts)]),
        )
        for task, k in _wanted(brackets)
    }


def _wanted(brackets: Ints) -> list[tuple[int, int]]:
    return [(int(task), int(k)) for task, k in np.argwhere(brackets[:, :, 0] != SKIP)]


def _mark_item(item: tuple[int, int], segments: Segments, words: Ints, brackets: Ints) -> dict[tuple[int, int], _Found]:
    """Mark the segments item[0]..item[1]-1."""
    shape = brackets.shape[:2]
    keys, places = np.empty((*shape, ROOM), np.int32), np.empty((*shape, ROOM), np.uint32)
    marked, per_segment = np.zeros(shape, np.int64), np.zeros((*shape, item[1] - item[0]), np.int64)
    place, bad = np.array([item[0], 0], np.int64), np.array([-1, -1], np.int64)
    wanted = _wanted(brackets)
    pieces: dict[tuple[int, int], list[tuple[NDArray[np.int32], NDArray[np.uint32]]]] = {w: [] for w in wanted}
    s = segments
    while place[0] < item[1]:
        held = np.zeros(shape, np.int64)
        _mark_segments(
            place, *item, s.chunk_size, s.numel, s.chunk, s.base, s.base_kind, s.tuned, s.tuned_kind, words, brackets,
            keys, places, marked, held, per_segment, bad,
        )  # fmt: skip
        if bad[0] >= 0:
            raise nonfinite_update(int(s.tensor[bad[1]]), int(bad[0]))
        for w in wanted:
            pieces[w].append((keys[w][: held[w]].copy(), places[w][: held[w]].copy()))
    return {
        w: _Found(
            int(marked[w]),
            pieces[w][0][0] if len(pieces[w]) == 1 else np.concatenate([keys for keys, _ in pieces[w]]),
            pieces[w][0][1] if len(pieces[w]) == 1 else np.concatenate([places for _, places in pieces[w]]),
            per_segment[w],
        )
        for w in wanted
    }


@inner
def _compare(storage, x, x0, first, last, words, inside, high, low):  # type: ignore[no-untyped-def]
    """Mask words first..last-1, all whole: `words` (> high) and, from its start, `inside` (> low and not > high)."""
    marked, peak, step = 0, zeros(), LANES * width(storage)
    for word in range(first, last):
        key = magnitude_bits(load(storage, x + word * step), load(storage, x0 + word * step))
        selected = above(key, high)
        peak = larger(key, peak)
        write_word(words + 4 * word, selected)
        write_word(inside + 4 * (word - first), above(key, low) ^ selected)
        marked += popcount(selected)
    return marked, above(peak, LARGEST)


@inner
def _compare_mixed(kind, x, kind0, x0, first, stop, words, inside, high, low):  # type: ignore[no-untyped-def]
    """`_compare` for any two storage types, up to element `stop`: the last word need not be whole."""
    marked, peak = 0, zeros()
    for word in range(first, (stop + LANES - 1) // LANES):
        element = word * LANES
        if stop - element >= LANES:
            key = magnitude_bits(load_kind(kind, x, element), load_kind(kind0, x0, element))
        else:
            bits = np.uint32((1 << (stop - element)) - 1)
            key = magnitude_bits(load_some_kind(kind, x, element, bits), load_some_kind(kind0, x0, element, bits))
        selected = above(key, high)
        peak = larger(key, peak)
        write_word(words + 4 * word, selected)
        write_word(inside + 4 * (word - first), above(key, low) ^ selected)
        marked += popcount(selected)
    return marked, above(peak, LARGEST)


@inner
def _compare_chunk(kind, x, kind0, x0, start, stop, words, inside, high, low):  # type: ignore[no-untyped-def]
    """(marked, nonfinite) of the elements start..stop-1, one chunk; see `_compare`."""
    marked, nonfinite, first = 0, np.uint32(0), start // LANES
    whole = stop // LANES if kind == kind0 else first
    if whole > first:
        if kind == 0:
            marked, nonfinite = _compare(BF16, x, x0, first, whole, words, inside, high, low)
        elif kind == 1:
            marked, nonfinite = _compare(FP16, x, x0, first, whole, words, inside, high, low)
        else:
            marked, nonfinite = _compare(FP32, x, x0, first, whole, words, inside, high, low)
    rest = inside + 4 * (whole - first)
    more, bad = _compare_mixed(kind, x, kind0, x0, whole, stop, words, rest, high, low)
    return marked + more, nonfinite | bad


@inner
def _collect(kind, x, kind0, x0, start, inside, keys, places, held):  # type: ignore[no-untyped-def]
    """Append the candidates of one chunk, the set bits of `inside`; returns the number held."""
    for group in range(0, len(inside), LANES):
        words = occupied(inside.ctypes.data + 4 * group)
        while words != 0:
            word = group + lowest_bit(words)
            words = np.uint32(words & (words - np.uint32(1)))
            bits = inside[word]
            while bits != 0:
                place = start + LANES * word + lowest_bit(bits)
                keys[held] = bits_of(abs(load_one_kind(kind, x, place) - load_one_kind(kind0, x0, place)))
                places[held] = place
                held += 1
                bits = np.uint32(bits & (bits - np.uint32(1)))
    return held


@kernel
def _mark_segments(  # type: ignore[no-untyped-def]
    place, first, last, chunk_size, numel, chunk, base, base_kind, tuned, tuned_kind, words, brackets,
    keys, places, marked, held, found, bad,
):  # fmt: skip
    """Mark segments place[0]..last-1 from element place[1] on, until done or out of room; advances `place`.

    words [N, K, S]: addresses; brackets [N, K, 4]: high key, high chunk, low key, low chunk, or a high key of -1 for
    nothing to do; keys, places [N, K, ROOM]: the candidates and their position in their segment; marked [N, K],
    held [N, K], found [N, K, last - first] (candidates per segment): counters; bad [2]: task and segment of a NaN or
    Inf.
    """
    room = keys.shape[2] - chunk_size
    inside = np.zeros((chunk_size // LANES + LANES - 1) // LANES * LANES, np.uint32)
    for segment in range(place[0], last):
        x0, kind0 = base[segment], base_kind[segment]
        for start in range(place[1], numel[segment], chunk_size):
            if held.max() > room:
                place[0], place[1] = segment, start
                return
            stop = min(start + chunk_size, numel[segment])
            number = chunk[segment] + start // chunk_size
            if stop - start < chunk_size:
                inside[:] = 0  # words past the end hold the last chunk's candidates
            for task in range(brackets.shape[0]):
                x, kind = tuned[task, segment], tuned_kind[task, segment]
                for k in range(brackets.shape[1]):
                    high, high_chunk, low, low_chunk = brackets[task, k]
                    if high < 0:
                        continue
                    high -= number < high_chunk
                    low -= number < low_chunk
                    count, nonfinite = _compare_chunk(
                        kind, x, kind0, x0, start, stop, words[task, k, segment], inside.ctypes.data, high, low
                    )
                    if nonfinite:
                        bad[0], bad[1] = task, segment
                        return
                    before = held[task, k]
                    held[task, k] = _collect(kind, x, kind0, x0, start, inside, keys[task, k], places[task, k], before)
                    found[task, k, segment - first] += held[task, k] - before
                    marked[task, k] += count
        place[1] = 0
    place[0] = last


@kernel
def _set_bits(words, found, places, chosen):  # type: ignore[no-untyped-def]
    """Set the bits of the chosen candidates: words [S] addresses, found [S] candidates a segment, in order."""
    i = 0
    for segment in range(found.shape[0]):
        for _ in range(found[segment]):
            word, bit = words[segment] + places[i] // LANES * 4, places[i] % LANES
            write_word(word, np.uint32(read_word(word) | (np.uint32(chosen[i]) << bit)))  # no branch to mispredict
            i += 1
