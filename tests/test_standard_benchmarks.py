"""lm-eval on a local task: its accuracy is what the model's likelihoods say. Needs the `eval` extra."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cpift.cli import app
from cpift.config_inputs import ModelConfig, ScratchModel
from cpift.models import load_model, load_tokenizer, materialise
from cpift.synthetic import generate

CHOICES = ["noun", "verb", "name"]
TASK = """task: local_kinds
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}:"
doc_to_choice: ["noun", "verb", "name"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("standard") / "model"
    size = ScratchModel(hidden_size=16, intermediate_size=16, layers=1, heads=2, max_length=64, seed=1)
    materialise(ModelConfig(scratch=size, path=None, hub=None, gguf=None), out)
    return out


def by_hand(path: Path, rows: list[dict[str, str]]) -> float:
    """Share of rows whose answer has the largest likelihood after the prompt."""
    network, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
    right = 0
    for row in rows:
        values = []
        for choice in CHOICES:
            prompt, reply = (tokenizer(text)["input_ids"] for text in (f"{row['prompt']}:", f" {choice}"))
            with torch.no_grad():
                logits = network(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
            values.append(sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(reply)))
        right += CHOICES[values.index(max(values))] == row["answer"]
    return right / len(rows)


def test_a_local_task_is_scored_by_lm_eval(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{key: row[key] for key in ("prompt", "answer")} for row in generate("ending", 30, 0, "test")]
    data = tmp_path / "kinds.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "kinds.yaml").write_text(TASK.format(file=data))
    options = [
        "--tasks",
        "local_kinds",
        "--task-folder",
        str(tmp_path / "tasks"),
        "--out",
        str(tmp_path / "found.json"),
    ]
    done = CliRunner().invoke(app, ["standard", str(model), *options])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "found.json").read_text())[str(model)]["local_kinds"]
    assert figures["acc,none"] == pytest.approx(by_hand(model, rows))
    assert figures["acc_stderr,none"] > 0
    assert f"acc,none: {figures['acc,none']:.4f} ± " in done.output


def test_what_cannot_be_scored_is_named(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for arguments, said in (
        ([str(model), "--tasks", "no_such_task"], "knows no task no_such_task"),
        ([str(tmp_path), "--tasks", "gsm8k"], "no model's folder"),
        ([str(model), "--tasks", "gsm8k", "--out", str(model / "config.json")], "is there already"),
    ):
        done = CliRunner().invoke(app, ["standard", *arguments])
        assert said in str(done.exception)
