"""Holm's procedure over primary contrasts, and the p values that it takes."""

from __future__ import annotations

import numpy as np
import pytest

from cpift.compare.config import Contrast
from cpift.compare.contrasts import by_holm
from cpift.compare.words import points, primary_points
from cpift.evaluation.measures import References, Scores, TaskItems, bootstrap, interval, p_value

REFERENCES = References("base", "probes", {"x": "loss", "y": "loss"})


def scores(gains: dict[str, float], seeds: int = 8) -> Scores:
    """Losses of two tasks: the probes' are 1, θ0's 3; the others' 1.5 less a gain, with noise of rows and seeds."""
    random = np.random.default_rng(3)
    methods = {"base": -1.5, "probes": 0.5, "rival": 0.0} | gains
    items = []
    for task in ("x", "y"):
        rows, noise = random.normal(0, 0.05, (1, 1, 200)), random.normal(0, 0.02, (len(methods), seeds, 1))
        items.append(
            TaskItems(task, 1.5 - np.array([*methods.values()])[:, None, None] + rows + noise, np.ones(200), False)
        )
    return bootstrap(items, list(methods), 200, 0, 0.95)


@pytest.mark.slow
def test_only_what_holms_procedure_shows_is_shown() -> None:
    """Of three differences one is large, one is above zero alone and not together with the others, one is none."""
    found = scores({"far": 0.3, "near": 0.015, "same": 0.0})
    contrasts = [Contrast(method=name, rival="rival", by="loss") for name in ("near", "same", "far")]
    alone = [by_holm(found, [contrast], REFERENCES)[0] for contrast in contrasts]
    near, same, far = by_holm(found, contrasts, REFERENCES)
    assert [outcome.side for outcome in (near, same, far)] == [0, 0, 1] != [outcome.side for outcome in alone]
    assert alone[0].side == 1
    raw = [outcome.p for outcome in alone]
    assert far.p == pytest.approx(min(1, 3 * raw[2]))
    assert near.p == pytest.approx(max(far.p, 2 * raw[0]))
    assert same.p == pytest.approx(max(near.p, raw[1]))
    assert far.difference.high - far.difference.low > alone[2].difference.high - alone[2].difference.low, "1 − α/3"
    assert same.difference == alone[1].difference, "the last is tested at α"
    assert far.difference.mean == pytest.approx(np.log(1.5 / 1.2), abs=0.02)


def test_worse_is_below_and_what_cannot_be_told_is_not_shown() -> None:
    found = scores({"worse": -0.3})
    below, nothing = by_holm(
        found,
        [Contrast(method="worse", rival="rival"), Contrast(method="rival", rival="rival")],
        REFERENCES,
    )
    assert (below.side, nothing.side) == (-1, 0)
    assert nothing.p == 1
    no_losses = References("base", "probes", {"x": "choice", "y": "choice"})
    unknown = by_holm(found, [Contrast(method="worse", rival="rival", by="loss")], no_losses)[0]
    assert (unknown.p, unknown.side, unknown.difference.low) == (None, 0, None)
    assert (primary_points(unknown), points(unknown.difference)) == ("no value", "no value")


def test_a_p_value_is_where_the_interval_meets_zero() -> None:
    random = np.random.default_rng(1)
    values = 0.4 + random.normal(0, 0.3, (5, 101))

    def statistic(seeds: np.ndarray) -> np.ndarray:
        return np.asarray(values[seeds].mean(axis=0))

    p = p_value(statistic, 5, 40)
    assert p is not None
    for level, above in ((1 - p - 1e-4, True), (1 - p + 1e-4, False)):
        assert (interval(statistic, values[:, 0].tolist(), 40, level).low > 0) is above
