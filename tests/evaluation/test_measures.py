"""Figures and intervals: closed forms, what a simulation covers, and the paper's protocol by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpift.evaluation.estimates import t_quantile
from cpift.evaluation.measures import (
    References,
    Scores,
    TaskItems,
    bootstrap,
    forgetting,
    forgetting_cut,
    imbalance,
    interval,
    learning,
    low_resource,
    mean_retention,
    ranks,
    retention,
    seesaw,
    worst_retention,
)
from cpift.evaluation.retention import judged

REFERENCES = References("θ0", "p", dict.fromkeys("abc", "number"))


def scores_of(values: dict[str, list[list[float]]], tasks: tuple[str, ...] = ("a", "b")) -> Scores:
    """Scores without draws that differ: values by method, [seeds][tasks]."""
    table = np.array(list(values.values()), dtype=float)[..., None].repeat(4, axis=3)
    return Scores(tuple(values), tasks, table, rows=10)


def test_bootstrap_scores_are_weighted_means_of_the_same_rows_for_all() -> None:
    random = np.random.default_rng(0)
    totals, weights = random.random((2, 3, 40)), random.integers(1, 9, 40).astype(float)
    items = [TaskItems("a", totals, np.ones(40), True), TaskItems("b", totals * weights, weights, False)]
    found = bootstrap(items, ["x", "y"], 50, 7, 0.95)
    assert found.values.shape == (2, 3, 2, 51)
    np.testing.assert_allclose(found.of("x", "a")[:, 0], totals[0].mean(axis=1))
    np.testing.assert_allclose(found.of("y", "b")[:, 0], -np.average(totals[1], axis=1, weights=weights))
    shifted = bootstrap([TaskItems("a", totals + 1, np.ones(40), True)], ["x", "y"], 50, 7, 0.95)
    np.testing.assert_allclose(shifted.of("x", "a"), found.of("x", "a") + 1)  # the same draws
    np.testing.assert_array_equal(bootstrap(items, ["x", "y"], 50, 7, 0.95).values, found.values)


def test_interval_over_seeds_alone_is_students() -> None:
    values = np.array([0.1, 0.4, 0.3, 0.7])
    one = interval(lambda seeds: np.full(11, values[seeds].mean()), values.tolist(), 50, 0.95)
    half = t_quantile(0.975, 3) * values.std(ddof=1) / 2
    assert one.mean == pytest.approx(values.mean())
    assert (one.low, one.high) == (pytest.approx(one.mean - half), pytest.approx(one.mean + half))


def test_interval_over_items_alone_is_the_standard_error() -> None:
    rows = (np.arange(400) % 4 == 0).astype(float)
    items = [TaskItems("a", np.tile(rows, (1, 1, 1)), np.ones(400), True)]
    one = bootstrap(items, ["x"], 4000, 0, 0.95)
    found = one.estimate(one.of("x", "a"))
    assert found.low is not None
    assert found.mean - found.low == pytest.approx(1.97 * math.sqrt(0.25 * 0.75 / 400), rel=0.05)


def test_no_interval_without_a_value() -> None:
    one = interval(lambda seeds: np.full(5, np.nan), [math.nan], 10, 0.95)
    assert (one.low, one.high) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "between", "noise"), [(3, 0.0, 0.3), (3, 0.2, 0.3), (3, 1.0, 0.3), (10, 0.2, 0.3), (5, 0.05, 0.5)]
)
def test_intervals_cover_what_they_say(seeds: int, between: float, noise: float) -> None:
    """Seeds and items drawn anew each time, with effects of both and of their meeting; the truth is 0."""
    random, inside, repeats = np.random.default_rng(seeds), 0, 400
    for repeat in range(repeats):
        item, run = random.normal(0, 0.3, 40), random.normal(0, between, (seeds, 1))
        totals = (item + run + random.normal(0, noise, (seeds, 40)))[None]
        found = bootstrap([TaskItems("a", totals, np.ones(40), True)], ["x"], 200, repeat, 0.95)
        one = found.estimate(found.of("x", "a"))
        assert one.low is not None
        assert one.high is not None
        inside += one.low <= 0 <= one.high
    assert inside / repeats >= 0.93  # 95 % less two standard errors of the simulation


def test_retention_of_scores_and_losses() -> None:
    scores = scores_of({"θ0": [[0.1, -5.0]], "p": [[0.5, -2.0]], "x": [[0.25, -4.0]], "z": [[0.5, -1.0]]})
    of_losses = References("θ0", "p", {"a": "number", "b": "loss"})
    np.testing.assert_allclose(retention(scores, "x", "p")[0, :, 0], [0.5, 0.5])
    assert mean_retention(scores, "z", of_losses)[0, 0] == 1.5
    assert worst_retention(scores, "z", of_losses)[0, 0] == 1.0


def test_retention_has_no_value_where_the_probe_scored_nothing() -> None:
    scores = scores_of({"θ0": [[0.0, 0.1]], "p": [[0.0, 0.5]], "x": [[0.2, 0.5]]})
    assert np.isnan(retention(scores, "x", "p")[0, 0]).all()
    assert judged(learning(scores, REFERENCES)) == ["b"]
    assert mean_retention(scores, "x", REFERENCES)[0, 0] == 1
    nothing = scores_of({"θ0": [[0.0, 0.1]], "p": [[0.0, 0.0]], "x": [[0.2, 0.5]]})
    assert nothing.estimate(mean_retention(nothing, "x", REFERENCES)).low is None


def test_ranks_share_ties() -> None:
    scores = scores_of({"x": [[0.9, 0.1]], "y": [[0.5, 0.1]], "z": [[0.1, 0.9]]})
    found = {name: one[0, 0] for name, one in ranks(scores, ["x", "y", "z"]).items()}
    assert found == {"x": (1 + 2.5) / 2, "y": (2 + 2.5) / 2, "z": (3 + 1) / 2}


def test_seesaw_counts_what_the_interval_shows() -> None:
    seeds = np.linspace(-0.01, 0.01, 5)
    table = {
        "base": [[0.5, 0.5]] * 5,
        "probes": [[0.9, 0.52]] * 5,
        "x": [[0.6 + noise, 0.4 + 20 * noise] for noise in seeds],
    }
    found = seesaw(scores_of(table), "x", "base", "probes")
    assert (found.below_base, found.below_probe, found.tasks) == (0, 1, 2)  # task b varies too much to tell


def test_forgetting_by_hand() -> None:
    scores = scores_of({"probe a": [[0.8, 0.1], [0.6, 0.1]], "then b": [[0.4, 0.7], [0.2, 0.5]]})
    found = forgetting(scores, "then b", "probe a", ("a", "b"))
    assert found.first.mean == pytest.approx(-0.4)
    assert found.second.mean == pytest.approx(0.5)


def test_cut_divides_means_and_not_seeds() -> None:
    scores = scores_of({"x": [[0.0, 0.0]] * 2})
    changes = {"ours": np.array([[-0.1] * 4, [-0.1] * 4]), "theirs": np.array([[-0.8] * 4, [0.0] * 4])}
    assert forgetting_cut(scores, changes, "theirs", "ours").mean == pytest.approx(1 - 0.1 / 0.4)


@pytest.mark.parametrize(("theirs", "told"), [([-0.8, -0.7], True), ([-0.8, 0.0], False), ([0.1, 0.1], False)])
def test_a_cut_has_an_interval_only_where_the_rival_forgets(theirs: list[float], told: bool) -> None:
    scores = scores_of({"x": [[0.0, 0.0]] * 2})
    changes = {"ours": np.array([[-0.1] * 4] * 2), "theirs": np.array([[change] * 4 for change in theirs])}
    found = forgetting_cut(scores, changes, "theirs", "ours")
    assert (found.low is not None, found.high is not None) == (told, told)


def test_low_resource_tasks_are_set_against_the_others() -> None:
    assert low_resource({"a": 600, "b": 600, "c": 100, "d": 300}) == ["c"]
    assert low_resource({"a": 600, "b": 500}) == []
    tasks = ("a", "b", "c")
    scores = scores_of({"θ0": [[0.1, 0.1, 0.1]], "p": [[0.5, 0.8, 0.5]], "x": [[0.5, 0.4, 0.2]]}, tasks)
    np.testing.assert_allclose(imbalance(scores, "x", REFERENCES, ["c"])[:, 0], [0.4 - (1.0 + 0.5) / 2])
    nothing = scores_of({"θ0": [[0.1, 0.1, 0.1]], "p": [[0.5, 0.8, 0.0]], "x": [[0.5, 0.4, 0.2]]}, tasks)
    assert np.isnan(imbalance(nothing, "x", REFERENCES, ["c"])).all()
