"""One definition of retention, wherever it is computed; and what is said where a probe learnt nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cpift.compare.files import document
from cpift.compare.findings import Findings
from cpift.compare.record import BASE, OURS, PROBES, Header, Record, Row, kept_scores
from cpift.evaluation.estimates import estimate, weighted_mean
from cpift.evaluation.retention import DEFINITION, Learning, condensed, judged, learning_of, sentences
from cpift.report.data import ReportData, retention, standing, summary, verdict
from cpift.report.write import first_sentences
from cpift.sweep.objectives import figures
from tests.helpers.scores import Scores, scored


def drawn(seed: int) -> tuple[dict[str, str], Scores]:
    """A run of four tasks, by chance some of them not learnt: with scores that are 0, or those of guessing."""
    source = random.Random(seed)
    tasks = {"a": "choice", "b": "loss", "c": "number", "d": "rouge"}
    makers: dict[str, Callable[[], Any]] = {
        "choice": lambda: float(source.random() < 0.5),
        "loss": lambda: (round(source.uniform(0.5, 2), 3), source.randint(1, 9)),
        "number": lambda: float(source.random() < 0.2),
        "rouge": lambda: round(source.random(), 3),
    }
    models = ["base", *(f"probe {task}" for task in tasks), "final"]
    tokens = [source.randint(1, 9) for _ in range(5)]
    scores: Scores = {model: {} for model in models}
    for task, metric in tasks.items():
        for model in models:
            rows = [makers[metric]() for _ in range(5)]
            rows = [(row[0], count) for row, count in zip(rows, tokens, strict=True)] if metric == "loss" else rows
            scores[model][task] = scored(metric, rows)
    return tasks, scores


def report_of(tasks: dict[str, str], scores: Scores) -> ReportData:
    lists = ("jaccard", "groups", "slerp", "checks", "provenance", "warnings")
    empty: dict[str, Any] = {name: [] for name in lists} | {name: {} for name in ("cores", "regions", "curves")}
    return ReportData(
        name="x", config_yaml="", models=list(scores), tasks=list(tasks), scores=condensed(scores), chance=0, tau=1,
        **empty,
    )  # fmt: skip


def record_of(tasks: dict[str, str], scores: Scores) -> Record:
    """The same as a comparison's record of one seed."""
    own = {task: scores[f"probe {task}"][task] for task in tasks}
    rows = [
        Row(name, kind, 0, None, None, {}, [list(tasks)], 10, 1.0, kept_scores(found))
        for name, kind, found in (
            (BASE, "reference", scores["base"]), (PROBES, "reference", own), (OURS, "cpift", scores["final"])
        )
    ]  # fmt: skip
    chance = {task: one.chance for task, one in learning_of(list(tasks), scores).items() if one.chance is not None}
    config = {"model": {"scratch": {}}, "probe": {"steps": 1, "batch_size": 1, "learning_rate": 1.0}}
    config |= {"backbone": {"source": "pretrained"}, "groups": {"tau": 1.0, "order": "given"}, "regions": {"p": 0.1}}
    overlaps = [{"seed": 0, "jaccard": [[1, 0.5], [0.5, 1]], "chance": 0.1, "groups": [list(tasks)]}]
    header = Header("x", config, {"methods": ["*"]}, tasks, [0], 1, {}, "cpu", None, 0.95, 100, overlaps, chance=chance)
    return Record(header, rows)


@pytest.mark.parametrize("seed", range(12))
def test_runs_sweeps_comparisons_and_summaries_agree(seed: int) -> None:
    tasks, scores = drawn(seed)
    learning = learning_of(list(tasks), scores)
    by_hand: dict[str, float] = {}
    for task, metric in tasks.items():
        probe, base, final = (scores[model][task] for model in (f"probe {task}", "base", "final"))
        if metric == "loss":
            learnt, ratio = probe["loss"] < base["loss"], probe["loss"] / final["loss"]
        else:
            learnt = probe["score"] > max(base["score"], 0.25 if metric == "choice" else 0)
            ratio = final["score"] / probe["score"] if probe["score"] else math.nan
        by_hand |= {task: ratio} if learnt else {}
    assert judged(learning) == list(by_hand)
    run, swept = report_of(tasks, scores), figures(scores, list(tasks), "final")
    line = Findings(record_of(tasks, scores)).line(OURS)
    told = summary(run)["models"]["final"]["mean_retention"]
    assert {task for task in tasks if retention(run, "final", task) is not None} == set(by_hand)
    if not by_hand:
        assert standing(run, "final") is None
        assert told is None
        assert "mean_retention" not in swept
        assert math.isnan(line.mean.mean)
        return
    mean = sum(by_hand.values()) / len(by_hand)
    found = standing(run, "final")
    assert found is not None
    assert [found.mean, told, swept["mean_retention"]] == pytest.approx([mean] * 3)
    assert line.mean.mean == pytest.approx(mean, abs=2e-4)  # a record has five digits
    assert [found.worst, swept["worst_retention"]] == pytest.approx([min(by_hand.values())] * 2)
    assert line.worst.mean == pytest.approx(min(by_hand.values()), abs=2e-4)


