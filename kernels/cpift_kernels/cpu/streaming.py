"""Selection in phases on the CPU.

    sample runs of all models, for brackets around every threshold
    mark   any range of segments, in any order, anywhere: the mask before the bracket, and the candidates
    settle the largest candidates join the mask; where a bracket missed, sample and mark again, wider

`sharded` has the order of these, for one shard or many. Counts are sums and candidates are joined in the order of the
segments, so the masks are those of `select_cores`, bit for bit, whoever marked what.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..flat import Flat
from ..placement import Placement
from ..streaming import CHUNK, Core, Ints, Mark, Marked, Masks, Models, Range, Selection, SelectionShard
from .bracket import RUN
from .candidates import Candidates, mark_item, wanted_of
from .compiled import in_threads
from .segments import Segments, storage_kind
from .selection import set_chosen
from .sharded import histogram, select_over


def stream_cores(
    models: Models, counts: Sequence[int], place: Placement, held: bool | Sequence[Flat] = False
) -> Selection:
    """See `cpift_kernels.stream_cores`."""
    return BracketSelection(models, counts)


class BracketSelection(Selection):
    """By brackets around every threshold, so that one pass over the models is enough, and no |Δ| is kept."""

    def sample(self, segment: Ints, start: Ints) -> NDArray[np.int32]:
        """See `SelectionShard.sample`."""
        tensor, place = self._tensor[segment], self._start[segment] + start
        keys = np.empty((self.models.tasks, len(segment), RUN), np.int32)
        edges = np.flatnonzero(np.diff(tensor, prepend=-1, append=-1))
        for first, last in pairwise(edges):
            at = slice(first, last)
            base = self.models.gather(0, int(tensor[first]), place[at], RUN)
            for task in range(self.models.tasks):
                values = self.models.gather(task + 1, int(tensor[first]), place[at], RUN)
                keys[task, at] = (values - base).abs().view(torch.int32).numpy()
            self.models.release(int(tensor[first]), 0, self.models.sizes[int(tensor[first])])
        keys *= np.arange(RUN) < (self._numel[segment] - start)[:, None]
        return keys

    def mark(self, part: Range, brackets: Ints, masks: Masks) -> dict[tuple[int, int], Candidates]:
        """Its mask words go to `masks`; the result counts and holds the candidates."""
        first, last = part
        window, held = self._window(part)
        sizes = (window.numel + 31) // 32
        words = np.empty((self.models.tasks, len(self.counts), int(sizes.sum())), np.uint32)
        offsets = np.cumsum(sizes) - sizes
        addresses = np.array([[row.ctypes.data for row in task] for task in words], np.int64)[:, :, None] + 4 * offsets
        candidates = mark_item((0, last - first), window, addresses, brackets)
        del held
        for tensor, start, stop in self.pieces(part):
            at = int(offsets[np.flatnonzero(window.tensor == tensor)[0]])
            for task, k in candidates:
                masks.store(task, k, tensor, start // 32, words[task, k, at : at + (stop - start + 31) // 32])
            self.models.release(tensor, start, stop)
        return candidates

    def _window(self, part: Range) -> tuple[Segments, list[Tensor]]:
        """The segments of a range, loaded; and the tensors, which must outlive it."""
        at, models = slice(*part), self.models.tasks + 1
        kind, address = np.empty((models, part[1] - part[0]), np.int64), np.empty((models, part[1] - part[0]), np.int64)
        held = []
        for tensor, start, stop in self.pieces(part):
            mine = np.flatnonzero(self._tensor[at] == tensor)
            for model in range(models):
                values = self.models.load(model, tensor, start, stop)
                held.append(values)
                kind[model, mine] = storage_kind(values)
                offset = (self._start[at][mine] - start) * values.element_size()
                address[model, mine] = values.data_ptr() + offset
        window = Segments(
            CHUNK, self._tensor[at], self._start[at], self._numel[at], self._chunk[at],
            address[0], kind[0], address[1:], kind[1:],
        )  # fmt: skip
        return window, held

    def marking(self, masks: Masks) -> Mark:
        """By this process's threads, a few ranges at once."""

        def mark(ranges: Sequence[Range], brackets: Ints) -> Iterator[Marked]:
            width = 2 * max(torch.get_num_threads(), 1)
            for at in range(0, len(ranges), width):
                for part in ranges[at + width : at + 2 * width]:
                    for piece in self.pieces(part):
                        self.models.prefetch(*piece)
                yield from in_threads(lambda part: self.mark(part, brackets, masks), ranges[at : at + width])

        return mark

    def shard(
        self, masks: Masks, ranges: Sequence[Range], mark: Mark | None = None, spill: Path | None = None
    ) -> AbstractContextManager[SelectionShard]:
        return _Shard(self, masks, ranges, mark or self.marking(masks), spill)

    def select(
        self, masks: Masks, ranges: Sequence[Range], mark: Mark | None = None, spill: Path | None = None
    ) -> list[list[Core]]:
        with self.shard(masks, ranges, mark, spill) as shard:
            return select_over([shard], self.counts)

    def set_largest(self, task: int, k: int, pool: Pool, least: int, ties: int, masks: Masks) -> int:
        """Add the largest candidates to a mask, see `SelectionShard.settle`."""
        for (first, last), keys, places, per_segment in pool.pieces():
            at = zip(self._tensor[first:last].tolist(), self._start[first:last].tolist(), strict=True)
            held = {tensor: masks.words(task, k, tensor) for tensor in dict.fromkeys(self._tensor[first:last].tolist())}
            words = np.array([held[tensor].ctypes.data + start // 8 for tensor, start in at], np.int64)
            ties = int(set_chosen(words, per_segment, keys, places, least, ties))
        return ties


class _Shard:
    """All tensors of a selection (`SelectionShard`), their candidates in memory or in nameless files of `spill`."""

    def __init__(
        self, selection: BracketSelection, masks: Masks, ranges: Sequence[Range], mark: Mark, spill: Path | None
    ):
        self._selection, self._masks, self._ranges, self._mark = selection, masks, ranges, mark
        self._spill, self._pools, self._files = spill, dict[tuple[int, int], Pool](), ExitStack()

    @property
    def sizes(self) -> Sequence[int]:
        return self._selection.models.sizes

    @property
    def tasks(self) -> int:
        return self._selection.models.tasks

    def sample(self, segment: Ints, start: Ints) -> NDArray[np.int32]:
        return self._selection.sample(segment, start)

    def mark(self, brackets: Ints) -> Ints:
        self._files.close()
        self._pools = {wanted: Pool(self._files, self._spill) for wanted in wanted_of(brackets)}
        for part, marked in zip(self._ranges, self._mark(self._ranges, brackets), strict=True):
            for wanted, piece in marked.items():
                self._pools[wanted].add(part, piece)
        found = np.zeros((*brackets.shape[:2], 2), np.int64)
        for wanted, pool in self._pools.items():
            found[wanted] = pool.marked, pool.held
        return found

    def histogram(self, task: int, k: int, prefix: int, shift: int) -> Ints:
        return histogram(self._pools[task, k].keys, prefix, shift)

    def settle(self, task: int, k: int, least: int, ties: int) -> int:
        return self._selection.set_largest(task, k, self._pools.pop((task, k)), least, ties, self._masks)

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *error: object) -> None:
        self._pools.clear()
        self._files.close()


@dataclass
class Pool:
    """The candidates of one task and k in linear order, in memory or in a nameless file."""

    stack: ExitStack
    folder: Path | None
    marked: int = 0
    held: int = 0
    _parts: list[tuple[Range, int, Ints]] = field(default_factory=list)
    _keys: list[NDArray[np.int32]] = field(default_factory=list)
    _places: list[NDArray[np.uint32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._files = [self._file(), self._file()] if self.folder else None

    def _file(self) -> Any:
        return self.stack.enter_context(tempfile.TemporaryFile(dir=self.folder))

    def add(self, part: Range, candidates: Candidates) -> None:
        self.marked += candidates.marked
        self.held += len(candidates.keys)
        self._parts.append((part, len(candidates.keys), candidates.per_segment))
        if self._files:
            candidates.keys.tofile(self._files[0])
            candidates.places.tofile(self._files[1])
        else:
            self._keys.append(candidates.keys)
            self._places.append(candidates.places)

    @cached_property
    def keys(self) -> NDArray[np.int32]:
        """[C]"""
        if self._files:
            return _mapped(self._files[0], np.int32, self.held)
        return np.concatenate([np.zeros(0, np.int32), *self._keys])

    def pieces(self) -> Iterator[tuple[Range, NDArray[np.int32], NDArray[np.uint32], Ints]]:
        """Range, keys, places and candidates in each segment, range by range."""
        places = (
            _mapped(self._files[1], np.uint32, self.held)
            if self._files
            else np.concatenate([np.zeros(0, np.uint32), *self._places])
        )
        at = 0
        for part, count, per_segment in self._parts:
            yield part, self.keys[at : at + count], places[at : at + count], per_segment
            at += count


def _mapped(file: Any, dtype: Any, count: int) -> NDArray[Any]:
    if count == 0:
        return np.zeros(0, dtype)
    file.flush()
    return np.asarray(np.memmap(file, dtype, "r+", shape=(count,)))  # writable, as the kernels are compiled for
