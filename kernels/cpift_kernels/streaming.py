"""`select_cores` in phases, for models that are streamed from disk or read by several machines.

A `Selection` walks models in ranges of segments. Any range may be marked in any order, anywhere; the masks and the
thresholds are those of `select_cores`, bit for bit, whoever marked what.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .dispatch import Backend, implementation, resolve
from .placement import Placement, placement_of
from .selection import nonfinite_update, top_elements

if TYPE_CHECKING:
    from torch import Tensor

    from .flat import Flat

CHUNK = 1 << 16  # elements handled together: the base's chunk stays in the L2 cache while all tasks pass by
SEGMENT = 1 << 18  # most elements of one tensor that one row of the table describes, a multiple of CHUNK
ITEM = 1 << 24  # elements of all models together that one call of a kernel reads

Ints = NDArray[np.int64]
Range = tuple[int, int]  # segments [first, last)
Marked = Mapping[tuple[int, int], Any]  # what was found in a range by task and k; of what kind, the backend knows
Mark = Callable[[Sequence[Range], Ints], Iterable[Marked]]  # in the order of the ranges


class Models(Protocol):
    """θ0 (number 0) and N tuned models (1..N): T tensors of equal sizes, read in pieces."""

    @property
    def sizes(self) -> Sequence[int]:
        """Elements of each tensor."""

    @property
    def tasks(self) -> int:
        """N"""

    def load(self, model: int, tensor: int, start: int, stop: int) -> Tensor:
        """Elements start..stop-1, one-dimensional and contiguous, bf16, fp16 or fp32, on the CPU."""

    def gather(self, model: int, tensor: int, starts: Ints, length: int) -> Tensor:
        """float32 [R, length], the elements from each of starts [R] on; anything past the tensor's end. Used for the
        sample only, so rounding may differ from that of `load`."""

    def prefetch(self, tensor: int, start: int, stop: int) -> None:
        """These elements of all models are wanted soon."""

    def release(self, tensor: int, start: int, stop: int) -> None:
        """These elements of all models have been used."""


class Masks(Protocol):
    """Where packed masks are kept: one of ⌈size/32⌉ words a task, k and tensor."""

    def store(self, task: int, k: int, tensor: int, first: int, words: NDArray[np.uint32]) -> None:
        """Keep words first.. of a mask."""

    def words(self, task: int, k: int, tensor: int) -> NDArray[Any]:
        """All words of a mask, int32, which may be changed in place."""


class SelectionShard(Protocol):
    """Consecutive tensors of the models, wherever they lie, and what is selected of them. What others learn of it is a
    sample, counts and histograms: masks and candidates stay."""

    @property
    def sizes(self) -> Sequence[int]:
        """Elements of each of its tensors."""

    @property
    def tasks(self) -> int:
        """N"""

    def sample(self, segment: Ints, start: Ints) -> NDArray[np.int32]:
        """Bits of |Δ|, int32 [N, R, 32], of runs of elements from start [R] of its segments [R] on; 0 past their
        ends."""

    def mark(self, brackets: Ints) -> Ints:
        """Look through the models for brackets [N, K, 4], chunks counted from its first; int64 [N, K, 2]: elements
        before each bracket, which its masks have from now on, and candidates within, which it keeps until the next
        call. Raises ValueError for a NaN or Inf in θi − θ0, as `select_cores` does."""

    def histogram(self, task: int, k: int, prefix: int, shift: int) -> Ints:
        """int64 [2048]: candidates of a region whose key, the bits of |Δ|, has `prefix` above bit shift + 11, by the 11
        bits from `shift` on."""

    def settle(self, task: int, k: int, least: int, ties: int) -> int:
        """Take into the mask the candidates whose key exceeds `least`, and the first `ties` of those at it, in linear
        order; returns the ties that are left for the shards after it."""


@dataclass(frozen=True)
class Core:
    """What `CoreMask` says of a region beside its masks."""

    count: int
    requested: int
    threshold: float


class Selection(ABC):
    """The phases over one set of models. counts: elements to select, for each k. Made by `stream_cores`."""

    def __init__(self, models: Models, counts: Sequence[int]):
        self.models, self.counts = models, counts
        self._tensor, self._start, self._numel, self._chunk = cut(models.sizes)

    def ranges(self, elements: int) -> list[Range]:
        """The segments cut into ranges of about so many elements of one model."""
        number = (np.cumsum(self._numel) - self._numel) // max(elements, 1)
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(self._numel)]
        return [(first, last) for first, last in pairwise(edges) if first < last]

    def ranges_within(self, budget: int) -> list[Range]:
        """The same where the buffers of all threads that mark have to stay within so many bytes."""
        import torch

        models = self.models.tasks + 1
        held = 4 * models + models  # bytes an element: computed values in fp32, masks and candidates with room to spare
        return self.ranges(max(min(ITEM // models, budget // (2 * torch.get_num_threads() * held)), SEGMENT))

    def pieces(self, part: Range) -> Iterator[tuple[int, int, int]]:
        """(tensor, start, stop) of the elements of a range, in linear order."""
        first, last = part
        for tensor in dict.fromkeys(self._tensor[first:last].tolist()):
            mine = np.flatnonzero(self._tensor[first:last] == tensor) + first
            yield tensor, int(self._start[mine[0]]), int(self._start[mine[-1]] + self._numel[mine[-1]])

    @abstractmethod
    def mark(self, part: Range, brackets: Ints, masks: Masks) -> Marked:
        """Look through one range, whose mask words may go to `masks`; brackets: as `select` hands them out.

        Raises ValueError for a NaN or Inf in θi − θ0, as `select_cores` does."""

    @abstractmethod
    def marking(self, masks: Masks) -> Mark:
        """Marks ranges in this process, while the next ones are read ahead."""

    @abstractmethod
    def shard(
        self, masks: Masks, ranges: Sequence[Range], mark: Mark | None = None, spill: Path | None = None
    ) -> AbstractContextManager[SelectionShard]:
        """The models as one of several shards (`select_over`, whose counts are what counts); as `select` has it."""

    @abstractmethod
    def select(
        self, masks: Masks, ranges: Sequence[Range], mark: Mark | None = None, spill: Path | None = None
    ) -> list[list[Core]]:
        """All phases: the regions as [task][k], their masks in `masks`. mark: what marks ranges, if not this process.
        What is held between phases lies in a nameless file of the folder `spill`, if given."""


def stream_cores(
    models: Models,
    counts: Sequence[int],
    *,
    place: Placement | None = None,
    held: bool | Sequence[Flat] = False,
    backend: Backend = "auto",
) -> Selection:
    """The selection of the exact top-`counts[k]` elements of |θi − θ0| over all tensors of models read in pieces.

    place: of the device that pieces are copied to and marked on; the CPU if not given, and `auto` follows it as it
    follows tensors. held: `load` gives tensors that lie there already, and stay as they are; or the buffers in which
    all of them lie there. Masks and thresholds are the same bits everywhere. Raises ValueError for a count outside
    0..D.
    """
    import torch

    total, place = sum(models.sizes), place or placement_of(torch.device("cpu"))
    for count in counts:
        if not 0 <= count <= total:
            raise ValueError(f"counts holds {count}; the models have {total} elements, so use 0..{total}")
    chosen = resolve(backend, torch.empty(0, device=place.device))
    return implementation(chosen, stream_cores_reference)(models, counts, place, held)


def select_over(
    shards: Sequence[SelectionShard], counts: Sequence[int], side_by_side: bool = False
) -> list[list[Core]]:
    """The regions, as [task][k], of models whose tensors lie in shards, in this order; their masks are with the shards.

    Masks and thresholds are those of one selection over all tensors, bit for bit, however these are cut into shards.
    side_by_side: all shards are asked at once, each by a thread, for they are other processes'.
    """
    from .cpu import sharded

    return sharded.select_over(shards, counts, side_by_side)


def stream_cores_reference(
    models: Models, counts: Sequence[int], place: Placement, held: bool | Sequence[Flat] = False
) -> Selection:
    """`stream_cores` in plain torch; holds |Δ| of all tasks in fp32."""
    return _Reference(models, counts)


class _Reference(Selection):
    def mark(self, part: Range, brackets: Ints, masks: Masks) -> Marked:
        """By task, for every k alike: |Δ| of the range, fp32 in linear order."""
        import torch

        values: dict[tuple[int, int], list[Tensor]] = {(task, 0): [] for task in range(self.models.tasks)}
        for tensor, start, stop in self.pieces(part):
            base = self.models.load(0, tensor, start, stop).float()
            for task in range(self.models.tasks):
                magnitude = (self.models.load(task + 1, tensor, start, stop).float() - base).abs()
                if not magnitude.isfinite().all():
                    raise nonfinite_update(tensor, task)
                values[task, 0].append(magnitude)
            self.models.release(tensor, start, stop)
        return {key: torch.cat(parts) for key, parts in values.items()}

    def marking(self, masks: Masks) -> Mark:
        return lambda ranges, brackets: (self.mark(part, brackets, masks) for part in ranges)

    def shard(
        self, masks: Masks, ranges: Sequence[Range], mark: Mark | None = None, spill: Path | None = None
    ) -> AbstractContextManager[SelectionShard]:
        raise ValueError("backend='reference' selects from all tensors at once; use backend='cpu' for shards")

    def select(
        self, masks: Masks, ranges: Sequence[Range], mark: Mark | None = None, spill: Path | None = None
    ) -> list[list[Core]]:
        import torch

        brackets = np.zeros((self.models.tasks, len(self.counts), 4), np.int64)  # of no use here
        marked = list((mark or self.marking(masks))(ranges, brackets))
        cores = []
        for task in range(self.models.tasks):
            magnitude = torch.cat([torch.zeros(0), *(part[task, 0] for part in marked)])
            tops = [top_elements(magnitude, list(self.models.sizes), count) for count in self.counts]
            for k, top in enumerate(tops):
                for tensor, words in enumerate(top.words):
                    masks.store(task, k, tensor, 0, words.numpy().view(np.uint32))
            cores.append([Core(top.count, top.requested, top.threshold) for top in tops])
        return cores


def cut(sizes: Sequence[int]) -> tuple[Ints, Ints, Ints, Ints]:
    """(tensor, start, numel, chunk), each [S]: the segments of tensors with so many elements."""
    rows = [(t, start) for t, size in enumerate(sizes) for start in range(0, size, SEGMENT)]
    tensor, start = np.array(rows, np.int64).reshape(-1, 2).T.copy()
    numel = np.minimum(SEGMENT, np.array(sizes, np.int64)[tensor] - start)
    chunks = (numel + CHUNK - 1) // CHUNK
    return tensor, start, numel, np.cumsum(chunks) - chunks
