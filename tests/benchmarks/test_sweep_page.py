"""The page that benchmarks/demo/sweep_page.py writes of a sweep's figures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.demo import sweep_page
from cpift.sweep.results import summary
from tests.helpers.reports import made_up_sweep


def values(*numbers: float) -> dict[str, Any]:
    return {"values": list(numbers), "mean": 0.0, "low": None, "high": None}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Two p and two τ, three seeds; τ changes nothing at p = 0.1, which is one trial."""

    def figures(*numbers: float) -> dict[str, Any]:
        names = ("task.a.loss", "task.b.score", "mean_retention", "worst_retention", "mean_loss")
        return {name: values(*numbers) for name in names}

    def trial(number: int, points: list[tuple[float, float]], *numbers: float) -> dict[str, Any]:
        named = [{"regions.p": p, "groups.tau": tau} for p, tau in points]
        return {
            "number": number,
            "points": named,
            "groups": [[["a", "b"]]] * 3,
            "status": "done",
            "seconds": 1.0,
            "figures": {"final": figures(*numbers), "fused": figures(*numbers)},
        }

    found = {
        "name": "made-up",
        "points": 4,
        "seeds": [0, 1, 2],
        "confidence": 0.95,
        "tasks": {"a": "loss", "b": "choice"},
        "references": {"base": figures(0.1, 0.2, 0.3)},
        "reuse": [{"stage": "probe", "needed": 24, "made": 6, "seconds_needed": 240.0, "seconds_made": 60.0}],
        "trials": [
            trial(1, [(0.1, 0.2), (0.1, 0.3)], 0.5, 0.6, 0.7),
            trial(2, [(0.2, 0.2)], 0.6, 0.7, 0.8),
            trial(3, [(0.2, 0.3)], 0.8, 0.9, 1.0),
        ],
    }
    return sweep_page.rows_of(found)


def test_rows_hold_each_seeds_figures_and_nothing_that_follows_from_them(rows: list[dict[str, Any]]) -> None:
    assert [row.get("number") for row in rows] == [None, 1, 2, 3]
    found = rows[1]["figures"]["final"]
    assert set(found) == {"task.a.loss", "task.b.score", "mean_retention", "worst_retention"}
    assert all(one == [0.5, 0.6, 0.7] for one in found.values())
    assert json.loads(json.dumps(rows)) == rows


def test_effects_are_paired_by_seed_and_averaged_over_the_other_field(rows: list[dict[str, Any]]) -> None:
    """p: (0.6 + 0.8)/2 − 0.5 = 0.2 for each of the seeds; τ: half of it 0, half of it 0.2."""
    text = sweep_page.page(rows, "About it.")
    assert "|  | regions.p: 0.2 − 0.1 | groups.tau: 0.3 − 0.2 |" in text
    assert "| b, choice | **+20.0 [+20.0, +20.0]** | **+10.0 [+10.0, +10.0]** |" in text
    assert "| a, loss | **+0.200 [+0.200, +0.200]** |" in text


def test_every_point_has_its_cell(rows: list[dict[str, Any]]) -> None:
    """Half-width of three values 0.1 apart: 4.3027 · 0.1 / √3 = 0.248."""
    text = sweep_page.page(rows, "About it.")
    assert "About it." in text
    table = text.split("## Final model: b, choice")[1].split("##")[0]
    assert "| 0.1 | 60.0 ±24.8 | 60.0 ±24.8 |" in table
    assert "| 0.2 | 70.0 ±24.8 | 90.0 ±24.8 |" in table
    assert "| base | 0.200 ±0.248 | 20.0 ±24.8 |" in text


def test_a_sweeps_own_summary_has_what_the_page_needs() -> None:
    """As sweep.json holds it; the failed trial is left out of the tables."""
    rows = sweep_page.rows_of(json.loads(json.dumps(summary(made_up_sweep()))))
    assert rows[0]["references"]["base"]["mean_retention"] == [0.5, 0.5, 0.5]
    assert [row["status"] for row in rows[1:]] == ["done", "done", "done", "failed"]
