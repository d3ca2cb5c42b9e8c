"""What a sweep may judge by is one table: names, values, signs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cpift.sweep import objectives
from cpift.sweep.config import Objective
from cpift.sweep.objectives import OF_RUN, OF_TASK, OfRun, figure_named, figure_problem, figures, less_is_better


def scored(score: float | None, loss: float) -> dict[str, Any]:
    return {"metric": "loss" if score is None else "number", "score": score, "loss": loss, "rows": 2, "tokens": 4}


SCORES = {
    "base": {"a.b": scored(0.1, 3.0), "c": scored(None, 2.0)},
    "probe a.b": {"a.b": scored(0.8, 1.0), "c": scored(None, 2.0)},
    "probe c": {"a.b": scored(0.1, 3.0), "c": scored(None, 1.0)},
    "final": {"a.b": scored(0.4, 1.5), "c": scored(None, 1.25)},
}


def test_every_row_has_its_value() -> None:
    found = figures(SCORES, ["a.b", "c"], "final")
    assert found.pop("mean_retention") == pytest.approx((0.5 + 0.8) / 2)
    assert found == {
        "mean_loss": 1.375,
        "worst_retention": 0.5,
        "task.a.b.loss": 1.5,
        "task.a.b.score": 0.4,
        "task.a.b.retention": 0.5,
        "task.c.loss": 1.25,
        "task.c.retention": 0.8,
    }


def test_a_figure_without_a_meaning_is_left_out() -> None:
    unlearnt = SCORES | {"probe a.b": SCORES["base"], "probe c": SCORES["base"]}
    left_out = {name for name, one in OF_RUN.items() if one.learnt}
    assert left_out.isdisjoint(figures(unlearnt, ["a.b", "c"], "final"))
    assert {name for name, one in OF_TASK.items() if one.learnt} == {"retention"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("accuracy", "'accuracy' is no figure"),
        ("task.a.b.accuracy", "is no figure"),
        ("task.score", "is no figure"),
        ("loss", "is no figure"),
        ("task.d.loss", "there is no task 'd' → the run has a.b, c"),
        ("task.c.score", "the metric of c is its loss → write task.c.loss"),
        ("task.a.b.score", ""),
        ("mean_retention", ""),
    ],
)
def test_what_a_run_does_not_have_is_refused(name: str, said: str) -> None:
    found = figure_problem(name, {"a.b": "number", "c": "loss"}, "objectives")
    assert (found is None) if not said else said in str(found)


def test_less_is_better_of_losses() -> None:
    names = [*OF_RUN, *(f"task.a.{kind}" for kind in OF_TASK)]
    assert {name for name in names if less_is_better(name)} == {"mean_loss", "task.a.loss"}
    assert [Objective(figure=name, mode=None).sign for name in ("mean_loss", "task.a.score")] == [-1, 1]
    assert Objective(figure="mean_loss", mode="max").sign == 1


def test_another_figure_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = OfRun(lambda run, model: max(run.scores[model][task]["loss"] for task in run.tasks), less=True)
    monkeypatch.setattr(objectives, "OF_RUN", {**OF_RUN, "worst_loss": worst})
    assert figures(SCORES, ["a.b", "c"], "final")["worst_loss"] == 1.5
    assert figure_named("worst_loss") is worst
    assert Objective(figure="worst_loss", mode=None).sign == -1
