"""One of several processes that hold models, and what it answers about the tensors that are its own.

An answer follows from what it is asked with, and nothing that was asked before: a process that takes the place of a
lost one loads its tensors anew, does again what led to the question, and answers the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.writing import TensorRecord
from cpift.errors import CpiftError
from cpift.merging.base import Fill, MergeMethod
from cpift.merging.resident.residents import Residents, identity
from cpift.method.masks import MasksInMemory
from cpift.method.measures import Update

if TYPE_CHECKING:
    import numpy as np
    from cpift_kernels import SelectionShard

_MOST = 8  # merges, or selections, that were begun and not ended: a caller that was lost ends none
Sent = Callable[[], Any]  # gives, in the process that it was sent to, what was sent
Step = tuple[Any, ...]  # a method of `SelectionShard` and its arguments


class NoRoomError(CpiftError):
    """Models do not stay where they were to."""


@dataclass(frozen=True)
class Selecting:
    """A selection from models that stay; budget: in bytes, for buffers."""

    models: Update
    counts: Sequence[int]
    budget: int


class Holder:
    """Answers for some shards of all models. name: of a merge or a selection, no two of which have the same."""

    def __init__(self, residents: Residents):
        self._residents = residents
        self._merges: dict[str, _Merge] = {}
        self._selections: dict[str, _Selection] = {}
        self._statistics: dict[Any, dict[str, Any]] = {}  # by what they are of

    def record(self, name: str, method: Sent, tensor: str) -> TensorRecord | None:
        """What is to be said of a merged tensor, once all is known that its elements follow from."""
        return self._merge(name, method).begun(tensor)[0]

    def piece(self, name: str, method: Sent, tensor: str, start: int, stop: int) -> np.ndarray:
        """uint8: elements start..stop-1 of a merged tensor, in its own dtype."""
        return self._merge(name, method).piece(tensor, start, stop)

    def select(self, name: str, selecting: Sent, steps: Sequence[Step], asked: Step | None = None) -> Any:
        """What the last of these steps answered, each done once; or what is `asked` after them."""
        if name not in self._selections:
            self._make_room(self._selections)
            self._selections[name] = _Selection(self._residents, selecting())
        return self._selections[name].answer(steps, asked)

    def leave(self, name: str) -> None:
        """Nothing more is asked about this merge or selection."""
        self._merges.pop(name, None)
        if (selection := self._selections.pop(name, None)) is not None:
            selection.close()

    def _merge(self, name: str, sent: Sent) -> _Merge:
        if name not in self._merges:
            self._make_room(self._merges)
            method = sent()
            method.statistics = self._statistics_of(method)
            # What is settled once for all ω takes room, which one p at a time has.
            reuse = all(other.method.known_as == method.known_as for other in self._merges.values())
            placed = self._residents.placed(method, reuse)
            if placed is None:
                raise NoRoomError("models that were to stay in memory have no room there")
            self._merges[name] = _Merge(method, placed)
        return self._merges[name]

    def _statistics_of(self, method: MergeMethod) -> dict[str, Any] | None:
        if method.known_as is None:
            return None
        key = method.known_as, tuple(map(identity, method.models))
        known = self._statistics[key] = self._statistics.pop(key, {})
        while len(self._statistics) > _MOST:
            del self._statistics[next(iter(self._statistics))]
        return known

    def _make_room(self, begun: Mapping[str, Any]) -> None:
        while len(begun) >= _MOST:
            self.leave(next(iter(begun)))


@dataclass
class _Merge:
    method: MergeMethod
    placed: MergeMethod
    _begun: dict[str, tuple[TensorRecord | None, Fill]] = field(default_factory=dict)

    def begun(self, tensor: str) -> tuple[TensorRecord | None, Fill]:
        if tensor not in self._begun:
            if len(self._begun) > 1:  # the one that is written, and the next
                del self._begun[next(iter(self._begun))]
            self._begun[tensor] = self.placed.tensor(self._info(tensor))
        return self._begun[tensor]

    def piece(self, tensor: str, start: int, stop: int) -> np.ndarray:
        import torch

        out = torch.empty(stop - start, dtype=self._info(tensor).dtype)
        if (ready := self.begun(tensor)[1](start, stop, out)) is not None:
            ready()
        values: np.ndarray = out.view(torch.uint8).numpy()
        return values

    def _info(self, tensor: str) -> Any:
        return self.method.rest[1].tensors[tensor]


class _Selection:
    """The shards that are here, in the middle of `select_over`; their masks are in memory."""

    def __init__(self, residents: Residents, selecting: Selecting):
        if not residents.selects(selecting.models):
            raise NoRoomError("models that were to stay in memory have no room there")
        models, ks = selecting.models, len(selecting.counts)
        first, last = residents.here(models)
        sizes = [size if first <= at < last else 0 for at, size in enumerate(models.sizes)]
        self._masks, self._stack = MasksInMemory(models.tasks, ks, sizes), ExitStack()
        (shard,) = residents.shards(models, selecting.counts, self._masks, selecting.budget)
        self._shard: SelectionShard = self._stack.enter_context(shard)
        self._answers: list[Any] = []

    def answer(self, steps: Sequence[Step], asked: Step | None) -> Any:
        for step in steps[len(self._answers) :]:
            self._answers.append(self._ask(step))
        return self._answers[len(steps) - 1] if asked is None else self._ask(asked)

    def _ask(self, step: Step) -> Any:
        what, *arguments = step
        return getattr(self._masks if what == "words" else self._shard, what)(*arguments)

    def close(self) -> None:
        self._stack.close()
