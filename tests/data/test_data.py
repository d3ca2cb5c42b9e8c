"""Rows become examples or named errors; labels cover exactly what the model must write; samples are reproducible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cpift import hub
from cpift.config.inputs import Holdout, ScratchModel
from cpift.config.run import DataSource, RunConfig, TaskConfig
from cpift.config.training import Mixing
from cpift.data import sources as row_sources
from cpift.data.packing import packed_rows
from cpift.data.shared_rows import shared_rows
from cpift.data.tasks import (
    CompletionCollator,
    Example,
    Message,
    balanced_sample,
    load_examples,
    mixture,
    source_fingerprint,
    tokenise,
)
from cpift.data.tokenise import IGNORED
from cpift.errors import DataError, Problem
from cpift.evaluation.checks import check_task
from cpift.models.scratch import make_scratch_tokenizer
from cpift.rows.holdout import held_key, last_held
from cpift.rows.problems import one_per_kind
from cpift.rows.shapes import size_of
from tests.helpers.rows import tokenised_dataset

TOKENIZER = make_scratch_tokenizer(ScratchModel())
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|start|>system\nBe kind.<|end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def write(path: Path, rows: list[Any]) -> DataSource:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataSource(file=path)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def example(*turns: str) -> Example:
    return Example(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)))


def labelled(row: dict[str, list[int]]) -> str:
    return TOKENIZER.decode([label for label in row["labels"] if label != IGNORED])


# --- rows ---


def test_chat_and_prompt_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [chat("a", "b", "c", "d"), {"prompt": "p", "completion": "q", "answer": 7}])
    first, second = load_examples(source)
    assert [message.content for message in first.messages] == ["a", "b", "c", "d"]
    assert first.reply == "d"
    assert [message.role for message in first.prompt] == ["user", "assistant", "user"]
    assert second == Example((Message("user", "p"), Message("assistant", "q")), "7", ())


def test_columns_build_what_a_metric_needs(tmp_path: Path) -> None:
    rows = [{"question": "Which?", "options": {"text": ["x", "y"]}, "label": 1, "note": {"by": "me"}}]
    source = write(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "{question} ({note[by]})", "choices": "{options[text]}", "answer": "{label}"}
    (found,) = load_examples(source.model_copy(update={"columns": columns}))
    assert found == Example((Message("user", "Which? (me)"), Message("assistant", "y")), "y", ("x", "y"))


def test_choices_may_be_lines_of_text(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "p", "a": "one", "b": "two", "answer": "two"}])
    (found,) = load_examples(source.model_copy(update={"columns": {"choices": "{a}\n{b}"}}))
    assert found.choices == ("one", "two")
    assert found.reply == "two"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "no JSON"),
        ("[1]", "must be a JSON object, not list"),
        ({"prompt": "p"}, "or another known shape; it has prompt → say which columns"),
        ({"messages": "hello"}, "must be a list of role and content, not str"),
        ({"messages": []}, "must be a list of role and content"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no role and content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "has role 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text, not int"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must be the assistant's reply, not the user's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message of the user"),
        ({"prompt": "p", "completion": "  "}, "last reply is empty"),
        ({"prompt": "p", "answer": 2, "choices": ["x", "y"]}, "2 is no position in the 2 choices"),
        ({"prompt": "p", "answer": ["x"]}, "must be text or a number, not list"),
        ({"prompt": "p", "answer": "x", "choices": [1, 2]}, "`choices` must be a list of text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_examples(write(tmp_path / "rows.jsonl", [chat("a", "b"), row]))
    assert [problem.where for problem in error.value.problems] == ["row 2"]


def test_what_is_wrong_with_many_rows_is_said_once_and_ten_kinds_are_shown(tmp_path: Path) -> None:
    rows = [chat("a", "b")] + [{"problem": str(i), "context": None, "solution": "x"} for i in range(14)]
    with pytest.raises(DataError) as error:
        load_examples(write(tmp_path / "rows.jsonl", [*rows, '{"broken', '{"brok', {"messages": 5}]))
    assert [problem.where for problem in error.value.problems] == [
        "14 of 18 rows, row 2 first",
        "2 of 18 rows, row 16 first",
        "row 18",
    ]
    first = error.value.problems[0]
    assert first.what.endswith("it has problem, solution")
    assert first.remedy == 'columns: {prompt: "{problem}", completion: "{solution}"}'
    kinds = [{"messages": [{"role": "user", "content": "x"}, {"a" * n: 1}]} for n in range(1, 14)]
    with pytest.raises(DataError) as error:
        load_examples(write(tmp_path / "rows.jsonl", kinds))
    assert len(error.value.problems) == 11
    assert error.value.problems[-1].what == "3 more rows with other problems"


def test_limit_is_applied_before_rows_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [chat("a", "b"), "{broken"]).model_copy(update={"limit": 1})
    assert len(load_examples(source)) == 1


def test_empty_missing_and_wrongly_encoded_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        load_examples(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match=r"there is no .*nothing\.jsonl"):
        load_examples(DataSource(file=tmp_path / "nothing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "x"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is no UTF-8"):
        load_examples(DataSource(file=tmp_path / "latin.jsonl"))


def test_unknown_column_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"q": "x"}]).model_copy(update={"columns": {"prompt": "{question}"}})
    with pytest.raises(DataError, match=r"columns\.prompt: '\{question\}' cannot be filled .* the row has q"):
        load_examples(source)


# --- checks before training ---


def test_check_task_finds_everything_at_once(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [chat("a", "b"), chat("a", "b") | {"choices": ["x", "x"], "answer": "x"}])
    task = TaskConfig(name="t", train=DataSource(file=tmp_path / "none.jsonl"), test=test, metric="choice")
    where = [problem.where for problem in check_task(task)]
    assert where == ["tasks.t.train, file", "tasks.t.test, 2 of 2 rows, row 1 first"]


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("choice", {"choices": ["x", "y"], "answer": "z"}, "answer 'z' is none of the choices"),
        ("choice", {"choices": ["x"], "answer": "x"}, "choices"),
        ("number", {"answer": "many"}, "no number in answer 'many'"),
        ("number", {}, "no number in answer 'b'"),
    ],
)
def test_metric_needs_its_columns_in_the_test_rows_only(tmp_path: Path, metric: Any, row: Any, message: str) -> None:
    plain = write(tmp_path / "train.jsonl", [chat("a", "b")])
    test = write(tmp_path / "test.jsonl", [chat("a", "b") | row])
    (problem,) = check_task(TaskConfig(name="t", train=plain, test=test, metric=metric))
    assert message in str(problem)
    assert check_task(TaskConfig(name="t", train=plain, test=test, metric="rouge")) == []


def test_check_task_fetches_nothing_when_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "resolve_revision", lambda *_: pytest.fail("asked the hub"))
    source = DataSource(hub="org/set")
    assert check_task(TaskConfig(name="t", train=source, test=source), download=False) == []


# --- fingerprints ---


def test_fingerprint_of_a_file_follows_bytes_limit_and_columns_not_its_place(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [chat("a", "b")])
    same = write(tmp_path / "b.jsonl", [chat("a", "b")])
    other = write(tmp_path / "c.jsonl", [chat("a", "c")])
    assert source_fingerprint(first) == source_fingerprint(same)
    changed = [first.model_copy(update=fields) for fields in ({"limit": 1}, {"columns": {"prompt": "{q}"}})]
    assert len({source_fingerprint(source) for source in (first, other, *changed)}) == 4


def test_fingerprint_of_a_generator_follows_its_fields() -> None:
    fields: list[dict[str, Any]] = [{}, {"size": 6}, {"seed": 1}, {"split": "test"}, {"procedural": "order"}]
    found = {source_fingerprint(DataSource(**({"procedural": "addition", "size": 5} | more))) for more in fields}
    assert len(found) == len(fields)


def test_hub_rows_come_from_the_commit_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader is replaced: this checks what is asked for, not the hub."""
    asked: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name, subset=subset)
        return [{"q": "p", "a": "r"}, {"q": "p2", "a": "r2"}]

    monkeypatch.setattr(
        row_sources, "resolve_revision", lambda kind, name, revision: f"commit of {kind} {name} {revision}"
    )
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    columns = {"prompt": "{q}", "completion": "{a}"}
    source = DataSource(hub="org/set", subset="main", split="train[:2]", revision="v1", limit=1, columns=columns)
    (found,) = load_examples(source)
    assert (found.prompt[0].content, found.reply) == ("p", "r")
    commit = "commit of dataset org/set v1"
    wanted = {"name": "org/set", "subset": "main", "split": "train[:2]", "revision": commit, "streaming": False}
    wanted |= {"trust_remote_code": False}
    assert asked == wanted
    moved = source.model_copy(update={"revision": "v2"})
    assert source_fingerprint(source) != source_fingerprint(moved)


