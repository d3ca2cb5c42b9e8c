"""What an evaluation says of a model, as scores.json has it. Light: whoever reads scores pays for no torch.

Until it is over, results of test rows are kept as they come: for the evaluation that follows a killed one, and for
workers that share a model. A line of a file is a batch; whoever scores writes a file of its own and reads all.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from cpift.disk.files import read_json
from cpift.evaluation.estimates import Estimate

SCORES = "scores.json"


class ScoredExample(TypedDict, total=False):
    """A test row: every one has `loss` and `tokens`, the rest as its metric has it."""

    loss: float  # nats per answer token
    tokens: int  # of the answer
    score: float  # 0..1
    prediction: str
    option_nll: list[float]  # nats, of each option of a choice
    judge: str  # what a judge replied


class Score(TypedDict, total=False):
    """A model on a task. `scores.json` has the first six of every task, `retention.condensed` no `examples`."""

    metric: str
    score: float | None  # 0..1; None where the metric is the loss
    loss: float  # nats per answer token
    tokens: int
    rows: int
    examples: list[ScoredExample]
    title: str  # of a user's metric, as `counted`
    counted: bool
    chance: float  # what guessing scores
    gain: Estimate  # of a task's own probe over θ0


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(element) for name, element in value.items()}
    if isinstance(value, list):
        return [finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Later(TypedDict, total=False):
    data: dict[str, str]  # by task, what its rows were
    merged: Any  # of a model that was merged to be scored, its `merging.in_memory.MergeRecord`


class Evaluation(_Later):
    """What whoever scored a model hands back."""

    scores: dict[str, Score]  # by task
    seconds: float
    device: str


OnResult = Callable[[str, Evaluation], None]  # a model's title


def read_scores(folder: Path) -> dict[str, Score]:
    """A model's scores by task, from an evaluation's folder."""
    scores: dict[str, Score] = read_json(folder / SCORES)
    return scores


# ---- while it is not over -------------------------------------------------------------------------------------------


class RowResult(ScoredExample, total=False):
    """What is kept of a row. written: the tokens of the model's own reply."""

    written: list[int]


class KeptResults:
    """Of the rows of one task, by their place. No folder: they are kept in memory alone."""

    def __init__(self, folder: Path | None, rows: str):
        """rows: what they are, as a word: a file may have been another for a while. folder: named by all else that
        decides the results."""
        self._file = None if folder is None else folder / f"{rows}-{secrets.token_hex(8)}.jsonl"
        files = sorted(folder.glob(f"{rows}-*.jsonl")) if folder else []
        self._known = dict(result for file in files for result in _read(file))

    def add(self, results: Mapping[int, RowResult]) -> None:
        """Those of a batch."""
        self._known.update(results)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(list(results.items())) + "\n")

    def has(self, places: Iterable[int]) -> bool:
        return all(place in self._known for place in places)

    def all(self, rows: int) -> list[RowResult]:
        """In the order of the rows."""
        return [self._known[place] for place in range(rows)]


def _read(file: Path) -> Iterator[tuple[int, RowResult]]:
    for line in file.read_bytes().split(b"\n"):
        try:
            batch = json.loads(line)
        except ValueError:  # cut off, and the end after the last line
            continue
        yield from ((int(place), cast(RowResult, result)) for place, result in batch)
