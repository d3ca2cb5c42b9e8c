"""What tasks that arrive one after another cost: ΔA against ΔB of every method over its learning rates.

ΔA: score on A after B less that of A's own probe; ΔB: score on B less what A's probe has there, both larger is better.
Two methods are compared in ΔA at equal ΔB, that of a named point: in a straight line between the points of a method's
learning rates, sorted by ΔB, with each seed and each draw of test rows anew. A method that does not get so far with
some seed has no value there: nothing is continued beyond its points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpift.compare.config import Arrival
from cpift.compare.record import Record
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.measures import Forgetting, Scores, forgetting

Pair = tuple[str, str]


@dataclass(frozen=True)
class Arrived:
    """One method on A → B at one learning rate."""

    label: str
    pair: Pair
    learning_rate: float
    change: Forgetting


class Frontiers:
    """All methods of a record for tasks that arrive. judged: the tasks that count."""

    def __init__(self, record: Record, scores: Scores, judged: Sequence[str]):
        self._scores, self._judged = scores, judged
        rows = {row.method: row for row in record.rows if row.kind == "arrival"}
        self._names: dict[tuple[str, Pair, float], str] = {}
        for name, row in rows.items():
            assert row.pair is not None
            self._names[row.fields["arrival"], row.pair, float(row.fields["learning_rate"])] = name
        said: dict[str, Any] | None = record.header.comparison.get("arrival")
        self._at = None if said is None else Arrival.model_validate(said).at

    @property
    def labels(self) -> list[str]:
        """The methods, in the order of the record."""
        return list(dict.fromkeys(label for label, _, _ in self._names))

    @property
    def pairs(self) -> list[Pair]:
        """Every A → B."""
        return list(dict.fromkeys(pair for _, pair, _ in self._names))

    @property
    def points(self) -> list[Arrived]:
        """Every point of every line, by pair, method and learning rate."""
        return [
            Arrived(
                label, pair, rate, forgetting(self._scores, self._names[label, pair, rate], f"probe {pair[0]}", pair)
            )
            for pair in self.pairs
            for label in self.labels
            for rate in self._rates(label, pair)
        ]

    def _rates(self, label: str, pair: Pair) -> list[float]:
        return sorted(rate for one, other, rate in self._names if (one, other) == (label, pair))

    # ---- at equal ΔB -------------------------------------------------------------------------------------------------

    @property
    def at(self) -> tuple[str, float] | None:
        """The method and the learning rate at whose ΔB methods are compared, where the record has them on a pair."""
        return self._at if self._at is not None and self.compared else None

    @property
    def why_not(self) -> list[str]:
        """What is said where methods were to be compared at equal ΔB, and are not."""
        if self._at is None or not self.pairs or self.compared:
            return []
        return ["At equal ΔB nothing is compared: of no A → B both tasks count, and the point that ΔB is of is there."]

    @property
    def compared(self) -> list[Pair]:
        """The pairs that are compared: both tasks count, and the point that ΔB is taken from is there."""
        both = [pair for pair in self.pairs if set(pair) <= set(self._judged)]
        return [pair for pair in both if self._at is not None and (self._at[0], pair, self._at[1]) in self._names]

    def kept(self, label: str) -> np.ndarray:
        """[seeds, 1 + draws]: ΔA at equal ΔB, mean over the pairs that are compared. NaN: it does not get there."""
        assert self._at is not None
        means: np.ndarray = np.mean([self._kept(label, pair, self._at) for pair in self.compared], axis=0)
        return means

    def _kept(self, label: str, pair: Pair, at: tuple[str, float]) -> np.ndarray:
        wanted = self._changes(at[0], pair, at[1])[1]
        points = [self._changes(label, pair, rate) for rate in self._rates(label, pair)]
        if not points:
            return np.full_like(wanted, np.nan)
        return between(np.stack([second for _, second in points]), np.stack([first for first, _ in points]), wanted)

    def _changes(self, label: str, pair: Pair, rate: float) -> tuple[np.ndarray, np.ndarray]:
        """ΔA and ΔB, [seeds, 1 + draws]."""
        after, before, scores = self._names[label, pair, rate], f"probe {pair[0]}", self._scores
        first, second = (scores.of(after, task) - scores.of(before, task) for task in pair)
        return first, second

    def difference(self, method: str, rival: str) -> np.ndarray:
        """[seeds, 1 + draws]: by how much more of A a method keeps at equal ΔB."""
        differences: np.ndarray = self.kept(method) - self.kept(rival)
        return differences

    def estimates(self) -> list[tuple[str, Estimate, Estimate]]:
        """Of each method ΔA at equal ΔB, and that less the ΔA of the method that ΔB is taken from."""
        if self.at is None:
            return []
        first = self.at[0]
        return [
            (label, self._scores.estimate(self.kept(label)), self._scores.estimate(self.difference(label, first)))
            for label in self.labels
        ]


def between(x: np.ndarray, y: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """y at `wanted` on the straight lines between points sorted by x; NaN outside of them.

    x, y: float64 [points, …]; wanted: […].
    """
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    found = np.where(x[0] == wanted, y[0], np.nan)
    for left, right, low, high in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        width = right - left
        share = np.divide(wanted - left, width, out=np.zeros_like(width), where=width > 0)
        inside = np.isnan(found) & (left <= wanted) & (wanted <= right)
        found = np.where(inside, low + share * (high - low), found)
    result: np.ndarray = found
    return result