def test_a_pinned_commit_asks_nobody_and_an_unreachable_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert hub.resolve_revision("dataset", "org/set", commit) == commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="pin `revision`"):
        hub.resolve_revision("dataset", "org/no-such-set-in-any-cache", None)


def test_the_cached_commit_answers_when_the_hub_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    refs = tmp_path / "models--org--net" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc\n")
    assert hub.resolve_revision("model", "org/net", None) == "abc"


# --- tokens ---

TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TOOL_ROW = {
    "tools": [{"type": "function", "function": {"name": "clock", "parameters": {}}}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The time?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Sure."},
    ],
}


def test_every_assistant_turn_is_trained_on_its_tool_calls_too_and_nothing_else(tmp_path: Path) -> None:
    (found,) = load_examples(write(tmp_path / "a.jsonl", [TOOL_ROW]))
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = TOOLS
    row = tokenise(found, tokenizer, 10_000)
    assert labelled(row) == "<call>clock</call><|end|>It is noon.<|end|>Sure.<|end|>"
    assert '"name": "clock"' in tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize(("left_out", "what"), [("tools", "it does not write tools"), ("calls", "tool calls")])
def test_templates_that_leave_tools_out_are_refused(tmp_path: Path, left_out: str, what: str) -> None:
    (found,) = load_examples(write(tmp_path / "a.jsonl", [TOOL_ROW]))
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = TOOLS.replace(
        "if tools" if left_out == "tools" else "message.tool_calls", {"tools": "if 0", "calls": "[]"}[left_out]
    )
    with pytest.raises(DataError, match=what):
        tokenise(found, tokenizer, 10_000)


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, CHATML], ids=["scratch", "chatml"])
@settings(max_examples=30, deadline=None)
@given(turns=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=2, max_size=6))
def test_labels_are_every_reply_with_its_end_of_turn(template: str, turns: list[str]) -> None:
    turns = [turn for turn in turns if turn.strip() and "<|" not in turn] or ["x", "y"]
    turns = turns if len(turns) % 2 == 0 else [*turns, "z"]
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = template
    row = tokenise(example(*turns), tokenizer, 10_000)
    assert len(row["input_ids"]) == len(row["labels"])
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert labelled(row) == "".join(reply + "<|end|>" for reply in turns[1::2])
    prompt = tokenizer.decode(row["input_ids"][: next(i for i, x in enumerate(row["labels"]) if x != IGNORED)])
    assert prompt.endswith(f"{turns[0]}<|end|>\n<|start|>{'a' if template != CHATML else 'assistant'}\n")


