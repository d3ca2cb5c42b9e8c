"""Selection in phases with the pass over the models in GPU memory.

Everything but the pass is the CPU's: the sample, the brackets, the candidates and the end. A range is copied to the
device, marked and collected there, and its masks and candidates come back. A bracket's points act at whole chunks,
which are whole blocks of `mark_kernel`: the bits and counts are those of the CPU by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..checks import words_for
from ..cpu.candidates import Found, wanted_of
from ..cpu.streaming import BracketSelection
from ..selection import nonfinite_update
from ..streaming import CHUNK, SEGMENT, Ints, Mark, Marked, Masks, Models, Range
from .bracket import NOTHING, Bracket
from .common import elements
from .selection import GROUP, launch_collect, launch_mark


def stream_cores(models: Models, counts: Sequence[int], device: torch.device) -> BracketSelection:
    """See `cpift_kernels.stream_cores`."""
    return DeviceSelection(models, counts, device)


class DeviceSelection(BracketSelection):
    """Marks on `device`; the models come from the host."""

    def __init__(self, models: Models, counts: Sequence[int], device: torch.device):
        super().__init__(models, counts)
        self._device = device

    def marking(self, masks: Masks) -> Mark:
        def mark(ranges: Sequence[Range], brackets: Ints) -> Iterator[Marked]:
            for part, following in zip(ranges, (*ranges[1:], None), strict=True):
                for piece in self.pieces(following) if following is not None else ():
                    self.models.prefetch(*piece)
                yield self.mark(part, brackets, masks)

        return mark

    def mark(self, part: Range, brackets: Ints, masks: Masks) -> dict[tuple[int, int], Found]:
        wanted = wanted_of(brackets)
        tasks = sorted({task for task, _ in wanted})
        found: dict[tuple[int, int], list[Found]] = {one: [] for one in wanted}
        for tensor, start, stop in self.pieces(part):
            origin = self._load(0, tensor, start, stop)
            for group in (tasks[i : i + GROUP] for i in range(0, len(tasks), GROUP)):
                models = [self._load(task + 1, tensor, start, stop) for task in group]
                words, pieces = self._marked(tensor, start, origin, models, brackets[group])
                for (row, k), piece in pieces.items():
                    if (group[row], k) in found:
                        found[group[row], k].append(piece)
                        masks.store(group[row], k, tensor, start // 32, words[row, k])
            self.models.release(tensor, start, stop)
        return {one: _joined(parts) for one, parts in found.items()}

    def _load(self, model: int, tensor: int, start: int, stop: int) -> Tensor:
        return self.models.load(model, tensor, start, stop).to(self._device)

    def _marked(
        self, tensor: int, start: int, origin: Tensor, models: list[Tensor], brackets: Ints
    ) -> tuple[np.ndarray, dict[tuple[int, int], Found]]:
        """Of one piece the masks uint32 [N, K, words], and what was found by (n, k); brackets [N, K, 4]."""
        numel, shape = origin.numel(), brackets.shape[:2]
        first = self._chunk_at(tensor, start)
        cuts = [[_local(bracket, first) for bracket in row] for row in brackets.tolist()]
        flat, values = elements(origin), [elements(model) for model in models]
        uppers = torch.empty(shape[0] * shape[1], words_for(numel), dtype=torch.int32, device=self._device)
        lower, counts, faults = launch_mark(flat, values, list(uppers), cuts, 0)
        sure, possible = (counts & 0xFFFF).T.long(), (counts >> 16).T.long()
        faulty, *totals = torch.cat([faults.sum()[None], sure.sum(1), possible.sum(1)]).tolist()
        if faulty:
            raise _blame(tensor, origin, models)
        before, found = (possible - sure).cumsum(1) - (possible - sure), {}
        for c, (n, k) in enumerate(np.ndindex(*shape)):
            certain, amount = totals[c], totals[len(uppers) + c] - totals[c]
            keys, places = _EMPTY
            if amount:
                on_device = launch_collect(flat, values[n], uppers[c], lower[c], before[c], amount, 0)
                keys, places = (one.cpu().numpy() for one in on_device)
            segments = -(-numel // SEGMENT)
            found[n, k] = Found(
                certain,
                keys,
                (places % SEGMENT).astype(np.uint32),
                np.bincount(places // SEGMENT, minlength=segments).astype(np.int64),
            )
        return uppers.cpu().numpy().view(np.uint32).reshape(*shape, -1), found

    def _chunk_at(self, tensor: int, start: int) -> int:
        """The number of the chunk that begins at an element of a tensor."""
        return int(self._chunk[np.flatnonzero((self._tensor == tensor) & (self._start == start))[0]])


_EMPTY = np.zeros(0, np.int32), np.zeros(0, np.int64)


def _local(bracket: Sequence[int], first: int) -> Bracket:
    """A bracket (high key, high chunk, low key, low chunk) as cut points of a piece that begins with chunk `first`."""
    high, high_chunk, low, low_chunk = bracket
    if high < 0:  # to be skipped
        return Bracket(NOTHING, NOTHING)
    return Bracket((high, max(high_chunk - first, 0) * CHUNK), (low, max(low_chunk - first, 0) * CHUNK))


def _blame(tensor: int, origin: Tensor, models: Sequence[Tensor]) -> ValueError:
    """The error that names the first task whose update is not finite."""
    for task, model in enumerate(models):
        if not (model.float() - origin.float()).isfinite().all():
            return nonfinite_update(tensor, task)
    raise AssertionError(f"tensor {tensor} was flagged, yet every update of it is finite")


def _joined(parts: Sequence[Found]) -> Found:
    """What was found in pieces that follow each other."""
    return Found(
        sum(part.marked for part in parts),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.per_segment for part in parts]),
    )
