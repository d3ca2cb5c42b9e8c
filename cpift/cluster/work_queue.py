"""Work that is handed out to workers, each item to one at a time, and to another one where a worker was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class WorkItem:
    """title: of what is in a queue at one time all differ. failures: lost or failed workers that it still survives."""

    title: str
    content: bytes
    failures: int


@dataclass(frozen=True)
class Outcome:
    """What became of an item. failure: why there is no result."""

    result: Any = None
    failure: str | None = None


class WorkQueue:
    """Items that wait, items that a worker holds, and outcomes that nobody has fetched."""

    def __init__(self) -> None:
        self._waiting: deque[WorkItem] = deque()
        self._held: dict[str, WorkItem] = {}  # by worker
        self._outcomes: dict[str, Outcome] = {}  # by title

    def put(self, items: Iterable[WorkItem]) -> None:
        self._waiting.extend(items)

    def take(self, worker: str) -> bytes | None:
        """The content of the next item, which this worker holds from now on; None where nothing waits."""
        if not self._waiting:
            return None
        item = self._held[worker] = self._waiting.popleft()
        return item.content

    def finish(self, worker: str, outcome: Outcome) -> None:
        """A worker has done its item, or says that it would fail for anybody."""
        item = self._held.pop(worker, None)
        if item is not None:
            self._outcomes[item.title] = outcome

    def lose(self, worker: str, why: str) -> None:
        """A worker ended, or cannot go on: its item is the next for another, until it has failed too often."""
        item = self._held.pop(worker, None)
        if item is None:
            return
        if item.failures > 0:
            self._waiting.appendleft(replace(item, failures=item.failures - 1))
        else:
            self._outcomes[item.title] = Outcome(failure=why)

    @property
    def holders(self) -> list[str]:
        return list(self._held)

    def outcomes(self) -> dict[str, Outcome]:
        """By title; each once."""
        ended, self._outcomes = self._outcomes, {}
        return ended