def test_trimming_templates_and_templates_that_write_before_the_reply() -> None:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    assert labelled(tokenise(example("hi", "  ho \n"), tokenizer, 500)) == "ho<|end|>"
    tokenizer.chat_template = CHATML.replace(
        "message['content']", "('<think></think>' if message['role'] == 'assistant' else '') + message['content']"
    )
    assert labelled(tokenise(example("hi", "ho"), tokenizer, 500)) == "<think></think>ho<|end|>"


def test_thoughts_dropped_from_earlier_turns_do_not_confuse_spans() -> None:
    """Such a template is not prefix-stable: an earlier reply is written otherwise than when it was the last."""
    tokenizer = make_scratch_tokenizer(ScratchModel())
    thought = "('<think></think>' if loop.last and message['role'] == 'assistant' else '')"
    tokenizer.chat_template = CHATML.replace("message['content']", f"{thought} + message['content']")
    row = tokenise(example("a", "b", "c", "d"), tokenizer, 500)
    assert labelled(row) == "b<|end|><think></think>d<|end|>"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("message['content']", "message['content'] | upper", "does not appear in it as it is"),
        ("+ '<|end|>'", "+ '.'", "writes no special token after"),
    ],
)
def test_templates_that_cannot_be_labelled_are_refused(old: str, new: str, message: str) -> None:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = CHATML.replace(old, new)
    with pytest.raises(DataError, match=message):
        tokenise(example("hi", "ho"), tokenizer, 500)


def test_long_examples_are_cut() -> None:
    whole = tokenise(example("hi", "a long reply"), TOKENIZER, 500)
    cut = tokenise(example("hi", "a long reply"), TOKENIZER, 16)
    assert {key: values[:16] for key, values in whole.items()} == cut


