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

from .compiled import in_threads, kernel
from .emit import LANES
from .segments import Ints, Segments
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
    fractions = [count / total for count in counts]
    errors = 4.0 * 4**attempt
    return np.array(in_threads(lambda task: _bracket_task(task, chunk, fractions, errors), keys)).reshape(
        -1, len(counts), 4
    )


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


def _bracket_task(keys: NDArray[np.int32], chunk: Ints, fractions: Sequence[float], errors: float) -> Ints:
    """The brackets [K, 4] of one task, `errors` standard errors to either side of the sampled quantiles.

    The error of a rank is that of a sample of whole runs, since neighbours often move together.
    """
    size, brackets = keys.size, np.zeros((len(fractions), 4), np.int64)
    for k, fraction in enumerate(fractions):
        brackets[k, 0] = LARGEST
        if fraction == 0.0:
            brackets[k, 2] = LARGEST
            continue
        rank = min(int(fraction * size), size - 1)
        top, where = _largest_sampled(keys, min(2 * rank + 1024, size))  # usually all that the bracket needs
        chosen = largest(top, rank)[0]
        per_run = np.bincount(where[chosen] // RUN, minlength=len(keys))
        variance = max(float(per_run.var()) * len(keys), rank * (1 - rank / size))
        margin = int(errors * math.sqrt(variance)) + 8
        if rank + margin > len(top):
            top, where = _largest_sampled(keys, min(rank + margin, size))
        if rank > margin:
            key, at = largest(top, rank - margin)[1:]
            brackets[k, :2] = (key, chunk[where[at] // RUN]) if key else (0, 0)
        if rank + margin < size:
            key, at = largest(top, rank + margin)[1:]
            brackets[k, 2:] = (key, chunk[where[at] // RUN] + 1) if key else (0, 0)
    return brackets


def _largest_sampled(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.int32], Ints]:
    """At least the `count` largest of the sampled keys, in their order, and where they are."""
    flat = np.minimum(keys.reshape(-1), np.int32(LARGEST))
    where = np.flatnonzero(flat >= largest(flat, count)[1])
    return flat[where], where


def largest(keys: NDArray[np.int32], count: int) -> tuple[NDArray[np.bool_], int, int]:
    """The `count` largest of non-negative keys, ties to the earlier ones: who they are [C], the last one's key and
    index (0 and -1 if count is 0). In linear time whatever the ties, unlike numpy's partition."""
    if count == 0:
        return np.zeros(len(keys), np.bool_), 0, -1
    key, ties = _kth_largest(keys, count)
    chosen = keys > key
    equal = np.flatnonzero(keys == key)[:ties]
    chosen[equal] = True
    return chosen, int(key), int(equal[-1])


@kernel
def _kth_largest(keys, count):  # type: ignore[no-untyped-def]
    """(the count-th largest key, how many of its equals are among the count largest); radix 2**11 on their range."""
    histogram = np.empty((4, 1 << 11), np.int64)  # four, since an increment waits for the one before it in its place
    least, bits, prefix, rest = keys.min(), 0, 0, count
    span = keys.max() - least
    while span >> bits:
        bits += 1
    while bits > 0:
        shift = max(bits - 11, 0)
        digit = (1 << (bits - shift)) - 1
        histogram[:] = 0
        for i in range(len(keys)):
            offset = keys[i] - least
            if offset >> bits == prefix:
                histogram[i & 3, (offset >> shift) & digit] += 1
        while histogram[:, digit].sum() < rest:
            rest -= histogram[:, digit].sum()
            digit -= 1
        prefix, bits = prefix << (bits - shift) | digit, shift
    return least + prefix, rest
