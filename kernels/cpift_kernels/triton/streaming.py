"""Selection in phases with the pass over the models in GPU memory.

Everything but the pass is the CPU's: the sample, the brackets, the candidates and the end. A range is copied to the
device, marked and collected there, and its masks and candidates come back. A bracket's points act at whole chunks,
which are whole blocks of `mark_kernel`: the bits and counts are those of the CPU by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import words_for
from ..cpu.candidates import Candidates, wanted_of
from ..cpu.streaming import BracketSelection
from ..streaming import CHUNK, SEGMENT, Ints, Mark, Marked, Masks, Models, Range
from .bracket import NOTHING, Bracket
from .common import elements
from .selection import GROUP, blame, marked


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

    def mark(self, part: Range, brackets: Ints, masks: Masks) -> dict[tuple[int, int], Candidates]:
        found: dict[tuple[int, int], list[Candidates]] = {one: [] for one in wanted_of(brackets)}
        tasks = sorted({task for task, _ in found})
        for tensor, start, stop in self.pieces(part):
            origin = self._load(0, tensor, start, stop)
            for group in (tasks[i : i + GROUP] for i in range(0, len(tasks), GROUP)):
                models = {task: self._load(task + 1, tensor, start, stop) for task in group}
                try:
                    for (task, k), piece, words in self._marked(tensor, start, origin, models, brackets):
                        if (task, k) in found:
                            found[task, k].append(piece)
                            masks.store(task, k, tensor, start // 32, words)
                except ArithmeticError:
                    raise blame(origin, models, tensor) from None
            self.models.release(tensor, start, stop)
        return {one: _joined(parts) for one, parts in found.items()}

    def _load(self, model: int, tensor: int, start: int, stop: int) -> Tensor:
        return self.models.load(model, tensor, start, stop).to(self._device)

    def _marked(
        self, tensor: int, start: int, origin: Tensor, models: Mapping[int, Tensor], brackets: Ints
    ) -> Iterator[tuple[tuple[int, int], Candidates, NDArray[np.uint32]]]:
        """Of one piece what was found and the mask, by task and k. Raises ArithmeticError if a Δ is NaN or Inf."""
        first, segments = self._chunk_at(tensor, start), -(-origin.numel() // SEGMENT)
        cuts = [[_local(bracket, first) for bracket in brackets[task].tolist()] for task in models]
        wanted = [(task, k) for task in models for k in range(brackets.shape[1])]
        uppers = torch.empty(len(wanted), words_for(origin.numel()), dtype=torch.int32, device=self._device)
        values = [elements(model) for model in models.values()]
        parts = list(marked(elements(origin), values, list(uppers), cuts, 0))
        words = uppers.cpu().numpy().view(np.uint32)
        for c, (one, (sure, keys, indices)) in enumerate(zip(wanted, parts, strict=True)):
            places = indices.cpu().numpy()
            per_segment = np.bincount(places // SEGMENT, minlength=segments).astype(np.int64)
            yield one, Candidates(sure, keys.cpu().numpy(), (places % SEGMENT).astype(np.uint32), per_segment), words[c]

    def _chunk_at(self, tensor: int, start: int) -> int:
        """The number of the chunk that begins at an element of a tensor."""
        return int(self._chunk[np.flatnonzero((self._tensor == tensor) & (self._start == start))[0]])


def _local(bracket: Sequence[int], first: int) -> Bracket:
    """A bracket (high key, high chunk, low key, low chunk) as cut points of a piece that begins with chunk `first`."""
    high, high_chunk, low, low_chunk = bracket
    if high < 0:  # to be skipped
        return Bracket(NOTHING, NOTHING)
    return Bracket((high, max(high_chunk - first, 0) * CHUNK), (low, max(low_chunk - first, 0) * CHUNK))


def _joined(parts: Sequence[Candidates]) -> Candidates:
    """What was found in pieces that follow each other."""
    return Candidates(
        sum(part.marked for part in parts),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.places for part in parts]),
        np.concatenate([part.per_segment for part in parts]),
    )