def test_collator_pads_right_to_a_multiple_of_eight() -> None:
    rows = [tokenise(example("hi", reply), TOKENIZER, 500) for reply in ("x", "a reply of some length")]
    batch = CompletionCollator(TOKENIZER)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, -(-longest // 8) * 8)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][place, :length].tolist() == row["input_ids"]
        assert batch["labels"][place, :length].tolist() == row["labels"]
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert bool((batch["input_ids"][place, length:] == TOKENIZER.pad_token_id).all())
        assert bool((batch["labels"][place, length:] == IGNORED).all())
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


# --- mixtures and samples ---


def test_mixture_has_every_row_in_an_order_that_the_seed_decides() -> None:
    parts = [tokenised_dataset([example("p", f"{name}{i}") for i in range(9)], TOKENIZER, 50) for name in "ab"]
    rows = [labelled(row) for row in mixture(parts, seed=0)]
    assert sorted(rows) == sorted(f"{name}{i}<|end|>" for name in "ab" for i in range(9))
    assert rows == [labelled(row) for row in mixture(parts, seed=0)]
    assert rows != [labelled(row) for row in mixture(parts, seed=1)]


@pytest.mark.parametrize(
    ("temperature", "by", "wanted"), [(1, "rows", (24, 6)), (1e9, "rows", (15, 15)), (1e9, "tokens", (13, 50))]
)
def test_temperature_evens_out_what_tasks_give(temperature: float, by: Any, wanted: tuple[int, int]) -> None:
    """Task b's rows are little more than half as long as task a's: in tokens it gives as much with more rows."""
    sizes = {"a": (24, "x" * 37), "b": (6, "")}
    parts = [
        tokenised_dataset([example("p" + filler, f"{name}{i}") for i in range(count)], TOKENIZER, 100)
        for name, (count, filler) in sizes.items()
    ]
    rows = [labelled(row) for row in mixture(parts, 0, Mixing(temperature=temperature, by=by))]
    counts = {name: [row for row in rows if row.startswith(name)] for name in "ab"}
    assert (len(counts["a"]), len(counts["b"])) == wanted
    assert {name: len(set(found)) for name, found in counts.items()} == {"a": min(24, wanted[0]), "b": 6}
    if by == "tokens":
        tokens = {
            name: sum(len(row) for row in part["input_ids"]) / len(part) for name, part in zip("ab", parts, strict=True)
        }
        assert wanted[0] * tokens["a"] == pytest.approx(wanted[1] * tokens["b"], rel=0.05)


def test_packed_rows_hold_every_example_whole_and_once() -> None:
    examples = [example("p" * (i % 7), f"reply {i}") for i in range(40)]
    rows = tokenised_dataset(examples, TOKENIZER, 60)
    found: list[tuple[list[int], list[int]]] = []
    for row in packed_rows(rows, 60):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 60
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            assert row["position_ids"][start:stop] == list(range(len(row["input_ids"][start:stop])))
            found.append((row["input_ids"][start:stop], row["labels"][start:stop]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert sum(1 for _ in packed_rows(rows, 60)) < 0.7 * len(rows)


def test_balanced_samples() -> None:
    tasks = [[example("p", f"{name}{i}") for i in range(size)] for name, size in (("a", 20), ("b", 5))]
    assert [len(rows) for rows in balanced_sample(tasks, None, 0)] == [5, 5]
    assert [len(rows) for rows in balanced_sample(tasks, 8, 0)] == [8, 5]
    chosen = balanced_sample(tasks, 8, 0)
    assert chosen == balanced_sample(tasks, 8, 0) != balanced_sample(tasks, 8, 1)
    assert len(set(chosen[0])) == 8
    assert set(chosen[0]) <= set(tasks[0])


# --- rows held out of training ---


def held(file: DataSource, rows: int, seed: int = 0) -> TaskConfig:
    return TaskConfig(name="t", train=file, holdout=Holdout(rows=rows, seed=seed))


def test_rows_held_out_are_never_trained_on_whatever_their_order(tmp_path: Path) -> None:
    """Checked against the definition: the prompts with the lowest hashes, until there are enough rows."""
    rows = [chat(f"prompt {i % 70}", f"reply {i}") for i in range(100)]
    task = held(write(tmp_path / "a.jsonl", rows), 20)
    test, train = load_examples(task.test_data), load_examples(task.train_data)
    assert sorted(one.reply for one in [*test, *train]) == sorted(f"reply {i}" for i in range(100))
    assert not {one.prompt for one in test} & {one.prompt for one in train}
    assert 20 <= len(test) <= 21
    keys = sorted(held_key(one, Holdout(rows=1)) for one in load_examples(task.train or task.train_data))
    assert sorted(held_key(one, Holdout(rows=1)) for one in test) == keys[: len(test)]
    backwards = held(write(tmp_path / "b.jsonl", rows[::-1]), 20)
    assert {one.reply for one in load_examples(backwards.test_data)} == {one.reply for one in test}
    other = held(DataSource(file=tmp_path / "a.jsonl"), 20, seed=1)
    assert {one.reply for one in load_examples(other.test_data)} != {one.reply for one in test}
    assert shared_rows(RunConfig.model_construct(tasks=(task,))) == []
    names = [source_fingerprint(one) for one in (task.train_data, task.test_data, other.train_data, other.test_data)]
    assert len({*names, source_fingerprint(DataSource(file=tmp_path / "a.jsonl"))}) == 5


@pytest.mark.parametrize("rows", [10, 12, 10**6])
def test_holding_out_everything_is_refused_once(tmp_path: Path, rows: int) -> None:
    task = held(write(tmp_path / "a.jsonl", [chat(f"prompt {i}", "x") for i in range(10)]), rows)
    (problem,) = check_task(task)
    assert (problem.where, problem.remedy) == ("tasks.t.train, holdout.rows", "give fewer, or rows of other prompts")
    assert load_examples(held(DataSource(file=tmp_path / "a.jsonl"), 9).train_data)


def test_bad_rows_of_a_task_with_a_holdout_are_told_once(tmp_path: Path) -> None:
    task = held(write(tmp_path / "a.jsonl", [chat("a", "b"), {"x": 1}]), 1)
    assert [problem.where for problem in check_task(task)] == ["tasks.t.train, row 2"]
    with pytest.raises(ValidationError, match="give `test`, or `holdout`"):
        TaskConfig(name="t", train=DataSource(hub="a/b"), test=DataSource(hub="a/b"), holdout=Holdout(rows=1))
    with pytest.raises(ValidationError, match="takes rows out of `train`, which is not there"):
        TaskConfig(name="t", holdout=Holdout(rows=1))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 40))
def test_the_last_key_held_is_that_of_sorting_all(keys: list[int], rows: int) -> None:
    distinct = sorted(set(keys))
    enough = next((key for key in distinct if sum(one <= key for one in keys) >= rows), None)
    expected = None if enough is None or enough == distinct[-1] else enough
    assert last_held(keys, rows) == (expected, len(keys))
    assert last_held([*keys, None], rows) == (enough, len(keys))


def test_long_rows_are_not_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [chat(f"p{i}", "x" * (i + 1)) for i in range(40)])
    task = TaskConfig(name="t", train=source, holdout=Holdout(rows=8, max_characters=23))
    assert len(load_examples(task.test_data)) == 8
    assert all(size_of(one) <= 23 for one in load_examples(task.test_data))
    assert len(load_examples(task.train_data)) == 32
    few = TaskConfig(name="t", train=source, holdout=Holdout(rows=30, max_characters=23))
    assert "30 of 20 rows" in str(check_task(few))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.csv", "a/../../b", "https://x/y.csv", "~/x", ""])
