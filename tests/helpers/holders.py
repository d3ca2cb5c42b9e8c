"""Processes that hold models, without processes: what is sent is pickled, and they die as often as they are to."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from cpift.merging.resident.engine import ResidentMerging, asking
from cpift.merging.resident.holder import Holder
from cpift.merging.resident.holders import Holders, LostError
from cpift.merging.resident.residents import OWN_COPIES, Residents, Room

ROOM = 1 << 30


class Asked:
    """One of `width` holders, as it is asked. every: after so many calls another takes its place; last: after so many
    none does. calls: what was asked for."""

    def __init__(self, number: int, width: int, room: Room, limit: int, every: int = 0, last: int = 0):
        self._make = partial(Residents, [None], limit, room, number, width)
        self._every, self._last, self._lock = every, last, threading.Lock()
        self.calls, self.lost = Counter[str](), 0
        self.residents = self._make()
        self._holder = Holder(self.residents)

    def __call__(self, what: str, *arguments: Any) -> Callable[[], Any]:
        with self._lock:
            self.calls[what] += 1
            if self._last and self.calls.total() > self._last:
                return self._gone
            if self._every and self.calls.total() % self._every == 0:
                self.lost, self.residents = self.lost + 1, self._make()
                self._holder = Holder(self.residents)
            try:
                answer = pickle.dumps(getattr(self._holder, what)(*pickle.loads(pickle.dumps(arguments))))
            except Exception as error:
                return partial(_raise, error)
        return lambda: pickle.loads(answer)

    def _gone(self) -> None:
        raise LostError("no other takes its place")


def _raise(error: Exception) -> None:
    raise error


class _Sent:
    def __init__(self, held: bytes):
        self._held = held

    def __call__(self) -> Any:
        return pickle.loads(self._held)


def holders(width: int, room: Room = OWN_COPIES, limit: int = ROOM, every: int = 0, last: int = 0) -> Holders:
    asks = [Asked(number, width, room, limit, every, last) for number in range(width)]
    return Holders(asks, lambda what: _Sent(pickle.dumps(what)), room, limit)


def merging(of: Holders) -> ResidentMerging:
    return asking(None, of)
