"""The pages of docs/extending: what they show runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.loading import load_config
from cpift.errors import ConfigError
from cpift.evaluation.checks import check_task
from cpift.evaluation.metrics import Reply, load_metric
from cpift.extensions import GROUPS
from cpift.rows.examples import parse_row

PAGES = Path(__file__).parents[1] / "docs" / "extending"


def block(page: str, language: str) -> str:
    """The one block of a page in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@pytest.fixture
def run(tmp_path: Path, smoke_config: Path) -> Path:
    """The page's run over the smoke run's model and settings, with its module and rows beside it."""
    fields = yaml.safe_load(smoke_config.read_text()) | yaml.safe_load(block("metric.md", "yaml"))
    row = block("metric.md", "json")
    (tmp_path / "my_metrics.py").write_text(block("metric.md", "python"))
    (tmp_path / "sql.jsonl").write_text(row * 8)
    (tmp_path / "sql-test.jsonl").write_text(row * 3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "run.yaml"


def test_the_pages_metric_scores_queries_by_their_rows(run: Path) -> None:
    example = parse_row(json.loads(block("metric.md", "json")), {})
    texts = ["SELECT 7", "SELECT a FROM t", "SELECT sum(a) FROM t WHERE 1", "DROP TABLE t", "nonsense"]
    metric = load_metric(load_config(run).tasks[0].metric)
    assert metric.scored([Reply(example, text) for text in texts], "t") == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert check_task(load_config(run).tasks[0]) == []
    wrong = json.dumps(json.loads(block("metric.md", "json")) | {"completion": "SELEC 1"})
    run.with_name("sql-test.jsonl").write_text(wrong + "\n")
    (problem,) = check_task(load_config(run).tasks[0])
    assert "row 1: the reference 'SELEC 1' does not run → mend the query" in str(problem)


@pytest.mark.slow
def test_a_run_with_it_ends_with_its_scores_and_a_page(run: Path) -> None:
    tiny = {"probe.steps": 1, "integration.steps": 1, "tasks.0.max_new_tokens": 4, "evaluation.max_length": 128}
    tiny |= {"resources.parallel": None, "probe.max_length": 128, "integration.max_length": 128}
    result = cpift.run(run, in_process=True, output=run.parent / "out", **tiny)
    score = result.scores["final"]["sql"]
    assert (score["metric"], score["score"], score["title"]) == (
        "my_metrics:execution_match",
        0.0,
        "queries with the right rows, %",
    )
    page = result.report.read_text(encoding="utf-8")
    assert "queries with the right rows, %" in page
    assert f"{run.parent}/my_metrics.py" not in page
    assert "my_metrics:execution_match" in (result.model / "README.md").read_text(encoding="utf-8")
    run.with_name("my_metrics.py").write_text(block("metric.md", "python").replace("float(", "0.5 * float("))
    again = cpift.plan(run, output=run.parent / "out", **tiny)
    states = {step.stage: step.state for step in again.steps}
    assert (states["integrate"], states["evaluate"]) == ("cached", "to do")


def test_the_groups_of_entry_points_are_those_that_are_read() -> None:
    named = re.findall(r'entry-points\."([\w.]+)"', (PAGES / "index.md").read_text(encoding="utf-8"))
    assert named
    assert set(named) <= set(GROUPS.values())


def test_the_index_names_a_metric_as_a_config_does(run: Path) -> None:
    (shown, *_) = re.findall(r"```yaml\n(.*?)```", (PAGES / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    assert yaml.safe_load(shown)["tasks"][0]["metric"] == yaml.safe_load(run.read_text())["tasks"][0]["metric"]
    run.with_name("my_metrics.py").unlink()
    with pytest.raises(ConfigError, match="there is no module my_metrics in"):
        load_config(run)


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with θ0 and two fine-tunes."""
    for name in ("base", "one", "two"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_merge_method_is_the_median(here: Path) -> None:
    (here / "my_methods.py").write_text(block("merge-method.md", "python"))
    tuned = {"a": "one", "b": "two", "c": "base"}
    made = cpift.merge("base", tuned, "merged", method="my_methods:Median", weight=0.8)
    assert [check["name"] for check in made.checks if check["passed"] is False] == []
    state = {name: load_model_tensors(here / name) for name in ("base", "one", "two")}
    found = load_model_tensors(made.path)
    for name, origin in state["base"].items():
        updates = torch.stack([state[one][name].float() - origin.float() for one in ("one", "two", "base")])
        wanted = origin.float() + 0.8 * updates.median(0).values
        torch.testing.assert_close(found[name].float(), wanted, rtol=2**-7, atol=1e-6)


def test_the_pages_conflict_rule_gives_the_first_its_core(here: Path) -> None:
    (here / "my_conflicts.py").write_text(block("conflict-rule.md", "python"))
    word = yaml.safe_load(block("conflict-rule.md", "yaml"))["fusion"]["conflict"]
    made = cpift.merge("base", {"a": "one", "b": "two"}, "merged", conflict=word, p=0.3, omega=0.0)
    cores = cpift.regions("base", {"a": "one", "b": "two"}, p=0.3)
    first, found = load_model_tensors(here / "one"), load_model_tensors(made.path)
    for name, mask in cores["a"].items():
        assert torch.equal(found[name][mask], first[name][mask]), name


def load_model_tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}