def test_files_of_a_hub_data_set_lie_in_it(path: str) -> None:
    with pytest.raises(ValidationError, match="is no path inside the repository"):
        DataSource(hub="org/set", data_files=(path,))


def test_files_of_a_hub_data_set_are_asked_for_and_part_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(row_sources, "resolve_revision", lambda *_: "c0ffee")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **options: asked.update(options) or [chat("a", "b")])
    source = DataSource(hub="org/set", data_files=("data/train-*.parquet",))
    assert len(load_examples(source)) == 1
    assert asked["data_files"] == ["data/train-*.parquet"]
    assert source_fingerprint(source) != source_fingerprint(DataSource(hub="org/set"))
    with pytest.raises(ValidationError, match="data_files are files of a `hub` data set"):
        DataSource(file=Path("x.csv"), data_files=("x.csv",))


def test_problems_of_rows_are_one_line_a_kind_and_a_task() -> None:
    what = "does not write `x{}` of 'y'"
    rows = [(one, number) for one in ("a", "b") for number in (3, 40, 500)]
    found = [Problem(f"{one}.jsonl, row {number}", what.format(number)) for one, number in rows]
    assert [(one.where, one.what) for one in one_per_kind([*found, *[Problem("a.jsonl, row 7", "is empty")] * 2])] == [
        ("a.jsonl, row 3", f"{what.format(3)} (and 2 more of those looked at)"),
        ("b.jsonl, row 3", f"{what.format(3)} (and 2 more of those looked at)"),
        ("a.jsonl, row 7", "is empty"),
    ]


def test_a_reply_may_hold_what_marks_replies() -> None:
    for text in ("\ue000reply\ue001", "a \ue000reply\ue001 \ue000reply1\ue001 b"):
        assert labelled(tokenise(example("q", text, text, "r"), TOKENIZER, 10_000)) == f"{text}<|end|>r<|end|>"
