"""What is said of tasks that a model had before: figures, their intervals, and no more than rows show."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpift.evaluation.estimates import Estimate
from cpift.lineage.history import Generation, gain_of, generation, headline
from cpift.lineage.parent import read_parent
from tests.helpers.lineage import config_of, fields
from tests.helpers.scores import scored


def test_a_change_is_lost_only_where_the_interval_says_so() -> None:
    right, wrong = scored("number", [1] * 20), scored("number", [0] * 12 + [1] * 8)
    gain = gain_of(right, wrong)
    assert gain == Estimate(
        [-1] * 12 + [0] * 8, pytest.approx(-0.6), pytest.approx(-0.8352, abs=1e-4), pytest.approx(-0.3648, abs=1e-4)
    )
    same = gain_of(right, right)  # of 20 rows that all agree
    assert same == Estimate([], 0.0, pytest.approx(-(1 - 0.05 ** (1 / 20))), pytest.approx(1 - 0.05 ** (1 / 20)))
    better = gain_of(scored("loss", [(2.0, 2), (3.0, 2)]), scored("loss", [(1.0, 2), (1.5, 2)]))
    assert getattr(better, "mean", None) == pytest.approx(1.25)


def test_the_headline_tells_every_task(tmp_path: Path) -> None:
    raw = fields("c")
    earlier = [{"name": name, "metric": "number", "test": {"procedural": "addition", "size": 4}} for name in "ab"]
    del earlier[1]["test"]
    raw["parent"] = {"run": str(tmp_path), "fingerprint": "0" * 64, "tasks": earlier}
    config = config_of(raw, tmp_path / "new")
    new, old = scored("loss", [(1.0, 2)] * 4), scored("number", [1, 1, 1, 0])
    scores = {
        "base": {"a": old, "c": scored("loss", [(4.0, 2)] * 4)},
        "before": {"a": old, "c": scored("loss", [(3.0, 2)] * 4)},
        "final": {"a": scored("number", [1, 1, 0, 0]), "c": new},
    }
    said = headline(config, scores)
    assert f"{tmp_path.name} with c: loss 1.000 (before loss 3.000)." in said
    assert "Earlier tasks: a 75.0 → 50.0 %, -25.0 [-104.6, +54.6] points: no change shown." in said
    assert "Not scored, for their test rows are not there: b." in said


def test_a_folder_without_a_run_has_no_history(tmp_path: Path) -> None:
    assert generation(tmp_path) is None
    (tmp_path / "config.yaml").write_text("tasks: [{name: a}, {name: b}]\nparent: {run: /x, forgotten: c}\n")
    assert generation(tmp_path) == Generation(tmp_path, "− c", Path("/x"))
    with pytest.raises(Exception, match="holds no finished run"):
        read_parent(tmp_path)
