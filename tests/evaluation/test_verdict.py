"""The sentence that a run ends with: its figures, its intervals against a bootstrap, and what it says where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpift.evaluation.verdict import Share, share_of, verdict_sentence
from tests.helpers.scores import RUN, scored

Scores = dict[str, dict[str, dict[str, Any]]]


def test_figures_are_means_of_retention() -> None:
    """Final: ¾ and 6 ÷ 7; average: ½ and 6 ÷ 10; SFT: 5 ÷ 4 and 1."""
    share = share_of(RUN, "final", ["right", "loss"])
    assert share.mean == pytest.approx((3 / 4 + 6 / 7) / 2)
    said = verdict_sentence(["right", "loss"], RUN)
    assert said.startswith(
        "One model: 80 % of the fine-tunes' own scores; their average 55 %; SFT on all data 112 % "
        "(mean of 2 tasks, one seed, 4 to 5 rows a task: ±"
    )
    assert "fused" not in said


@pytest.mark.parametrize("metric", ["number", "loss"])
def test_intervals_are_those_of_a_bootstrap(metric: str) -> None:
    """Rows are drawn for the model, its rival and the probe alike."""
    source, count = np.random.default_rng(0), 400
    draws: list[Any] = [source.random(count) for _ in range(3)]
    probe, own, rival = (draws[0] < 0.8, draws[0] + draws[1] / 4 < 0.7, draws[2] < 0.6)
    if metric == "loss":
        probe, own, rival = 1 + draws[0], 1.2 + draws[0] + draws[1] / 2, 1.5 + draws[2]

    def score(rows: Any) -> dict[str, Any]:
        return scored(metric, [(float(row), 3) for row in rows] if metric == "loss" else [float(row) for row in rows])

    scores = {"probe t": {"t": score(probe)}, "own": {"t": score(own)}, "rival": {"t": score(rival)}}
    one, other = share_of(scores, "own", ["t"]), share_of(scores, "rival", ["t"])
    places = source.integers(count, size=(4000, count))
    sums = {name: rows[places].sum(1) for name, rows in (("probe", probe), ("own", own), ("rival", rival))}
    kept = {name: sums["probe"] / sums[name] if metric == "loss" else sums[name] / sums["probe"] for name in sums}
    assert one.half == pytest.approx(1.966 * kept["own"].std(), rel=0.06)
    assert one.minus(other).half == pytest.approx(1.966 * (kept["own"] - kept["rival"]).std(), rel=0.06)
    assert one.minus(one).half == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_all_say_the_same_are_not_certain(value: float) -> None:
    """Of 30 rows that agree, 9.5 % of all may do otherwise: 1 − 0.05^(1/30). The probe scores ½ of that on average."""
    probe = scored("number", [1.0, 0.0] * 15) if not value else scored("number", [1.0] * 30)
    scores = {"probe t": {"t": probe}, "own": {"t": scored("number", [value] * 30)}}
    own = share_of(scores, "own", ["t"])
    assert own.mean == value
    assert own.half == pytest.approx((1 - 0.05 ** (1 / 30)) / (1.0 if value else 0.5))
    assert share_of(scores, "probe t", ["t"]).half == 0  # 1, whatever the rows
    assert own.minus(share_of(scores, "probe t", ["t"])).half == pytest.approx(own.half, rel=3)


def test_what_rows_tell_apart() -> None:
    many = {
        model: {task: {**one, "examples": one["examples"] * 40} for task, one in tasks.items()}
        for model, tasks in RUN.items()
    }
    said = verdict_sentence(["right", "loss"], many)
    assert said.endswith("By these rows it is better than their average, worse than SFT on all data.")
    few = verdict_sentence(["right", "loss"], RUN)
    assert few.endswith("By these rows it is not told apart from their average and SFT on all data.")
    assert [Share(value, {"t": np.array([0.1, -0.1])}).sign for value in (9.0, -9.0, 1.0)] == [1, -1, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"right": [0, 0, 0, 0, 0]},
            "86 % of the fine-tunes' own scores; their average 60 %; SFT on all data 100 % (mean of 1 of 2",
        ),
        ({"right": [0, 0, 0, 0, 0], "loss": [9.0] * 4}, "how good it is cannot be said"),
    ],
)
def test_tasks_that_no_fine_tune_learnt_are_in_no_figure(change: dict[str, list[Any]], said: str) -> None:
    scores = dict(RUN)
    for task, rows in change.items():
        score = scored("number", rows) if task == "right" else scored("loss", [(value, 2) for value in rows])
        scores[f"probe {task}"] = RUN[f"probe {task}"] | {task: score}
    assert said in verdict_sentence(["right", "loss"], scores)


def test_without_rows_or_rivals_it_says_less() -> None:
    alone = {model: RUN[model] for model in ("base", "probe right", "probe loss", "final")}
    bare = {model: {task: one | {"examples": []} for task, one in tasks.items()} for model, tasks in alone.items()}
    assert verdict_sentence(["right", "loss"], bare) == (
        "One model: 80 % of the fine-tunes' own scores (mean of 2 tasks, one seed, 4 to 5 rows a task)."
    )
