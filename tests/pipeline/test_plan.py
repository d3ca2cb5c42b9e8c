"""`cpift plan`: what it says of fine-tunes beside what they then take, on the screen and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from cpift.api import plan
from cpift.cli.main import app
from cpift.config.loading import load_config
from cpift.console.view import quiet
from cpift.disk.files import read_json
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.training.spec import RESULT


@pytest.mark.slow
def test_costs_are_those_of_the_fine_tunes(smoke_config: Path, tmp_path: Path) -> None:
    changes = {"output": str(tmp_path / "run"), "probe.steps": 6, "backbone.training.steps": 4} | {
        "tasks.1.train.size": 200  # more than are looked at
    }
    before = plan(smoke_config, **changes)
    assert before.seconds is None
    assert [fit.steps for fit in before.fits] == [6, 6, 6, None, None]
    assert [(row["task"], row["in_all"], row["all"]) for row in before.rows if row["field"] == "probe.max_length"] == [
        ("addition", 96, True),
        ("spelling", 200, False),
        ("ending", 96, True),
    ]
    config = load_config(smoke_config, changes=changes)
    made = Pipeline(config, InProcessEngine(), quiet()).probe()
    costs = {fit.label: fit for fit in plan(smoke_config, **changes).fits}
    for task, model in made.items():
        trained = read_json(model.path / RESULT)
        assert costs[task].tokens == pytest.approx(sum(trained["tokens"]), rel=0.15)
        assert costs[task].seconds is not None
        assert 0 < costs[task].seconds < 60
    other = plan(smoke_config, **changes | {"resources.cpus_per_worker": 2})
    assert all(fit.seconds is None for fit in other.fits), "never timed with so many threads"
    assert "backbone" not in {step.stage for step in other.steps if step.state == "cached"}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_plan_as_a_table(width: int, smoke_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = CliRunner().invoke(app, ["plan", str(smoke_config), "--output", str(tmp_path / "o")])
    assert said.exit_code == 0
    assert all(cell_len(line) <= width for line in said.output.splitlines())
    text = re.sub(r"\s+", " ", said.output)
    for words in ("Time: unknown until a first run", "Device: CPU, 1 thread a worker", "Training rows", "Disk: about"):
        assert words in text
    assert not (tmp_path / "o").exists()


def test_plan_for_programs_is_as_documented(smoke_config: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["plan", str(smoke_config), "--json", "--output", str(tmp_path / "o")])
    found = json.loads(said.output)
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    fields = {*found, *found["steps"][0], *found["fits"][0], *found["rows"][0]}
    assert {name for name in fields if f"`{name}`" not in text} == set()
    assert found["format"] == 1
