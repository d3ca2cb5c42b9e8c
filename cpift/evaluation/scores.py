"""What an evaluation says of a model, as scores.json has it. Light: whoever reads scores pays for no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

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
