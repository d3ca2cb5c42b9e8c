"""Selection over shards of the models: what the one who selects asks of each, and learns from it.

A sample of all tensors gives brackets, every shard marks what lies before them and keeps what lies within, its
candidates. Their number decides whether a bracket missed, and three histograms of theirs, of 11 bits of the key each,
what the smallest one taken is. Of equal ones those of earlier shards are taken first, which is linear order. So some
KiB a shard and region are exchanged, and the masks do not depend on how the tensors are cut into shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..streaming import CHUNK, Core, Ints, SelectionShard, cut
from .bracket import ATTEMPTS, brackets_from, elements_kept, sample_places
from .candidates import SKIP, wanted_of

DIGIT = 11  # bits of a key that one histogram tells apart
SHIFTS = (22, 11, 0)  # of the digits of a key, 31 bits
_AT_ONCE = 1 << 18  # keys that are looked at together
_Arrays = list[NDArray[Any]]
_Calls = Sequence[Callable[[], NDArray[Any]]]


def select_over(
    shards: Sequence[SelectionShard], counts: Sequence[int], side_by_side: bool = False
) -> list[list[Core]]:
    """See `cpift_kernels.select_over`."""
    if not side_by_side:
        return _selected(_Table(shards, _one_by_one), counts)
    with ThreadPoolExecutor(len(shards), thread_name_prefix="cpift-shards") as threads:
        return _selected(_Table(shards, partial(_together, threads)), counts)


def _one_by_one(calls: _Calls) -> _Arrays:
    return [call() for call in calls]


def _together(threads: ThreadPoolExecutor, calls: _Calls) -> _Arrays:
    return list(threads.map(lambda call: call(), calls))


def _sum(counts: _Arrays) -> Ints:
    total: Ints = np.sum(counts, axis=0, dtype=np.int64)
    return total


def _selected(table: _Table, counts: Sequence[int]) -> list[list[Core]]:
    tasks = table.tasks
    cores: dict[tuple[int, int], Core] = {}
    for attempt in range(ATTEMPTS):
        brackets = brackets_from(partial(table.sample, attempt), tasks, table.total, counts, attempt)
        for done in cores:
            brackets[done][0] = SKIP
        found = table.mark(brackets)
        for task, k in wanted_of(brackets):
            marked, held = found[task, k].tolist()
            kept = elements_kept(brackets[task, k], counts[k], marked, held)
            if kept == 0:
                cores[task, k] = Core(0, counts[k], math.inf)
            elif kept is not None:
                cores[task, k] = Core(kept, counts[k], table.settled(task, k, kept - marked))
        if len(cores) == tasks * len(counts):
            break
    return [[cores[task, k] for k in range(len(counts))] for task in range(tasks)]


class _Table:
    """The segments of all shards, one after another."""

    def __init__(self, shards: Sequence[SelectionShard], ask: Callable[[_Calls], _Arrays]):
        """ask: has every shard do something, and gives what each answers."""
        self._ask, self.tasks = ask, shards[0].tasks
        _, _, self._numel, self._chunk = cut([size for shard in shards for size in shard.sizes])
        ends = np.cumsum([len(cut(shard.sizes)[0]) for shard in shards]).tolist()
        self._shards = [(shard, first, last) for shard, first, last in zip(shards, [0, *ends], ends, strict=False)]
        self.total = int(self._numel.sum())

    def sample(self, seed: int) -> tuple[Ints, NDArray[np.int32]]:
        """Chunk [R] and keys [N, R, RUN] of sampled runs."""
        segment, start = sample_places(self._numel, seed)
        calls = []
        for shard, first, last in self._shards:
            mine = (segment >= first) & (segment < last)
            calls.append(partial(shard.sample, segment[mine] - first, start[mine]))
        return self._chunk[segment] + start // CHUNK, np.concatenate(self._ask(calls), 1)

    def mark(self, brackets: Ints) -> Ints:
        """int64 [N, K, 2], of all shards together."""
        calls = []
        for shard, first, last in self._shards:
            mine = brackets.copy()
            mine[..., 1::2] = np.maximum(mine[..., 1::2] - (self._chunk[first] if first < last else 0), 0)
            calls.append(partial(shard.mark, mine))
        return _sum(self._ask(calls))

    def settled(self, task: int, k: int, count: int) -> float:
        """Take the `count` largest candidates of a region, wherever they are; the smallest |Δ| among them."""

        def histograms(prefix: int, shift: int) -> Ints:
            calls = [partial(shard.histogram, task, k, prefix, shift) for shard, _, _ in self._shards]
            return _sum(self._ask(calls))

        least, ties = largest(histograms, count)
        for shard, _, _ in self._shards:
            ties = shard.settle(task, k, least, ties)
        return float(np.int32(least).view(np.float32))


def largest(histograms: Callable[[int, int], Ints], count: int) -> tuple[int, int]:
    """(the count-th largest key, how many of its equals are among the count largest), count 1..C."""
    prefix = 0
    for shift in SHIFTS:
        above = np.cumsum(histograms(prefix, shift)[::-1])  # of digits from the largest on
        place = int(np.searchsorted(above, count))
        count -= int(above[place - 1]) if place else 0
        prefix = prefix << DIGIT | (1 << DIGIT) - 1 - place
    return prefix, count


def histogram(keys: NDArray[np.int32], prefix: int, shift: int) -> Ints:
    """See `SelectionShard.histogram`; keys [C], maybe of a file."""
    found = np.zeros(1 << DIGIT, np.int64)
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        mine = part[part >> (shift + DIGIT) == prefix] if shift != SHIFTS[0] else part
        found += np.bincount((mine >> shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
    return found
