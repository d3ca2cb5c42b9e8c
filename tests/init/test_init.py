"""`cpift init`: what it recognises and guesses of data as it is, and that what it writes passes plan."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from cpift import hub
from cpift.cli.main import app
from cpift.cli.schema import schema_of
from cpift.config.inputs import DataSource, ScratchModel
from cpift.config.loading import load_config
from cpift.config.run import ModelConfig, RunConfig
from cpift.data.tasks import load_examples
from cpift.errors import ConfigError, CpiftError, DataError
from cpift.init.files import tasks_of
from cpift.init.others import examples, merge_file
from cpift.init.rows import guess_metric, held_out, look_at
from cpift.models.sources import materialise
from cpift.pipeline.preflight import preflight
from cpift.sweep.config import load_sweep

WORDS = ["red", "blue", "green", "tree", "house", "sun", "moon", "river", "stone", "bird"]
LONG = [" ".join(WORDS[(i * k) % 10] for k in range(40)) + f" {'xyz'[i % 3]}" for i in range(60)]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16 without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    scratch = ScratchModel(hidden_size=16, intermediate_size=16, layers=1, heads=2, max_length=1024)
    materialise(ModelConfig(scratch=scratch, dtype="bfloat16"), folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def options(i: int) -> list[str]:
    return [f"one {i}", f"two {i}", f"three {i}", f"four {i}"]


# Rows of a task, how they are named, the metric that fits, the columns that are chosen.
TASKS: dict[str, tuple[Rows, str, str, dict[str, Any]]] = {
    "messages": ([{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": f"u{i}"},
                                {"role": "assistant", "content": text}]} for i, text in enumerate(LONG)],
                 "messages", "loss", {}),
    "alpaca": ([{"instruction": f"do {i}", "input": "" if i % 2 else f"x{i}", "output": text}
                for i, text in enumerate(LONG)], "Alpaca", "loss", {}),
    "short": ([{"prompt": f"p{i}", "completion": f"word {i} x"} for i in range(60)], "prompt and completion", "rouge",
              {}),
    "sums": ([{"question": f"{i}+1?", "answer": i + 1} for i in range(40)],
             "prompt and completion ({question}, {answer})", "number",
             {"prompt": "{question}", "completion": "{answer}"}),
    "gsm": ([{"question": f"{i}+1 with words?", "answer": f"{text} #### {i + 1}"} for i, text in enumerate(LONG)],
            "prompt and completion ({question}, {answer})", "number",
            {"prompt": "{question}", "completion": "{answer}"}),
    "mood": ([{"text": f"it is {i}", "label": ("good", "bad", "neither: no")[i % 3]} for i in range(60)],
             "prompt and completion ({text}, {label})", "choice",
             {"prompt": "{text}", "completion": "{label}", "choices": ("bad", "good", "neither: no")}),
    "mmlu": ([{"question": f"q{i}", "choices": options(i), "answer": i % 4, "subject": "x"} for i in range(40)],
             "prompt, choices and answer ({question}, {choices}, {answer})", "choice",
             {"prompt": "{question}", "choices": "{choices}", "answer": "{answer}"}),
    "arc": ([{"id": i, "question": f"r{i}", "choices": {"text": options(i), "label": list("1234")}, "answerKey": "2"}
             for i in range(40)], "prompt, choices and answer ({question}, {choices}, {answerKey})", "choice",
            {"prompt": "{question}", "choices": "{choices}", "answer": "{answerKey}"}),
    "letters": ([{"question": f"s{i}", **dict(zip("ABCD", options(i), strict=True)), "answer": "ABCD"[i % 4]}
                 for i in range(40)], "prompt, choices and answer ({question}, {A} {B} {C} {D}, {answer})", "choice",
                {"prompt": "{question}", "choices": "{A}\n{B}\n{C}\n{D}", "answer": "{answer}"}),
    "passages": ([{"context": text, "question": f"q{i}?", "answer": f"a {i} b"} for i, text in enumerate(LONG)],
                 "prompt and completion ({context:?} {question}, {answer})", "rouge",
                 {"prompt": "{context:?}\n\n{question}", "completion": "{answer}"}),
    "squad": ([{"title": "t", "context": text, "question": f"z{i}?", "answers": {"text": [f"a {i} b"], "start": [1]}}
               for i, text in enumerate(LONG)], "prompt and completion ({context:?} {question}, {answers[text][0]})",
              "rouge", {"prompt": "{context:?}\n\n{question}", "completion": "{answers[text][0]}"}),
    "yesno": ([{"question": f"y{i}", "passage": "p", "answer": i % 2 == 0} for i in range(60)],
              "prompt and completion ({passage:?} {question}, {answer})", "choice",
              {"prompt": "{passage:?}\n\n{question}", "completion": "{answer}", "choices": ("False", "True")}),
    "plain": ([{"text": text, "url": f"x{i}"} for i, text in enumerate(LONG)], "plain text", "loss", {}),
    "talk": ([{"conversations": [{"from": "human", "value": f"u{i}"}, {"from": "gpt", "value": text}]}
              for i, text in enumerate(LONG)], "ShareGPT", "loss", {}),
}  # fmt: skip


def lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "jsonl": lines,
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": table,
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}
_NESTED = {"messages", "squad", "mmlu", "arc", "talk"}  # that a table has no cells for


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_recognised_named_and_scored_as_they_can_be(name: str, tmp_path: Path) -> None:
    rows, kind, metric, columns = TASKS[name]
    for ending, write in WRITERS.items():
        if ending == "csv" and name in _NESTED:
            continue
        write(tmp_path / f"a.{ending}", rows)
        look = look_at(DataSource(file=tmp_path / f"a.{ending}"))
        guess = guess_metric(look)
        assert (look.title.split(", read as ")[1], guess.metric) == (kind, metric), ending
        found = dict(look.source.columns) | ({"choices": guess.choices} if guess.choices else {})
        assert found == columns
        assert look.rows == len(rows)
        assert held_out(look) == len(rows) // 5


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=False)
    return done.output


def config_of(path: Path) -> RunConfig:
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    schema = json.loads((path.parent / first.split("=")[1]).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(text))
    config = load_config(path)
    assert len(text.splitlines()) <= 35 + 5 * len(config.tasks)
    return config


@pytest.mark.slow
def test_everything_that_is_written_passes_plan(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "da ta").mkdir()
    for number, (name, (rows, *_)) in enumerate(TASKS.items()):
        endings = [one for one in WRITERS if one != "csv" or name not in _NESTED]
        ending = endings[number % len(endings)]
        WRITERS[ending](tmp_path / "da ta" / f"{name}.{ending}", rows)
    said = invoke("da ta", "--model", base)
    assert "alpaca: alpaca.json is a JSON array, read as Alpaca, 60 rows; 12 held out for testing, seed 0" in said
    assert "no chat template, and gets alpaca's" in said
    config = config_of(tmp_path / "my-run.yaml")
    assert [task.name for task in config.tasks] == sorted(TASKS)
    assert (config.model.chat_template, config.model.dtype) == ("alpaca", "float32")
    assert {task.name: task.metric for task in config.tasks} == {
        name: metric for name, (_, _, metric, _) in TASKS.items()
    }
    notes = preflight(config, stage="run")
    assert not [note for note in notes if "left out" in note or "seen in training" in note]
    before = (tmp_path / "my-run.yaml").read_text()
    with pytest.raises(CpiftError, match=r"my-run.yaml exists already, and is not replaced"):
        invoke("da ta", "--model", base)
    assert (tmp_path / "my-run.yaml").read_text() == before
    invoke("sweep", "my-run.yaml")
    sweep = yaml.safe_load((tmp_path / "my-sweep.yaml").read_text())
    jsonschema.Draft202012Validator(schema_of("sweep")).validate(sweep)


def test_splits_by_names_folders_and_saved_data_sets(base: Path, tmp_path: Path) -> None:
    rows = TASKS["short"][0]
    for name in ("a_train.jsonl", "a_test.jsonl.gz", "b-validation.csv", "b-train.csv", "c.json", "c.csv", "readme.md"):
        (tmp_path / name).touch()
    (tmp_path / "d").mkdir()
    for name in ("train.parquet", "dev.parquet"):
        (tmp_path / "d" / name).touch()
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:9])).save_to_disk(tmp_path / "e")
    Dataset.from_list(rows).save_to_disk(tmp_path / "f")
    found = {one.name: one for one in tasks_of([str(tmp_path), *(str(tmp_path / name) for name in "def")])}
    shown = {
        name: (
            one.train.file and one.train.file.name,
            one.test and one.test.file and one.test.file.name,
            one.train.split,
        )
        for name, one in found.items()
    }
    assert shown == {
        "a": ("a_train.jsonl", "a_test.jsonl.gz", "train"),
        "b": ("b-train.csv", "b-validation.csv", "train"),
        "c": ("c.csv", None, "train"),
        "c-2": ("c.json", None, "train"),
        "d": ("train.parquet", "dev.parquet", "train"),
        "e": ("e", "e", "train"),
        "f": ("f", None, "train"),
    }
    assert found["e"].test is not None
    assert found["e"].test.split == "test"
    invoke(tmp_path / "e", tmp_path / "f", "--model", base, "--out", tmp_path / "x.yaml")
    config = config_of(tmp_path / "x.yaml")
    assert [len(load_examples(task.test_data)) for task in config.tasks] == [9, 12]


BAD: list[tuple[str, Rows, str]] = [
    ("a.jsonl", [{"a": 1, "b": 2}] * 5, r"5 of 5 rows, row 1 first: .*it has a, b → say which columns"),
    ("a.jsonl", [{"prompt": "p", "completion": "r"}], "there is only one row"),
    ("a.jsonl", [{"prompt": "p", "completion": "r"}] * 9, "all rows have the same prompt"),
    ("a.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(9)] + [{"prompt": "p"}], "row 10: "),
    ("a.jsonl", [], "no rows"),
]


@pytest.mark.parametrize(("name", "rows", "message"), BAD)
def test_what_cannot_be_used_is_told_and_nothing_is_written(
    name: str, rows: Rows, message: str, base: Path, tmp_path: Path
) -> None:
    lines(tmp_path / name, rows)
    with pytest.raises(ConfigError, match=message):
        invoke(tmp_path / name, "--model", base, "--out", tmp_path / "run.yaml")
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "--model", "m"], "there is no such file or folder"),
        ([], "no data → give files of rows"),
        (["."], "holds no files of rows"),
        (["merge", "a", "b"], "2 given → give BASE and two or more fine-tunes"),
        (["merge", "./a", "./b", "./c"], "is no model folder and no hub id"),
        (["sweep"], "0 given → give the file of one run"),
        (["--example", "smoke", "--model", "m"], "--model: means nothing beside --example smoke"),
        (["--example", "smoke", "a.jsonl"], "DATA: means nothing beside --example smoke"),
        (["a.jsonl", "--test", "b.jsonl"], "--test: means nothing beside data to train on"),
        (["sweep", "a.yaml", "--model", "m"], "--model: means nothing beside sweep"),
        (["--example", "nope"], "there is none of this name → one of .*smoke"),
    ],
)
def test_arguments_that_mean_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CpiftError, match=message):
        invoke(*arguments)
    assert not list(tmp_path.iterdir())


def test_models_that_are_none(base: Path, tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", TASKS["short"][0])
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for model, message in (
        (tmp_path / "broken", "its tokenizer cannot be read"),
        (tmp_path / "a.jsonl", "no model folder, no .gguf file and no hub id"),
        (tmp_path, "config.json"),
        (base / "model.safetensors", r"is one file of a model → give its folder"),
        (tmp_path / "brokn", f"did you mean {re.escape(str(tmp_path / 'broken'))}"),
    ):
        with pytest.raises(CpiftError, match=message):
            invoke(tmp_path / "a.jsonl", "--model", model, "--out", tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"is a model's folder, not rows → give it as --model"):
        invoke(base, "--model", base, "--out", tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"a\.jsonl: is given twice"):
        invoke(
            tmp_path / "a.jsonl",
            tmp_path / "broken" / ".." / "a.jsonl",
            "--model",
            base,
            "--out",
            tmp_path / "run.yaml",
        )
    with pytest.raises(ConfigError, match="--model: is not given"):
        invoke(tmp_path / "a.jsonl", "--out", tmp_path / "run.yaml")


@pytest.mark.slow
def test_a_merge_of_checkpoints(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("x/ft", "y/ft", "ft"):
        shutil.copytree(base, tmp_path / folder)
    invoke("merge", base, "x/ft", "y/ft", "ft", "--out", "merge.yaml")
    config = config_of(tmp_path / "merge.yaml")
    assert [task.name for task in config.tasks] == ["ft", "ft-2", "ft-3"]
    assert config.merges_only
    lines(tmp_path / "a.jsonl", TASKS["short"][0])
    with pytest.raises(ConfigError, match="b: has no test of its name") as error:
        invoke("merge", base, "a=x/ft", "b=ft", "--test", "a.jsonl", "--test", "c=a.jsonl", "--out", "scored.yaml")
    assert [problem.where for problem in error.value.problems] == ["b", "--test c"]
    invoke("merge", base, "a=x/ft", "b=ft", "--test", "a.jsonl", "--test", "b=a.jsonl", "--out", "scored.yaml")
    scored = config_of(tmp_path / "scored.yaml")
    assert scored.scores
    assert [task.metric for task in scored.tasks] == ["rouge", "rouge"]
    preflight(scored, stage="evaluate")
    invoke("sweep", "scored.yaml", "--out", "sweep.yaml")
    sweep = load_sweep(tmp_path / "sweep.yaml")
    assert (sweep.config.model, sweep.config.report.share) == ("fused", 0.5)
    assert "fusion.method" in sweep.config.space
    monkeypatch.setattr(hub, "resolve_revision", lambda kind, name, revision: "c" * 40)
    text = merge_file(["org/base", "org/a", "org/b"], tmp_path / "hub.yaml", "s")
    assert yaml.safe_load(text)["tasks"][1] == {"name": "b", "checkpoint": {"hub": "org/b", "revision": "c" * 40}}


def test_a_merge_of_models_with_other_tokens(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        shutil.copytree(base, tmp_path / folder)
    invoke("merge", base, "a", "b", "--vocabulary", "union", "--out", "union.yaml")
    config = config_of(tmp_path / "union.yaml")
    assert (config.fusion.method, config.fusion.vocabulary) == ("linear", "union")
    invoke("merge", base, "a", "b", "--vocabulary", "base", "--out", "rows.yaml")
    config = config_of(tmp_path / "rows.yaml")
    assert (config.fusion.method, config.fusion.vocabulary) == ("cpift", "base")
    with pytest.raises(ConfigError, match="vocabulary"):
        invoke("merge", base, "a", "b", "--vocabulary", "c", "--out", "c.yaml")
    assert not (tmp_path / "c.yaml").exists()
    with pytest.raises(ConfigError, match="--vocabulary: means nothing beside data to train on"):
        invoke(tmp_path / "a.jsonl", "--model", base, "--vocabulary", "union")


def test_a_hub_data_set_is_pinned_and_held_out_of(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader is replaced: this checks what is asked for, not the hub."""
    for module in ("init.files", "data.sources"):
        monkeypatch.setattr(f"cpift.{module}.resolve_revision", lambda kind, name, revision: "c" * 40)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: TASKS["sums"][0])
    said = invoke("org/set", "--model", base, "--out", tmp_path / "run.yaml")
    assert "set: org/set is a hub data set, read as prompt and completion ({question}, {answer}), 40 rows; 8" in said
    (task,) = config_of(tmp_path / "run.yaml").tasks
    assert task.train is not None
    assert (task.train.hub, task.train.revision) == ("org/set", "c" * 40)
    assert len(load_examples(task.train_data)) == 32


