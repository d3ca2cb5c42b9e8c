"""Selection over models that lie in GPU memory, all tensors of each in one buffer (`flat`).

A pass takes as many elements as its results have room for on the host: up to eight models are marked in one launch and
their candidates collected in another, whatever the number of tensors, and counts, masks and candidates come back in one
copy, with one wait. Candidates are collected into room for CANDIDATES of the elements before anybody has counted them;
where there are more, they are collected once more, with another wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cpu.bracket import RUN
from ..cpu.candidates import Candidates, wanted_of
from ..cpu.streaming import BracketSelection
from ..flat import PAD, Flat
from ..placement import Lane, Placement
from ..streaming import CHUNK, SEGMENT, Ints, Mark, Masks, Models, Range
from .bracket import NOTHING, Bracket, cut_tables
from .common import elements
from .flat import collect_all
from .selection import BLOCK, GROUP, blame, launch_mark

CANDIDATES = 1 / 128  # of a region's elements, for which there is room; a sample of a million leaves 1/800 to 1/200
ROOM = 1 << 16  # candidates for which there is room at least

Found = dict[tuple[int, int], Candidates]  # by task and k


@dataclass(frozen=True)
class _Window:
    """The elements start..stop-1 of buffers, in which the `segments` of one range lie, by their numbers in it."""

    flat: Flat
    segments: Ints
    start: int
    stop: int


@dataclass
class _Marked:
    """A launch over the models of some tasks: upper masks and candidates of each of its regions."""

    window: _Window
    regions: list[tuple[int, int]]
    models: list[Tensor]
    upper: Tensor
    lower: Tensor
    ranks: Tensor
    counts: Tensor  # [blocks, regions]: above the upper cut | those above the lower one << 16
    faults: Tensor
    keys: Tensor
    places: Tensor

    @property
    def results(self) -> list[Tensor]:
        return [one.view(-1) for one in (self.faults, self.counts, self.upper, self.keys, self.places)]


@dataclass(frozen=True)
class _Part:
    """What is found of a region in one window: elements above the upper cut, and candidates in linear order."""

    segments: Ints
    per_segment: Ints
    sure: int
    keys: NDArray[np.int32]
    places: NDArray[np.int32]


class FlatSelection(BracketSelection):
    """Marks models that lie on the device of `place`, in buffers that have every tensor of a selection once."""

    def __init__(self, models: Models, counts: Sequence[int], place: Placement, flats: Sequence[Flat]):
        super().__init__(models, counts)
        self._place, self._flats = place, flats

    @cached_property
    def _at(self) -> tuple[Ints, Ints]:
        """Of each segment [S] which of the buffers it lies in, and where it begins there."""
        group, start = np.zeros(len(self._tensor), np.int64), np.zeros(len(self._tensor), np.int64)
        for number, flat in enumerate(self._flats):
            starts = np.full(len(self.models.sizes), -1, np.int64)
            starts[np.array(flat.numbers, np.int64)] = flat.layout.starts
            mine = starts[self._tensor] >= 0
            group[mine], start[mine] = number, (starts[self._tensor] + self._start)[mine]
        return group, start

    def ranges_within(self, budget: int) -> list[Range]:
        """What comes to the host of a range, masks and room for candidates, stays within half of so many bytes."""
        regions = max(self.models.tasks * len(self.counts), 1)
        return self.ranges(max(int(budget / (2 * regions * (1 / 8 + 8 * CANDIDATES))), SEGMENT))

    # ---- the sample --------------------------------------------------------------------------------------------------

    def sample(self, segment: Ints, start: Ints) -> NDArray[np.int32]:
        """See `SelectionShard.sample`; one wait."""
        group, at = self._at
        keys = np.empty((self.models.tasks, len(segment), RUN), np.int32)
        mine = [np.flatnonzero(group[segment] == number) for number in range(len(self._flats))]
        with closing(Lane(self._place)) as lane:
            with lane.place.computing():
                first = [lane.load(torch.from_numpy((at[segment] + start)[runs])) for runs in mine]
                drawn = [self._drawn(flat, where) for flat, where in zip(self._flats, first, strict=True)]
            for runs, found in zip(mine, lane.bring([one.view(-1) for one in drawn]), strict=True):
                keys[:, runs] = found.view(self.models.tasks, len(runs), RUN).numpy()
        keys *= np.arange(RUN) < (self._numel[segment] - start)[:, None]
        return keys

    def _drawn(self, flat: Flat, first: Tensor) -> Tensor:
        """int32 [N, R, RUN] on the device: key bits of runs of elements of the buffers, from `first` [R] on."""
        where = first[:, None] + torch.arange(RUN, device=self._place.device)
        where = where.clamp_(max=max(flat.layout.total - 1, 0))
        origin, *values = (model[where].float() for model in flat.models)
        return torch.stack([(value - origin).abs().view(torch.int32) for value in values])

    # ---- the pass ----------------------------------------------------------------------------------------------------

    def mark(self, part: Range, brackets: Ints, masks: Masks) -> Found:
        (found,) = self.marking(masks)([part], brackets)
        return dict(found)

    def marking(self, masks: Masks) -> Mark:
        def mark(ranges: Sequence[Range], brackets: Ints) -> Iterator[Found]:
            with closing(Lane(self._place)) as lane:
                for part in ranges:
                    yield self._pass(lane, part, brackets, masks)

        return mark

    def _pass(self, lane: Lane, part: Range, brackets: Ints, masks: Masks) -> Found:
        """Raises ValueError if a Δ is NaN or Inf."""
        wanted = wanted_of(brackets)
        tasks = sorted({task for task, _ in wanted})
        groups = [tasks[at : at + GROUP] for at in range(0, len(tasks), GROUP)]
        with lane.place.computing():
            launched = [self._launched(lane, one, group, brackets) for one in self._windows(part) for group in groups]
        results = iter(lane.bring([result for one in launched for result in one.results]))
        brought = [[next(results).numpy() for _ in one.results] for one in launched]
        self._refuse(launched, [faults for faults, *_ in brought], tasks)
        found: dict[tuple[int, int], list[_Part]] = {region: [] for region in wanted}
        for one, (_, *values) in zip(launched, brought, strict=True):
            for region, words, candidates in self._taken(lane, part, one, *values):
                if region in found:
                    self._store(masks, region, one.window, part, words)
                    found[region].append(candidates)
        return {region: _joined(parts, part[1] - part[0]) for region, parts in found.items()}

    def _taken(
        self, lane: Lane, part: Range, one: _Marked,
        counts: NDArray[np.int32], upper: NDArray[np.int32], keys: NDArray[np.int32], places: NDArray[np.int32],
    ) -> Iterator[tuple[tuple[int, int], NDArray[np.uint32], _Part]]:  # fmt: skip
        """The regions of a launch with the words of their masks, and their candidates."""
        of_blocks = counts.reshape(-1, len(one.regions)).T
        held = (of_blocks >> 16) - (of_blocks & 0xFFFF)
        ends = np.cumsum(held.sum(1, dtype=np.int64))
        if ends[-1] > len(keys):
            keys, places = self._again(lane, one, int(ends[-1]))
        starts = self._at[1][part[0] + one.window.segments] - one.window.start
        for c, (region, words) in enumerate(zip(one.regions, upper.reshape(len(one.regions), -1), strict=True)):
            of_segments = np.add.reduceat(held[c].astype(np.int64), starts // BLOCK)
            mine = slice(int(ends[c] - of_segments.sum()), int(ends[c]))
            sure = int((of_blocks[c] & 0xFFFF).sum())
            yield region, words.view(np.uint32), _Part(one.window.segments, of_segments, sure, keys[mine], places[mine])

    def _windows(self, part: Range) -> list[_Window]:
        """What of a range lies in each of the buffers, if anything does."""
        group, at = (one[part[0] : part[1]] for one in self._at)
        windows = []
        for number, flat in enumerate(self._flats):
            segments = np.flatnonzero(group == number)
            if len(segments):
                last = part[0] + int(segments[-1])
                stop = int(at[segments[-1]]) + -(-int(self._numel[last]) // PAD) * PAD
                windows.append(_Window(flat, segments, int(at[segments[0]]), stop))
        return windows

    def _launched(self, lane: Lane, window: _Window, tasks: Sequence[int], brackets: Ints) -> _Marked:
        """A pass over the models of some tasks, without a wait."""
        flat, here = window.flat, slice(window.start, window.stop)
        origin, device = elements(flat.models[0])[here], self._place.device
        models = [elements(flat.models[task + 1])[here] for task in tasks]
        cuts = [[self._cut(flat, bracket) for bracket in brackets[task].tolist()] for task in tasks]
        regions = [(task, k) for task in tasks for k in range(brackets.shape[1])]
        upper = torch.empty(len(regions), origin.numel() // 32, dtype=torch.int32, device=device)
        tables = [lane.load(table.view(-1)) for table in cut_tables(cuts)]
        lower, counts, faults = launch_mark(origin, models, list(upper), tables, window.start)
        held = ((counts >> 16) - (counts & 0xFFFF)).T.reshape(-1)
        ranks = (held.cumsum(0) - held).view(len(regions), -1)
        room = max(int(upper.numel() * 32 * CANDIDATES), min(upper.numel() * 32, ROOM))
        places = flat.layout.places(device)[window.start // PAD : window.stop // PAD]
        found = collect_all(origin, models, upper, lower, ranks, places, room)
        return _Marked(window, regions, models, upper, lower, ranks, counts, faults, *found)

    def _again(self, lane: Lane, one: _Marked, room: int) -> list[NDArray[np.int32]]:
        """The candidates where there are more than was thought."""
        window, unit = one.window, slice(one.window.start // PAD, one.window.stop // PAD)
        with lane.place.computing():
            origin = elements(window.flat.models[0])[window.start : window.stop]
            places = window.flat.layout.places(self._place.device)[unit]
            found = collect_all(origin, one.models, one.upper, one.lower, one.ranks, places, room)
        return [brought.numpy() for brought in lane.bring(list(found))]

    def _cut(self, flat: Flat, bracket: Sequence[int]) -> Bracket:
        """A bracket (high key, high chunk, low key, low chunk) with the chunks as places in the buffers."""
        high, high_chunk, low, low_chunk = bracket
        if high < 0:  # to be skipped
            return Bracket(NOTHING, NOTHING)
        return Bracket((high, self._edge(flat, high_chunk)), (low, self._edge(flat, low_chunk)))

    def _edge(self, flat: Flat, chunk: int) -> int:
        """Where in the buffers the elements of chunks before this one end."""
        first = self._first_chunks[np.array(flat.numbers, np.int64)]
        tensor = int(np.searchsorted(first, chunk, side="right")) - 1
        if tensor < 0:
            return 0
        start = int(flat.layout.starts[tensor]) + (chunk - int(first[tensor])) * CHUNK
        return min(start, int(flat.layout.ends[tensor]))

    @cached_property
    def _first_chunks(self) -> Ints:
        """[T]: of each tensor the number of its first chunk; of an empty one that of the next."""
        chunks = -(-np.array(self.models.sizes, np.int64) // CHUNK)
        return np.cumsum(chunks) - chunks

    def _refuse(self, launched: Sequence[_Marked], faults: Sequence[NDArray[np.int32]], tasks: Sequence[int]) -> None:
        """Raise ValueError for the first tensor in which a Δ is NaN or Inf."""
        bad = []
        for one, flags in zip(launched, faults, strict=True):
            if flags.any():
                layout, flat = one.window.flat.layout, one.window.flat
                here = layout.number_at(one.window.start + int(flags.argmax()) * BLOCK)
                bad.append((flat.numbers[here], here, flat))
        if bad:
            number, here, flat = min(bad, key=lambda found: found[0])
            origin, *models = (flat.layout.tensor(model, here) for model in flat.models)
            with self._place.computing():
                raise blame(origin, {task: models[task] for task in tasks}, number)

    def _store(
        self, masks: Masks, region: tuple[int, int], window: _Window, part: Range, words: NDArray[np.uint32]
    ) -> None:
        starts = dict(zip(window.flat.numbers, window.flat.layout.starts.tolist(), strict=True))
        for tensor, start, stop in self.pieces(part):
            if tensor in starts:
                first = (starts[tensor] + start - window.start) // 32
                masks.store(*region, tensor, start // 32, words[first : first + (stop - start + 31) // 32])


def _joined(parts: Sequence[_Part], segments: int) -> Candidates:
    """Of a range of so many segments, which lie in one buffer or several; in memory of their own, for pinned memory is
    wanted again."""
    per_segment = np.zeros(segments, np.int64)
    for part in parts:
        per_segment[part.segments] = part.per_segment
    keys = np.concatenate([part.keys for part in parts])
    places = np.concatenate([part.places for part in parts])
    if len(parts) > 1:
        segments_of = np.concatenate([np.repeat(part.segments, part.per_segment) for part in parts])
        order = np.argsort(segments_of, kind="stable")
        keys, places = keys[order], places[order]
    return Candidates(sum(part.sure for part in parts), keys, places.view(np.uint32), per_segment)