CASES = {
    "better than θ0": (scored("number", [1, 1, 0, 0]), scored("number", [0, 0, 0, 0]), ""),
    "as good as θ0": (scored("number", [1, 0, 0, 0]), scored("number", [0, 1, 0, 0]), "probe 25.0 %, θ0 25.0 %"),
    "both nothing": (scored("rouge", [0, 0]), scored("rouge", [0, 0]), "probe 0.0 %, θ0 0.0 %"),
    "worse": (scored("rouge", [0.1, 0.2]), scored("rouge", [0.3, 0.2]), "probe 15.0 %, θ0 25.0 %"),
    "above θ0, below guessing": (
        scored("choice", [1, 0, 0, 0], options=2),
        scored("choice", [0, 0, 0, 0], options=2),
        "probe 25.0 %, guessing 50.0 %",
    ),
    "as good as guessing": (
        scored("choice", [1, 1, 0, 0], options=2),
        scored("choice", [0] * 4, options=2),
        "probe 50.0 %, guessing 50.0 %",
    ),
    "next to nothing": (
        scored("rouge", [0.04, 0.04]),
        scored("rouge", [0.0, 0.02]),
        "probe 4.0 %, less than 5 %",
    ),
    "one right of 25": (scored("number", [1] + [0] * 24), scored("number", [0] * 25), "probe 4.0 %, less than 5 %"),
    "one right of 20": (scored("number", [1] + [0] * 19), scored("number", [0] * 20), ""),
    "a small loss": (scored("loss", [(0.01, 1)]), scored("loss", [(0.02, 1)]), ""),
    "lower loss": (scored("loss", [(1.0, 3), (2.0, 1)]), scored("loss", [(2.0, 3), (1.0, 1)]), ""),
    "higher loss": (scored("loss", [(1.0, 1)]), scored("loss", [(0.5, 1)]), "probe loss 1.000, θ0 loss 0.500"),
}


@pytest.mark.parametrize("name", CASES)
def test_why_a_task_is_left_out(name: str) -> None:
    probe, base, why = CASES[name]
    learnt = learning_of(["t"], {"base": {"t": base}, "probe t": {"t": probe}})["t"]
    assert learnt.left_out == why


def test_what_is_in_doubt_is_said_first_and_the_task_stays_in_the_tables() -> None:
    rows = {"a": ([1, 1, 1, 1], [0, 0, 0, 0]), "b": ([1, 0, 0, 0], [1, 0, 0, 0]), "c": ([1, 1, 0, 0], [1, 0, 0, 0])}
    scores: Scores = {model: {} for model in ("base", "probe a", "probe b", "probe c", "final")}
    for task, (probe, base) in rows.items():
        for model in scores:
            scores[model][task] = scored("number", probe if model == f"probe {task}" else base)
    tasks = dict.fromkeys(rows, "number")
    data, record = report_of(tasks, scores), record_of(tasks, scores)
    first, second = sentences(learning_of(list(rows), scores))
    assert "Left out of mean retention" in first
    assert first.endswith("b (probe 25.0 %, θ0 25.0 %).")
    assert "too few to show" in second
    assert second.endswith("c (gain +25.0 [-54.6, +104.6] points).")
    assert first_sentences(data) == verdict(data)[:2] == [first, second]
    assert Findings(record).verdict()[0] == first
    text = document(record, "x")[0]
    assert text.index(first) < text.index("All methods")
    assert "b, %" in text
    assert DEFINITION in text
    told = summary(data)
    assert told["retention"]["tasks"] == ["a", "c"]
    assert told["retention"]["left_out"] == {"b": "probe 25.0 %, θ0 25.0 %"}
    assert set(told["models"]["final"]["scores"]) == set(rows)
    worst = replace(data, tasks=["b"])
    assert "No own probe learnt its task" in verdict(worst)[0]
    assert standing(worst, "final") is None


def test_several_seeds_are_judged_by_their_mean() -> None:
    bad = Learning("t", "number", 0.5, 0.25, None, estimate([0.25, 0.25], 0.95), always=False)
    assert bad.left_out == "its probe scored nothing with some seed"
    assert replace(bad, always=True).left_out == ""
    assert replace(bad, always=True, gain=estimate([0.5, 0.0], 0.95)).not_shown.startswith("gain +25.0 [")


def test_the_interval_of_a_gain() -> None:
    """Of equal weights Student's; of others that of as many rows as tokens where each token is a row of its own."""
    values = [0.5, -0.25, 1.0, 0.0]
    plain, same = weighted_mean(values, [3] * 4, 0.95), estimate(values, 0.95)
    np.testing.assert_allclose([plain.mean, plain.low, plain.high], [same.mean, same.low, same.high])
    assert weighted_mean([1.0, 3.0], [3, 1], 0.95).mean == 1.5
    assert weighted_mean([1.0], [3], 0.95).low is None