def test_examples_lie_where_they_find_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"smoke", "quickstart", "merge", "paper/llama2-7b"} <= set(examples())
    invoke("--example", "quickstart")
    invoke("--example", "smoke")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} >= {
        "configs/quickstart.yaml",
        "configs/quickstart_tasks.py",
        "configs/smoke.yaml",
    }
    preflight(load_config(Path("configs/smoke.yaml")), stage="run")
    with pytest.raises(CpiftError, match=r"smoke\.yaml exists already"):
        invoke("--example", "smoke")


REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "five_tasks"


@pytest.mark.skipif(not REAL.is_dir(), reason="the development data is not here")
def test_real_data_of_five_kinds() -> None:
    expected = {"gsm8k": "number", "logiqa": "choice", "codealpaca": "loss", "alpaca": "loss", "dialogue": "loss"}
    found = tasks_of([str(REAL)])
    assert {one.name: guess_metric(look_at(one.train)).metric for one in found} == expected
    assert all(one.test is not None for one in found)


def test_a_data_error_names_its_task(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "r"}])
    with pytest.raises(DataError, match="NAME_train and NAME_test"):
        held_out(look_at(DataSource(file=tmp_path / "a.jsonl")))


@pytest.mark.slow
def test_rows_that_do_not_fit_the_model_are_not_held_out(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": LONG[i] * (9 if i % 3 else 1)} for i in range(30)]
    lines(tmp_path / "a.jsonl", rows)
    invoke(tmp_path / "a.jsonl", "--model", base, "--out", tmp_path / "x.yaml")
    (task,) = config_of(tmp_path / "x.yaml").tasks
    assert task.holdout is not None
    assert task.holdout.max_characters is not None
    assert max(len(one.reply) for one in load_examples(task.test_data)) < 300
    lines(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": "x" * 2000} for i in range(30)])
    with pytest.raises(ConfigError, match="too many have more than 1024 tokens"):
        invoke(tmp_path / "a.jsonl", "--model", base, "--out", tmp_path / "y.yaml")
