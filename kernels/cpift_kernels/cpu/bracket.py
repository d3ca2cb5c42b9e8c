"""Where the k-th largest update lies, from a sample.

The updates of a task are ordered by (|Δ| descending, position ascending), positions being counted in whole chunks. A
point (key, chunk) of that order, key = the fp32 bits of |Δ|, stands after every update with a larger key and after
those with an equal key in chunks of a smaller number. Ties then cost nothing: within one chunk an update lies before
the point if and only if its key exceeds one number, `key` or `key - 1`. A bracket is two points, `high` and `low`; its
candidates lie between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..streaming import Ints
from .compiled import in_threads, inner, kernel
from .emit import LANES
from .order import kth_largest, point
from .segments import Segments
from .storage import MIXED, WHOLE, read
from .vector import magnitude_bits, write_ints

RUN = LANES  # consecutive elements sampled together
ALL = 1 << 16  # models up to this size need no sample: every element that moved is a candidate
LARGEST = 0x7F7FFFFF  # bits of the largest finite fp32
ATTEMPTS = 4  # brackets of 4, 16 and 64 standard errors; the last holds every element that moved


@kernel
def _sample_runs(first_run, last_run, segment, start, numel, base, base_kind, tuned, tuned_kind, keys):  # type: ignore[no-untyped-def]
    """keys [N, R, RUN]: bits of |Δ| of the RUN elements from start[r] of segment[r] on, 0 past the segment's end."""
    for task in range(keys.shape[0]):
        for run in range(first_run, last_run):
            s, first = segment[run], start[run]
            rest = min(RUN, numel[s] - first)
            bits = np.uint32(WHOLE) if rest == RUN else np.uint32((1 << rest) - 1)
            x = read(MIXED, tuned_kind[task, s], tuned[task, s], first, bits)
            x0 = read(MIXED, base_kind[s], base[s], first, bits)
            write_ints(keys[task, run].ctypes.data, magnitude_bits(x, x0))


def draw_brackets(segments: Segments, counts: Sequence[int], attempt: int) -> Ints:
    """Brackets [N, K, 4] (high key, high chunk, low key, low chunk) around the `counts[k]`-th largest update.

    Each attempt samples anew and draws wider; the last of ATTEMPTS cannot miss.
    """
    return brackets_from(lambda: _sample(segments, seed=attempt), len(segments.tuned), segments.total, counts, attempt)


def brackets_from(
    sample: Callable[[], tuple[Ints, NDArray[np.int32]]], tasks: int, total: int, counts: Sequence[int], attempt: int
) -> Ints:
    """`draw_brackets` of `tasks` models of `total` elements; `sample` gives chunk [R] and keys [N, R, RUN]."""
    if total <= ALL or attempt == ATTEMPTS - 1:
        widest = [[LARGEST, 0, 0 if count else LARGEST, 0] for count in counts]
        return np.array([widest] * tasks, np.int64).reshape(-1, len(counts), 4)
    chunk, keys = sample()
    np.minimum(keys, np.int32(LARGEST), out=keys)  # a NaN or Inf is found by the pass
    brackets = np.full((len(keys), len(counts), 4), (LARGEST, 0, LARGEST, 0), np.int64)
    size, errors = keys[0].size, 4.0 * 4**attempt
    ranks = [min(int(count / total * size), size - 1) for count in counts]
    in_threads(
        lambda where: _bracket_task(keys[where[0]], chunk, ranks[where[1]], errors, brackets[where]),
        [(task, k) for task in range(len(keys)) for k in range(len(counts)) if counts[k]],
    )
    return brackets


def sample_places(numel: Ints, seed: int) -> tuple[Ints, Ints]:
    """Segment [R] and start within it [R] of one run at a random place of each of R equal strata of the positions.

    numel [S]: elements of each segment.
    """
    total = int(numel.sum())
    runs = min(max(total // 512, 1 << 16), 1 << 21) // RUN
    place = ((np.arange(runs) + np.random.default_rng(seed).random(runs)) * (total / runs)).astype(np.int64)
    begin = np.cumsum(numel) - numel
    segment = np.searchsorted(begin, np.minimum(place, total - 1), side="right") - 1
    return segment, np.maximum(np.minimum(place - begin[segment], numel[segment] - RUN), 0)


def _sample(segments: Segments, seed: int) -> tuple[Ints, NDArray[np.int32]]:
    """The sampled runs: chunk [R] and keys [N, R, RUN]."""
    segment, start = sample_places(segments.numel, seed)
    runs = len(segment)
    keys = np.empty((len(segments.tuned), runs, RUN), np.int32)
    s, step = segments, 1 << 10
    in_threads(
        lambda r: _sample_runs(
            r, min(r + step, runs), segment, start, s.numel, s.base, s.base_kind, s.tuned, s.tuned_kind, keys
        ),
        range(0, runs, step),
    )
    return segments.chunk[segment] + start // segments.chunk_size, keys


@kernel
def _bracket_task(keys, chunk, rank, errors, bracket):  # type: ignore[no-untyped-def]
    """The bracket [4] of one task, `errors` standard errors to either side of the sampled key of a rank.

    The error of a rank is that of a sample of whole runs, since neighbours often move together. Only the larger keys
    are looked at closely, which are few as long as k is.
    """
    size, flat = keys.size, keys.reshape(-1)
    top, where = _at_least(flat, kth_largest(flat, min(2 * rank + 1024, size))[0])
    margin = int(errors * math.sqrt(max(_spread(top, where, rank, len(keys)), rank * (1 - rank / size)))) + 8
    if rank + margin > len(top):
        top, where = _at_least(flat, kth_largest(flat, min(rank + margin, size))[0])
    bracket[:] = LARGEST, 0, 0, 0
    if rank > margin:
        key, at = point(top, rank - margin)
        bracket[0], bracket[1] = key, chunk[where[at] // RUN] if key > 0 else 0
    if rank + margin < size:
        key, at = point(top, rank + margin)
        bracket[2], bracket[3] = key, chunk[where[at] // RUN] + 1 if key > 0 else 0


@inner
def _at_least(keys, least):  # type: ignore[no-untyped-def]
    """The keys of `least` or more, in their order, and where they are."""
    where = np.flatnonzero(keys >= least)
    return keys[where], where


@inner
def _spread(top, where, rank, runs):  # type: ignore[no-untyped-def]
    """The variance of the number of a sample's `rank` largest keys, if it were of other runs."""
    key, ties = kth_largest(top, rank)
    per_run = np.zeros(runs, np.int64)
    for i in range(len(top)):
        tied = top[i] == key
        per_run[where[i] // RUN] += top[i] > key or (tied and ties > 0)
        ties -= tied
    return per_run.var() * runs


def elements_kept(bracket: Ints, requested: int, marked: int, candidates: int) -> int | None:
    """The size of a region, of which `marked` elements lie before its bracket; None if the bracket missed."""
    everything = bracket[2] == 0  # then the candidates reach down to the last element that moved
    kept = min(requested, marked + candidates) if everything else requested
    return kept if kept == 0 or 0 < kept - marked <= candidates else None
