"""Evaluations are cut so that every worker has something to do until the last ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cpift.config.run import ResourcesConfig
from cpift.config.tasks import EvaluationConfig
from cpift.pipeline.engine import Scoring, in_parts, name_of


def scorings(count: int) -> list[Scoring]:
    one = Scoring("", Path("m"), (), EvaluationConfig(), ResourcesConfig(), kept=Path("results"))
    return [replace(one, title=f"m{number}") for number in range(count)]


@pytest.mark.parametrize(
    ("models", "workers", "parts"),
    [(7, 2, [2]), (1, 3, [3]), (2, 5, [2, 2]), (5, 3, []), (4, 2, []), (3, 1, []), (1, 100, [8])],
)
def test_models_that_do_not_come_out_even_are_cut(models: int, workers: int, parts: list[int]) -> None:
    given = scorings(models)
    first, cut = in_parts(given, workers)
    assert cut == given[models - len(cut) :]
    whole = [scoring for scoring in first if scoring.part is None]
    assert whole + cut == given
    names = [name_of(scoring) for scoring in first]
    assert len(set(names)) == len(names) == len(whole) + sum(parts)
    assert [scoring.part for scoring in first[len(whole) :]] == [(k, n) for n in parts for k in range(n)]


def test_without_a_place_for_results_nothing_is_cut() -> None:
    given = [replace(scoring, kept=None) for scoring in scorings(3)]
    assert in_parts(given, 2) == (given, [])
