"""Results of rows outlive a kill, and workers that share a model: the scores are those of an undisturbed evaluation."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource, ModelConfig, TaskConfig
from cpift.config.tasks import EvaluationConfig
from cpift.evaluation import scoring
from cpift.evaluation.scoring import TaskScore, evaluate_model, score_part
from cpift.models.sources import materialise

SETTINGS = EvaluationConfig(precision="float32", batch_size=2)
BATCHES = 6  # of all tasks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "scratch"
    materialise(ModelConfig.model_validate({"scratch": ScratchModel(hidden_size=32)}), path)
    return path


def tasks_in(folder: Path) -> list[TaskConfig]:
    rows = [{"prompt": f"{word} or {word * 2}?", "completion": f"{number}"} for number, word in enumerate("abcd")]
    options = [row | {"choices": ["0", "1", "2", "3"], "answer": row["completion"]} for row in rows[:2]]
    found = []
    for metric, given in (("number", rows), ("choice", options), ("loss", rows)):
        file = folder / f"{metric}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        found.append(TaskConfig(name=metric, test=DataSource(file=file), metric=metric, max_new_tokens=6))  # type: ignore[arg-type]  # a word, one of them
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that goes through the model."""
    batches = list[int]()
    for name in ("likelihoods", "likelihoods_begun"):
        compute = getattr(scoring, name)
        monkeypatch.setattr(scoring, name, lambda model, rows, f=compute: batches.append(len(rows)) or f(model, rows))
    return batches


def records(scores: dict[str, TaskScore]) -> Any:
    return {task: score.record() for task, score in scores.items()}


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from cpift.config.run import TaskConfig
from cpift.config.tasks import EvaluationConfig
from cpift.evaluation import scores
from cpift.evaluation.scoring import evaluate_model
add, left = scores.KeptResults.add, int(sys.argv[4])
def adding(self, results):
    global left
    add(self, results)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
scores.KeptResults.add = adding
tasks = [TaskConfig(**task) for task in json.loads(sys.argv[3])]
evaluate_model(Path(sys.argv[1]), tasks, EvaluationConfig(precision="float32", batch_size=2), kept=Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, place = tasks_in(tmp_path), tmp_path / "results"
    undisturbed = records(evaluate_model(base, tasks, SETTINGS))
    described = json.dumps([task.model_dump(mode="json", exclude_none=True) for task in tasks])
    killed = subprocess.run([sys.executable, "-c", _KILLED, base, place, described, "3"], check=False)
    assert killed.returncode == -signal.SIGKILL
    lines = [line for file in place.iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == 3
    cut = next(place.iterdir())
    cut.with_name(f"{cut.name[:16]}-cut.jsonl").write_text(lines[0][: len(lines[0]) // 2])  # a kill within a line
    batches = counted(monkeypatch)
    assert records(evaluate_model(base, tasks, SETTINGS, kept=place)) == undisturbed
    assert len(batches) == BATCHES - 3


def test_parts_together_are_the_whole(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, place = tasks_in(tmp_path), tmp_path / "results"
    batches = counted(monkeypatch)
    whole = records(evaluate_model(base, tasks, SETTINGS))
    assert len(batches) == BATCHES
    for part in range(3):
        score_part(base, tasks, SETTINGS, (part, 3), kept=place)
    assert len(batches) == 2 * BATCHES
    monkeypatch.setattr(scoring, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert records(evaluate_model(base, tasks, SETTINGS, kept=place)) == whole


def test_results_are_of_the_rows_that_were_scored(base: Path, tmp_path: Path) -> None:
    """A file of rows may be another while it is read, and then be put back."""
    (task, *_), place = tasks_in(tmp_path), tmp_path / "results"
    assert task.test is not None
    assert task.test.file is not None
    rows = task.test.file.read_text()
    undisturbed = records(evaluate_model(base, [task], SETTINGS))
    task.test.file.write_text(rows.replace("a or", "b or"))
    other = records(evaluate_model(base, [task], SETTINGS, kept=place))
    task.test.file.write_text(rows)
    assert records(evaluate_model(base, [task], SETTINGS, kept=place)) == undisturbed != other
