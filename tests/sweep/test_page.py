"""The sweep's report on made-up figures: what it computes, what it says, and that the page stands alone."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cpift.disk.top_files import REPORTS, SWEEP_FILES
from cpift.evaluation.estimates import estimate
from cpift.sweep.objectives import figures
from cpift.sweep.page import sweep_page
from cpift.sweep.plots import leaf_order, single_linkage
from cpift.sweep.results import failures, results_table, summary, write_results
from cpift.sweep.scores import SweepData, best_trial, pareto_front
from cpift.sweep.verdict import verdict
from tests.helpers.reports import Page, made_up_sweep


@pytest.fixture
def data() -> SweepData:
    return made_up_sweep()


def test_best_and_pareto_front(data: SweepData) -> None:
    best = best_trial(data)
    assert best is not None
    assert best.number == 2
    assert [trial.number for trial in pareto_front(data)] == [2, 3]
    least = replace(data, objectives=[("task.a.loss", -1)])
    found = best_trial(least)
    assert found is not None
    assert found.number == 2, "the smallest loss"


def test_figures_of_one_run() -> None:
    """Retention 0.4 ÷ 0.8 and, for the loss, 1 ÷ 2; the worst of both."""
    score = {"metric": "choice", "tokens": 1, "rows": 1}
    loss = score | {"metric": "loss", "score": None}
    scores = {
        "probe a": {"a": score | {"score": 0.8, "loss": 1.0}, "b": loss | {"loss": 3.0}},
        "probe b": {"a": score | {"score": 0.0, "loss": 2.0}, "b": loss | {"loss": 1.0}},
        "final": {"a": score | {"score": 0.4, "loss": 1.5}, "b": loss | {"loss": 2.0}},
    }
    found = figures(scores, ["a", "b"], "final")
    assert found == {
        "mean_loss": 1.75,
        "mean_retention": 0.5,
        "worst_retention": 0.5,
        "task.a.loss": 1.5,
        "task.a.score": 0.4,
        "task.a.retention": 0.5,
        "task.b.loss": 2.0,
        "task.b.retention": 0.5,
    }
    for broken in (math.nan, math.inf):
        scores["final"]["b"]["loss"] = broken
        left = figures(scores, ["a", "b"], "final")
        assert not {"mean_loss", "task.b.loss"} & left.keys(), "it would be the best of all"
        assert left["task.a.loss"] == 1.5
        found_over = estimate([1.5, broken], 0.95)
        assert (found_over.low, found_over.high) == (None, None)


def test_verdict_says_what_is_best_what_it_beats_and_how_little_that_proves(data: SweepData) -> None:
    text = " ".join(verdict(data))
    assert "6 points over regions.p and groups.tau were 4 different trials; 2 came to the same groups" in text
    assert "trial 2 (regions.p = 0.1, groups.tau = 0.5 or 0.6), 0.950 (95% interval 0.826 to 1.074, n = 3)" in text
    assert "Next: trial 3" in text
    assert "Their intervals overlap" in text
    assert "better than the staged backbone alone in the same trial (0.800)" in text
    assert "The best of 3 was chosen on the test rows" in text
    nothing = replace(data, trials=data.trials[3:])
    assert verdict(nothing) == ["No trial has finished: there is nothing to compare."]


@pytest.mark.slow
def test_page_stands_alone_and_shows_failures(data: SweepData) -> None:
    text = sweep_page(data)
    page = Page(text)
    assert page.open == []
    assert "script" not in page.seen
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    order = ["Best by mean retention: trial 2", "cpift run best.yaml", "<svg", "<table", 'id="scores"']
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert text.count("<svg") == text.count('role="img"><title>') == text.count('class="behind"')
    assert ">groups.tau<" in text, "the legend names its field"
    assert "1 of 4 trials failed" in text
    assert "probe a: &lt;the loss&gt; is nan" in text
    assert text.count('class="edge"') == 2 + 1, "the best cells of both heat maps"
    assert "±0.124" in text
    for words in ("[2]", "p = 0.1, seed 0", "in separate runs", "begun 2020-01-02 03:04"):
        assert words in text, words


def test_page_without_a_finished_trial(data: SweepData) -> None:
    empty = replace(data, trials=data.trials[3:], references={}, overlaps=[], reuse=[], best_yaml="")
    assert "No trial has finished" in sweep_page(empty)


@pytest.mark.slow
def test_many_fields_have_parallel_coordinates(data: SweepData) -> None:
    space = data.space | {"fusion.space": ["weights", "delta"]}
    trials = [
        replace(trial, points=[p | {"fusion.space": ["weights", "delta"][i % 2]} for p in trial.points])
        for i, trial in enumerate(data.trials)
    ]
    text = sweep_page(replace(data, space=space, trials=trials))
    assert "One line a point" in text
    assert "Each cell is the best over 1 more field." in text


@pytest.mark.slow
def test_results_are_written_for_people_and_machines(data: SweepData, tmp_path: Path) -> None:
    report = write_results(data, tmp_path)
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written.pop("written_by")
    assert written == json.loads(json.dumps(summary(data)))
    assert (tmp_path / "best.yaml").read_text().splitlines()[1:] == ["name: best"]
    rows = list(csv.DictReader((tmp_path / "trials.csv").open(encoding="utf-8")))
    assert [row["trial"] for row in rows] == ["1", "2", "2", "3", "4", "4"], "one line a point"
    assert (rows[1]["groups.tau"], rows[1]["mean_retention"], rows[4]["mean_retention"]) == ("0.5", "0.95", "")
    told = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert told.startswith("# made-up\n\nBest by mean retention: trial 2")
    assert "| 4 | 0.2 | 0.5 or 0.6 | failed | failed | a → b |" in told
    assert set(SWEEP_FILES) | {REPORTS} == {file.name for file in tmp_path.iterdir()}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table(data))
    shown = console.export_text()
    for words in ("0.9500", "0.5 or 0.6", "failed"):
        assert words in shown
    assert failures(data) == ["regions.p 0.2, groups.tau 0.5: probe a: <the loss> is nan"]


def test_single_linkage_is_connected_components_at_every_threshold() -> None:
    """0–1 at 0.3 and 1–2 at 0.4: at τ = 0.35 only 1 and 2 are one group, at 0.3 all."""
    merges = single_linkage([[1, 0.3, 0.2], [0.3, 1, 0.4], [0.2, 0.4, 1]])
    assert [(level, sorted(one | other)) for level, one, other in merges] == [(0.4, [1, 2]), (0.3, [0, 1, 2])]
    order = leaf_order(merges, 3)
    assert sorted(order) == [0, 1, 2]
    assert abs(order.index(1) - order.index(2)) == 1
