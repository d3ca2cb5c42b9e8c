"""Rows whose loss is watched: what is refused of them, and that a run with them comes to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpift.config.run import RunConfig
from cpift.console.view import quiet
from cpift.errors import ConfigError
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import examined, preflight
from tests.helpers.small_runs import run_of, turns

ROWS = [turns(f"say {word}", word) for word in ("one", "two", "three", "four", "five", "six")]
WATCH: dict[str, Any] = {"probe__evaluate_every": 1}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"probe__keep": "best"}, "keep: needs held-out losses; give evaluate_every"),
        ({"probe__patience": 2}, "patience: needs held-out losses; give evaluate_every"),
        ({"integration__validation": {"rows": 2}}, "validation: needs held-out losses; give evaluate_every"),
        ({"probe__ema": 1.0}, "probe.ema"),
        (WATCH, r"probe.evaluate_every: .*task a has none → give tasks.a.validation, or probe.validation: {rows: 200}"),
        (
            WATCH | {"probe__validation": {"rows": 6}},
            "probe.validation.rows of task a: 6 of 6 rows would be held out",
        ),
        (
            WATCH | {"probe__validation": {"rows": 2}, "probe__patience": 1, "baselines": {"full_sft": {}}},
            "probe.patience: ends stages early, and SFT as a baseline",
        ),
        ({"tracking": ["neptune"]}, "'neptune' is not installed → pip install neptune, or leave it out"),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight(run_of(tmp_path, ROWS, **fields))


def own_rows(tmp_path: Path, lines: list[Any]) -> RunConfig:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    task = {"train": {"file": "train.jsonl"}, "test": {"file": "test.jsonl"}, "validation": {"file": "held.jsonl"}}
    return run_of(tmp_path, ROWS, tasks=[{"name": "a", **task}], **WATCH)


def test_rows_of_a_tasks_own_are_looked_at_and_name_its_fine_tunes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.a\.validation"):
        preflight(own_rows(tmp_path, [{"nothing": 1}]))
    with pytest.raises(ConfigError, match=r"tasks\.a\.validation: no reply begins within probe.max_length"):
        preflight(own_rows(tmp_path, [turns("word " * 60, "late")]))
    names = []
    for word in ("seven", "eight"):
        config = own_rows(tmp_path, [turns("say", word)])
        preflight(config)
        blind = config.model_copy(update={"probe": config.probe_training.model_copy(update={"evaluate_every": None})})
        names.append([StageArtifacts(one).probes["a"].fingerprint for one in (config, blind)])
    assert names[0][0] != names[1][0]
    assert names[0][1] == names[1][1]


def test_a_plan_counts_the_rows_that_are_left_to_train_on(tmp_path: Path) -> None:
    seen = examined(run_of(tmp_path, ROWS, **WATCH, probe__validation={"rows": 2}))
    used = {(row["task"], row["field"]): row["used"] for row in seen.rows}
    assert used == {
        (task, f"{fit}.max_length"): rows for task in "ab" for fit, rows in (("probe", 4), ("integration", 6))
    }


@pytest.mark.slow
def test_a_run_that_watches_comes_to_its_end(tmp_path: Path) -> None:
    fields = {f"{fit}__{name}": value for fit in ("probe", "integration") for name, value in (
        ("evaluate_every", 1), ("validation", {"rows": 2}), ("keep", "best"), ("ema", 0.9), ("warmup", "exact"),
    )}  # fmt: skip
    config = run_of(tmp_path, ROWS, **fields)
    preflight(config, stage="run")
    pipeline = Pipeline(config, InProcessEngine(), quiet())
    pipeline.integrate()
    record = json.loads((pipeline.artifacts.probes["a"].path / "training.json").read_text())
    assert [row["step"] for row in record["held_out"]] == [1, 2]
    assert record["rows"][0]["a"]["rows"] == 4
