"""One pass over the models: what lies before a bracket is marked, what lies inside it is collected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..selection import nonfinite_update
from ..streaming import Ints
from .compiled import in_threads, inner, kernel
from .emit import LANES
from .mark import GROUPS, mark_four, mark_one, mark_some, mark_two
from .segments import Segments
from .storage import load_one_kind
from .words import bits_of, lowest_bit, occupied

ROOM = 1 << 17  # candidates that one call of the kernel returns for a task and k, before it is called again
SKIP = -1  # the high key of a bracket that needs no pass


@dataclass
class Candidates:
    """For one task and k: the number of elements before the bracket, and the candidates in linear order.

    keys, places (within their segment) [C]; per_segment [S]: candidates in each segment.
    """

    marked: int
    keys: NDArray[np.int32]
    places: NDArray[np.uint32]
    per_segment: Ints


def mark_all(segments: Segments, words: Ints, brackets: Ints) -> dict[tuple[int, int], Candidates]:
    """One pass over the models for every (task, k) that is not to be skipped."""
    items = list(segments.items(torch.get_num_threads()))
    parts = in_threads(lambda item: mark_item(item, segments, words, brackets), items)
    return {
        (task, k): Candidates(
            sum(part[task, k].marked for part in parts),
            np.concatenate([np.zeros(0, np.int32), *(part[task, k].keys for part in parts)]),
            np.concatenate([np.zeros(0, np.uint32), *(part[task, k].places for part in parts)]),
            np.concatenate([np.zeros(0, np.int64), *(part[task, k].per_segment for part in parts)]),
        )
        for task, k in wanted_of(brackets)
    }


def wanted_of(brackets: Ints) -> list[tuple[int, int]]:
    return [(int(task), int(k)) for task, k in np.argwhere(brackets[:, :, 0] != SKIP)]


def _groups(brackets: Ints) -> Ints:
    """[G, 2 + 4]: for each k the tasks to mark, four, two or one together."""
    rows = []
    for k in range(brackets.shape[1]):
        tasks = np.flatnonzero(brackets[:, k, 0] != SKIP).tolist()
        while tasks:
            size = next(size for size in GROUPS if size <= len(tasks))
            rows.append([k, size, *tasks[:size], *[0] * (4 - size)])
            tasks = tasks[size:]
    return np.array(rows, np.int64).reshape(-1, 6)


def mark_item(
    item: tuple[int, int], segments: Segments, words: Ints, brackets: Ints
) -> dict[tuple[int, int], Candidates]:
    """Mark the segments item[0]..item[1]-1."""
    shape = brackets.shape[:2]
    keys, places = np.empty((*shape, ROOM), np.int32), np.empty((*shape, ROOM), np.uint32)
    marked, per_segment = np.zeros(shape, np.int64), np.zeros((*shape, item[1] - item[0]), np.int64)
    place, bad = np.array([item[0], 0], np.int64), np.array([-1, -1], np.int64)
    wanted, groups = wanted_of(brackets), _groups(brackets)
    pieces: dict[tuple[int, int], list[tuple[NDArray[np.int32], NDArray[np.uint32]]]] = {w: [] for w in wanted}
    s = segments
    while place[0] < item[1]:
        held = np.zeros(shape, np.int64)
        _mark_segments(
            place, *item, s.chunk_size, s.numel, s.chunk, s.base, s.base_kind, s.tuned, s.tuned_kind, words, brackets,
            groups, keys, places, marked, held, per_segment, bad,
        )  # fmt: skip
        if bad[0] >= 0:
            raise nonfinite_update(int(s.tensor[bad[1]]), int(bad[0]))
        for w in wanted:
            pieces[w].append((keys[w][: held[w]].copy(), places[w][: held[w]].copy()))
    return {
        w: Candidates(
            int(marked[w]),
            pieces[w][0][0] if len(pieces[w]) == 1 else np.concatenate([keys for keys, _ in pieces[w]]),
            pieces[w][0][1] if len(pieces[w]) == 1 else np.concatenate([places for _, places in pieces[w]]),
            per_segment[w],
        )
        for w in wanted
    }


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


@inner
def _point_at_chunk(group, number, kind, start, base, tuned, tuned_kind, words, brackets, sources, masks, cuts):  # type: ignore[no-untyped-def]
    """Fill the tables of `mark_words` for one group; returns whether all models are stored as the base is."""
    k, same, size = group[0], True, 4 if kind == 2 else 2
    sources[0] = base + start * size
    for i in range(group[1]):
        task = group[2 + i]
        same = same and tuned_kind[task] == kind
        sources[1 + i] = tuned[task] + start * size
        masks[i] = words[task, k] + start // 8
        high, high_chunk, low, low_chunk = brackets[task, k]
        cuts[i, 0], cuts[i, 1] = high - (number < high_chunk), low - (number < low_chunk)
    return same


@inner
def _mark_whole(kind, size, sources, masks, inside, cuts, whole, counts):  # type: ignore[no-untyped-def]
    tables = sources.ctypes.data, masks.ctypes.data, inside.ctypes.data, cuts.ctypes.data
    if size == 4:
        return mark_four(kind, *tables, whole, counts.ctypes.data)
    if size == 2:
        return mark_two(kind, *tables, whole, counts.ctypes.data)
    return mark_one(kind, *tables, whole, counts.ctypes.data)


@kernel
def _mark_segments(  # type: ignore[no-untyped-def]
    place, first, last, chunk_size, numel, chunk, base, base_kind, tuned, tuned_kind, words, brackets,
    groups, keys, places, marked, held, found, bad,
):  # fmt: skip
    """Mark segments place[0]..last-1 from element place[1] on, until done or out of room; advances `place`.

    words [N, K, S]: addresses; brackets [N, K, 4]: high key, high chunk, low key, low chunk; groups [G, 2 + 4]: a k,
    the number of its tasks that are marked together (1, 2 or 4), and these; keys, places [N, K, ROOM]: the candidates
    and their position in their segment; marked, held [N, K], found [N, K, last - first] (candidates per segment):
    counters; bad [2]: task and segment of a NaN or Inf.
    """
    room = keys.shape[2] - chunk_size
    inside = np.zeros((4, (chunk_size // LANES + LANES - 1) // LANES * LANES), np.uint32)
    between = np.array([inside[i].ctypes.data for i in range(4)])
    sources, masks = np.empty(5, np.int64), np.empty(4, np.int64)
    cuts, counts = np.empty((4, 2), np.int32), np.empty(4, np.int64)
    for segment in range(place[0], last):
        kind, x0 = base_kind[segment], base[segment]
        for start in range(place[1], numel[segment], chunk_size):
            if held.max() > room:
                place[0], place[1] = segment, start
                return
            stop, number = min(start + chunk_size, numel[segment]), chunk[segment] + start // chunk_size
            if stop - start < chunk_size:
                inside[:] = 0  # words past the end hold the last chunk's candidates
            for group in groups:
                same = _point_at_chunk(
                    group, number, kind, start, x0, tuned[:, segment], tuned_kind[:, segment], words[:, :, segment],
                    brackets, sources, masks, cuts,
                )  # fmt: skip
                counts[:] = 0
                whole = (stop - start) // LANES if same else 0
                if not _mark_whole(kind, group[1], sources, masks, between, cuts, whole, counts):
                    whole, counts[:] = 0, 0  # once more, task by task, to tell which one it is
                for i in range(group[1]):
                    task, k, from_word = group[2 + i], group[0], start // LANES + whole
                    x, x_kind = tuned[task, segment], tuned_kind[task, segment]
                    rest, nonfinite = mark_some(
                        x_kind,
                        x,
                        kind,
                        x0,
                        from_word,
                        stop,
                        words[task, k, segment],
                        between[i] + 4 * whole,
                        cuts[i, 0],
                        cuts[i, 1],
                    )
                    if nonfinite:
                        bad[0], bad[1] = task, segment
                        return
                    before = held[task, k]
                    held[task, k] = _collect(
                        x_kind, x, kind, x0, start, inside[i], keys[task, k], places[task, k], before
                    )
                    found[task, k, segment - first] += held[task, k] - before
                    marked[task, k] += counts[i] + rest
        place[1] = 0
    place[0] = last
