"""Selection in phases with the pass over the models in GPU memory.

Everything but the pass is the CPU's: the sample, the brackets, the candidates and the end. A piece of the models is
copied to the device, marked and collected there, and its masks and candidates come back, while the next one is copied
to it. A bracket's points act at whole chunks, which are whole blocks of `mark_kernel`: the bits and counts are those of
the CPU by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import words_for
from ..cpu.candidates import Candidates, wanted_of
from ..cpu.streaming import BracketSelection
from ..flat import Flat
from ..placement import Lane, Placement, Staged
from ..streaming import CHUNK, SEGMENT, Ints, Mark, Marked, Masks, Models, Range
from .bracket import NOTHING, Bracket, cut_tables
from .common import elements
from .flat_selection import FlatSelection
from .selection import GROUP, Marks, begin_marks, blame

Found = dict[tuple[int, int], Candidates]  # by task and k


def stream_cores(
    models: Models, counts: Sequence[int], place: Placement, held: bool | Sequence[Flat] = False
) -> BracketSelection:
    """See `cpift_kernels.stream_cores`."""
    if isinstance(held, bool):
        return (HeldSelection if held else DeviceSelection)(models, counts, place)
    return FlatSelection(models, counts, place, held)


@dataclass(frozen=True)
class _Piece:
    """Elements start.. of one tensor of all models, on their way to the device."""

    tensor: int
    start: int
    models: Mapping[int, Staged]  # θ0 is number 0


class DeviceSelection(BracketSelection):
    """Marks on the device of `place`; the models come from the host."""

    def __init__(self, models: Models, counts: Sequence[int], place: Placement):
        super().__init__(models, counts)
        self._place = place

    def mark(self, part: Range, brackets: Ints, masks: Masks) -> Found:
        (found,) = self._through([part], brackets, masks)
        return found

    def marking(self, masks: Masks) -> Mark:
        def mark(ranges: Sequence[Range], brackets: Ints) -> Iterator[Marked]:
            return self._through(ranges, brackets, masks)

        return mark

    def _through(self, ranges: Sequence[Range], brackets: Ints, masks: Masks) -> Iterator[Found]:
        """A piece is on its way while the one before it is marked, and the one after it is read from the disk."""
        pieces = [(number, *piece) for number, part in enumerate(ranges) for piece in self.pieces(part)]
        tasks, parts = sorted({task for task, _ in wanted_of(brackets)}), list[Found]()
        if not pieces:
            return
        with closing(Lane(self._place)) as lane:
            coming = self._staged(lane, tasks, pieces, 0)
            for at, (number, *_) in enumerate(pieces):
                with lane.place.computing():
                    piece, marks = coming, self._begun(lane, coming, brackets)
                if at + 1 < len(pieces):
                    coming = self._staged(lane, tasks, pieces, at + 1)
                parts.append(self._found(lane, piece, marks, brackets, masks))
                self._used(lane, piece)
                if at + 1 == len(pieces) or pieces[at + 1][0] != number:
                    yield _joined(parts)
                    parts = []

    def _staged(self, lane: Lane, tasks: Sequence[int], pieces: Sequence[tuple[int, int, int, int]], at: int) -> _Piece:
        if at + 1 < len(pieces):
            self.models.prefetch(*pieces[at + 1][1:])
        _, tensor, start, stop = pieces[at]
        models = {
            model: lane.stage(self.models.load(model, tensor, start, stop))
            for model in (0, *(task + 1 for task in tasks))
        }
        self.models.release(tensor, start, stop)
        return _Piece(tensor, start, models)

    def _used(self, lane: Lane, piece: _Piece) -> None:
        for staged in piece.models.values():
            lane.done(staged)

    def _begun(self, lane: Lane, piece: _Piece, brackets: Ints) -> list[tuple[list[int], Marks]]:
        """What marks a piece, launched, with the tasks of each launch."""
        origin, *values = (elements(lane.use(staged)) for staged in piece.models.values())
        tasks, first = [model - 1 for model in piece.models if model], self._chunk_at(piece.tensor, piece.start)
        begun = []
        for at in range(0, len(tasks), GROUP):
            group = tasks[at : at + GROUP]
            cuts = [[_local(bracket, first) for bracket in brackets[task].tolist()] for task in group]
            shape = len(group) * brackets.shape[1], words_for(origin.numel())
            uppers = torch.empty(shape, dtype=torch.int32, device=self._place.device)
            tables = [lane.load(table.view(-1)) for table in cut_tables(cuts)]
            begun.append((group, begin_marks(origin, values[at : at + GROUP], list(uppers), tables, 0)))
        return begun

    def _found(
        self, lane: Lane, piece: _Piece, begun: list[tuple[list[int], Marks]], brackets: Ints, masks: Masks
    ) -> Found:
        """The candidates of a piece, and its masks in `masks`; waits for the device twice.

        Raises ValueError if a Δ is NaN or Inf."""
        flat = [one for _, marks in begun for one in (marks.totals, *marks.uppers)]
        totals_and_masks = iter(lane.bring(flat))
        regions, sure = list[tuple[int, int]](), list[int]()
        candidates: list[Tensor] = []
        wanted, segments = set(wanted_of(brackets)), -(-piece.models[0].values.numel() // SEGMENT)
        for group, marks in begun:
            totals = next(totals_and_masks).tolist()
            words = [next(totals_and_masks).numpy().view(np.uint32) for _ in marks.uppers]
            of_masks = [(task, k) for task in group for k in range(brackets.shape[1])]
            with lane.place.computing():
                collected = self._collected(marks, totals, piece)
            for one, mask, (certain, keys, places) in zip(of_masks, words, collected, strict=True):
                if one in wanted:
                    masks.store(*one, piece.tensor, piece.start // 32, mask)
                    regions, sure, candidates = [*regions, one], [*sure, certain], [*candidates, keys, places]
        brought = [one.numpy() for one in lane.bring(candidates)]
        return {
            one: _candidates(certain, keys, places, segments)
            for one, certain, keys, places in zip(regions, sure, brought[::2], brought[1::2], strict=True)
        }

    def _collected(self, marks: Marks, totals: Sequence[int], piece: _Piece) -> list[tuple[int, Tensor, Tensor]]:
        try:
            return list(marks.collected(totals))
        except ArithmeticError:
            models = {model - 1: staged.values for model, staged in piece.models.items() if model}
            raise blame(piece.models[0].values, models, piece.tensor) from None

    def _chunk_at(self, tensor: int, start: int) -> int:
        """The number of the chunk that begins at an element of a tensor."""
        return int(self._chunk[np.flatnonzero((self._tensor == tensor) & (self._start == start))[0]])


class HeldSelection(DeviceSelection):
    """Marks models that lie on the device."""

    def _staged(self, lane: Lane, tasks: Sequence[int], pieces: Sequence[tuple[int, int, int, int]], at: int) -> _Piece:
        _, tensor, start, stop = pieces[at]
        with lane.place.computing():  # some models are computed as they are asked for
            values = {model: self.models.load(model, tensor, start, stop) for model in (0, *(n + 1 for n in tasks))}
        there = lane.place.record("compute")
        return _Piece(tensor, start, {model: Staged(one, one, there) for model, one in values.items()})

    def _used(self, lane: Lane, piece: _Piece) -> None:
        """They stay."""


def _candidates(sure: int, keys: NDArray[np.int32], places: Ints, segments: int) -> Candidates:
    """Of a piece; in memory of their own, for pinned memory is wanted again."""
    per_segment = np.bincount(places // SEGMENT, minlength=segments).astype(np.int64)
    return Candidates(sure, keys.copy(), (places % SEGMENT).astype(np.uint32), per_segment)


def _local(bracket: Sequence[int], first: int) -> Bracket:
    """A bracket (high key, high chunk, low key, low chunk) as cut points of a piece that begins with chunk `first`."""
    high, high_chunk, low, low_chunk = bracket
    if high < 0:  # to be skipped
        return Bracket(NOTHING, NOTHING)
    return Bracket((high, max(high_chunk - first, 0) * CHUNK), (low, max(low_chunk - first, 0) * CHUNK))


def _joined(parts: Sequence[Found]) -> Found:
    """What was found in pieces that follow each other."""
    return {
        one: Candidates(
            sum(part[one].marked for part in parts),
            np.concatenate([part[one].keys for part in parts]),
            np.concatenate([part[one].places for part in parts]),
            np.concatenate([part[one].per_segment for part in parts]),
        )
        for one in parts[0]
    }
