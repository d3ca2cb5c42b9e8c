"""lm-eval on a local task: its accuracy is what the model's likelihoods say. Needs the `eval` extra."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cpift.cli.main import app
from cpift.config.inputs import ModelConfig, ScratchModel
from cpift.errors import CpiftError
from cpift.evaluation.task_files import task_file_problems
from cpift.models.sources import load_model, load_tokenizer, materialise
from cpift.rows.synthetic import generate
from tests.helpers.rows import LM_EVAL_TASK

CHOICES = ["noun", "verb", "name"]


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
    (tmp_path / "tasks" / "kinds.yaml").write_text(LM_EVAL_TASK.format(file=data))
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


CODE = {  # a task file: what is said of it, and whether --task-code allows it
    "process_docs: !function utils.process": ("line 1: process_docs: !function utils.process is Python code", True),
    "{task: x, class: !function own.Task}": ("class: !function own.Task is Python code", True),
    "{task: x, class: /x/own.Task}": ("class /x/own.Task is Python code", True),
    "metric_list: [{metric: !function utils.m}]": ("metric: !function utils.m is Python code", True),
    "a: [{b: &x !function u.f}]\nc: *x": ("line 1: b: !function u.f", True),
    "task: x\n? !function u.f\n: 1": ("line 2: : !function u.f", True),
    "a: !!python/object/apply:os.system [id]": ("the tag !!python/object/apply:os.system stands for", False),
    "a: !!python/name:os.system": ("the tag !!python/name:os.system stands for", False),
    "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!name:os.system": ("!!python/name:os.system", False),
    "a: !functions u.f": ("the tag !functions stands for", False),
    "dataset_kwargs: {trust_remote_code: true}": ("trust_remote_code has a data set's own code run", False),
    "dataset_kwargs:\n  trust_remote_code: 'yes'": ("line 2: trust_remote_code has", False),
    "metric_list: [{metric: acc, hf_evaluate: true}]": ("hf_evaluate has a metric's code", False),
    "unsafe_code: true": ("unsafe_code has what the model writes run", False),
    "metric_list: [{metric: someone/evil}]": ("'someone/evil' is no metric of lm-eval", True),
    "metric_list: [{metric: ./evil.py}]": ("'./evil.py' is no metric of lm-eval", True),
    "include: ../elsewhere": ("elsewhere, line 1: a: !function u.f", True),
    "include: [none.yaml]": ("none.yaml: No such file", False),
    "a: [": ("is no YAML", False),
    "[" * 50 + "]" * 50: ("nested more than", False),
}


@pytest.mark.parametrize("text", CODE, ids=ascii)
def test_task_files_that_would_run_code_are_refused(text: str, tmp_path: Path) -> None:
    said, allowed = CODE[text]
    (tmp_path / "elsewhere").write_text("a: !function u.f")
    (tmp_path / "tasks" / "deep").mkdir(parents=True)
    plain = LM_EVAL_TASK.format(file="x") + "include: plain.yaml\ndate: 2024-01-01\n"
    (tmp_path / "tasks" / "plain.yaml").write_text(plain)
    assert task_file_problems(tmp_path / "tasks", {"acc"}, functions=False) == []
    (tmp_path / "tasks" / "deep" / "one.yaml").write_text(text.replace("../elsewhere", "../../elsewhere"))
    (problem,) = map(str, task_file_problems(tmp_path / "tasks", {"acc"}, functions=False))
    assert said in problem
    assert " → " in problem
    assert (task_file_problems(tmp_path / "tasks", {"acc"}, functions=True) == []) == allowed


TEMPLATE = "doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\""


def test_no_code_of_a_task_folder_runs_unasked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, folder = tmp_path / "kinds.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in generate("ending", 4, 0, "test")))
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef same(docs): return docs\n")
    file, plain = folder / "kinds.yaml", LM_EVAL_TASK.format(file=data)
    arguments = ["standard", str(model), "--tasks", "local_kinds", "--task-folder", str(folder)]
    file.write_text(plain + "process_docs: !function own.same\n")
    assert "!function own.same is Python code" in str(CliRunner().invoke(app, arguments).exception)
    assert not (tmp_path / "ran").exists()
    assert CliRunner().invoke(app, [*arguments, "--task-code"]).exit_code == 0
    assert (tmp_path / "ran").exists()
    file.write_text("\n".join(TEMPLATE if "doc_to_text" in line else line for line in plain.splitlines()))
    failed = CliRunner().invoke(app, arguments)
    assert isinstance(failed.exception, CpiftError)
    assert "unsafe" in str(failed.exception)


def test_what_cannot_be_scored_is_named(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for arguments, said in (
        ([str(model), "--tasks", "no_such_task"], "knows no task no_such_task"),
        ([str(tmp_path), "--tasks", "gsm8k"], "no model's folder"),
        ([str(model), "--tasks", "gsm8k", "--out", str(model / "config.json")], "is there already"),
    ):
        done = CliRunner().invoke(app, ["standard", *arguments])
        assert said in str(done.exception)
