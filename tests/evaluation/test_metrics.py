"""A user's metric: what is refused of what it gives, and what records keep of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from cpift.errors import DataError
from cpift.evaluation.metrics import METRICS, Metric, Reply, described, each, metric_of
from cpift.evaluation.retention import chance_of
from cpift.rows.examples import Example, Message

REPLIES = [
    Reply(Example((Message("user", "1+1"), Message("assistant", "it is 2")), answer="2"), text)
    for text in ("2", "two", "")
]


def scored(scores: Callable[[Sequence[Reply]], Any], **fields: Any) -> list[float]:
    return Metric("mine", scores, **fields).scored(REPLIES, "tasks.t.test")


def test_scores_are_their_place_in_the_range() -> None:
    assert scored(lambda replies: [1, 0.5, 0]) == [1.0, 0.5, 0.0]
    assert scored(lambda replies: np.array([1.0, 3.0, 5.0]), range=(1, 5)) == [0.0, 0.5, 1.0]
    assert scored(each(lambda reply: reply.text == reply.reference)) == [1.0, 0.0, 0.0]
    assert (REPLIES[0].prompt, REPLIES[0].reference, REPLIES[0].example.reply) == ("1+1", "2", "it is 2")
    assert Metric("mine", each(len), range=(1, 5), chance=2).guessed == 0.25  # type: ignore[arg-type]


def fails(replies: Sequence[Reply]) -> list[float]:
    return [1 / len(reply.text) for reply in replies]


def leaves(replies: Sequence[Reply]) -> list[float]:
    raise SystemExit(3)


def fails_together(replies: Sequence[Reply]) -> list[float]:
    return [1.0] if len(replies) == 1 else [1.0 / 0]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (lambda replies: [1.0, 0.0], "scores: metric 'mine': 2 scores for 3 replies → give one for each"),
        (lambda replies: [1.0, math.nan, 0], "row 2: metric 'mine' gives nan, its range is 0 to 1 → give a number"),
        (lambda replies: [1.0, 0.0, 55.0], "row 3: metric 'mine' gives 55.0, its range is 0 to 1"),
        (lambda replies: [-0.1, -0.2, -0.3], "3 of 3 rows, row 1 first: metric 'mine' gives -0.1, its range is 0 to 1"),
        (lambda replies: ["1", 0, 0], "row 1: metric 'mine' gives '1', its range"),
        (lambda replies: [None, 0, 0], "row 1: metric 'mine' gives None, its range"),
        (lambda replies: 1.0, "scores: metric 'mine': gives 1.0, which is no list → give one for each reply"),
        (fails, "row 3: metric 'mine': reply '': ZeroDivisionError: division by zero → mend the metric"),
        (leaves, f"row 1: metric 'mine': reply {REPLIES[0].text!r}: SystemExit: 3"),
        (fails_together, "all rows together: metric 'mine': ZeroDivisionError: float division by zero"),
    ],
)
def test_what_is_no_score_is_refused_by_row(scores: Callable[[Sequence[Reply]], Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"tasks.t.test, {said}")):
        scored(scores)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "give `scores`"),
        ({"scores": len, "by_loss": True}, "give `scores`"),
        ({"scores": 3}, "a function as `scores`"),
        ({"scores": len, "range": (1.0, 1.0)}, r"range (1.0, 1.0) → give two numbers, the lower first"),
        ({"scores": len, "range": (0.0, math.inf)}, "give two numbers"),
        ({"scores": len, "chance": 50}, "chance 50 is not within range (0.0, 1.0)"),
    ],
)
def test_a_metric_that_says_nothing_or_too_much_is_none(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Metric("mine", **fields)


def test_a_plain_text_cannot_be_answered() -> None:
    plain = Example((Message("assistant", "once upon a time"),), plain=True)
    assert Metric("mine", each(len)).wrong_with(plain) == ("a plain text has no prompt to answer", "set metric: loss")  # type: ignore[arg-type]
    assert METRICS["loss"].wrong_with(plain) is None


def test_a_check_that_fails_names_its_row_too() -> None:
    metric = Metric("mine", each(len), problem=lambda example: (example.answers[0], ""))  # type: ignore[arg-type, attr-defined]
    what, remedy = metric.wrong_with(REPLIES[0].example) or ("", "")
    assert what.startswith("metric 'mine' fails on it (AttributeError: ")
    assert remedy == "mend its `problem`"
    wordy = Metric("mine", each(len), problem=lambda example: "long")  # type: ignore[arg-type,return-value]
    assert "TypeError: gives 'long', neither None nor two texts" in str(wordy.wrong_with(REPLIES[0].example))
    assert list(Metric("mine", lambda replies: (1.0 for _ in replies)).scored(REPLIES, "t")) == [1.0] * 3  # type: ignore[arg-type, return-value]


def test_records_are_read_without_the_code() -> None:
    score = {"metric": "my_metrics:match", "score": 0.5, "title": "matches, %", "counted": True, "chance": 0.25}
    assert (described(score).title, described(score).counted, chance_of(score)) == ("matches, %", True, 0.25)
    assert described({"metric": "number"}) is METRICS["number"]
    assert metric_of("/x/my_metrics.py:match").title == "my_metrics:match, %"
    assert not metric_of("my_metrics:match").by_loss
