"""Selection over shards of the models: what the one who selects asks of each, and learns from it.

A sample of all tensors gives brackets, every shard marks what lies before them and keeps what lies within, its
candidates. Their number decides whether a bracket missed, and three histograms of theirs, of 11 bits of the key each,
what the smallest one taken is. Of equal ones those of earlier shards are taken first, which is linear order. So some
KiB a shard and region are exchanged, and the masks do not depend on how the tensors are cut into shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..streaming import CHUNK, Core, Ints, SelectionShard, cut
from .bracket import ATTEMPTS, brackets_from, elements_kept, sample_places
from .candidates import SKIP, wanted_of

DIGIT = 11  # bits of a key that one histogram tells apart
SHIFTS = (22, 11, 0)  # of the digits of a key, 31 bits
_AT_ONCE = 1 << 18  # keys that are looked at together


def select_over(shards: Sequence[SelectionShard], counts: Sequence[int]) -> list[list[Core]]:
    """See `cpift_kernels.select_over`."""
    table, tasks = _Table(shards), shards[0].tasks
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
                cores[task, k] = Core(kept, counts[k], _settled(shards, task, k, kept - marked))
        if len(cores) == tasks * len(counts):
            break
    return [[cores[task, k] for k in range(len(counts))] for task in range(tasks)]


class _Table:
    """The segments of all shards, one after another."""

    def __init__(self, shards: Sequence[SelectionShard]):
        _, _, self._numel, self._chunk = cut([size for shard in shards for size in shard.sizes])
        ends = np.cumsum([len(cut(shard.sizes)[0]) for shard in shards]).tolist()
        self._shards = [(shard, first, last) for shard, first, last in zip(shards, [0, *ends], ends, strict=False)]
        self.total = int(self._numel.sum())

    def sample(self, seed: int) -> tuple[Ints, NDArray[np.int32]]:
        """Chunk [R] and keys [N, R, RUN] of sampled runs."""
        segment, start = sample_places(self._numel, seed)
        parts = []
        for shard, first, last in self._shards:
            mine = (segment >= first) & (segment < last)
            parts.append(shard.sample(segment[mine] - first, start[mine]))
        return self._chunk[segment] + start // CHUNK, np.concatenate(parts, 1)

    def mark(self, brackets: Ints) -> Ints:
        """int64 [N, K, 2], of all shards together."""
        found = np.zeros((*brackets.shape[:2], 2), np.int64)
        for shard, first, last in self._shards:
            mine = brackets.copy()
            mine[..., 1::2] = np.maximum(mine[..., 1::2] - (self._chunk[first] if first < last else 0), 0)
            found += shard.mark(mine)
        return found


def _settled(shards: Sequence[SelectionShard], task: int, k: int, count: int) -> float:
    """Take the `count` largest candidates of a region, wherever they are; the smallest |Δ| among them."""

    def histograms(prefix: int, shift: int) -> Ints:
        total = np.zeros(1 << DIGIT, np.int64)
        for shard in shards:
            total += shard.histogram(task, k, prefix, shift)
        return total

    least, ties = largest(histograms, count)
    for shard in shards:
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
