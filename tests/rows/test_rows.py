"""What rows hold reaches the model as transformers writes it, or is refused by name; templates render within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cpift.config.inputs import ScratchModel
from cpift.config.run import DataSource
from cpift.data import templates
from cpift.data.tasks import load_examples, source_fingerprint
from cpift.data.tokenise import IGNORED, tokenise
from cpift.errors import DataError
from cpift.hub import HubError, download, resolve_revision
from cpift.models.scratch import make_scratch_tokenizer
from cpift.rows.examples import Example, parse_row
from cpift.rows.turns import Message, RowError

# As Qwen3's: a thought in the content is taken for one, and the last reply has an empty one where there is none.
THINKING = (
    "{% if tools %}{{ '<|start|>system\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not m.tool_calls and (loop.last or thought) %}"
    "{{ '<think>' + thought + '</think>' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ANSWER = {"role": "tool", "content": "4"}
USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def tokenizer_of(template: str) -> Any:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    tokenizer.chat_template = template
    return tokenizer


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}, **more}]}


def trained_text(tokenizer: Any, example: Example) -> str:
    labels = tokenise(example, tokenizer, 10_000)["labels"]
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


# --- turns ---

HONOURED: list[tuple[str, list[Any], list[Any], str]] = [  # name, turns, what transformers is given, what is trained on
    ("thought", [USER, REPLY | {"reasoning_content": "sum"}], [USER, REPLY | {"reasoning_content": "sum"}],
     "<think>sum</think>4<|end|>"),
    ("null thought", [USER, REPLY | {"reasoning_content": None, "tool_calls": None}], [USER, REPLY],
     "<think></think>4<|end|>"),
    ("arguments as text", [USER, call('{"a": [1, null]}'), ANSWER, REPLY],
     [USER, call({"a": [1, None]}) | {"content": ""}, ANSWER, REPLY],
     '<call>add{"a": [1, null]}<|end|><think></think>4<|end|>'),
    ("parts", [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}, REPLY],
     [USER, REPLY], "<think></think>4<|end|>"),
    ("weights", [USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}], [USER, REPLY, USER, REPLY],
     "<think></think>4<|end|>"),
    ("flags", [USER | {"train": False}, REPLY | {"train": False}, USER, REPLY | {"train": True}],
     [USER, REPLY, USER, REPLY], "<think></think>4<|end|>"),
    ("linked answer", [USER, call({}, id="c1"), ANSWER | {"tool_call_id": "c1", "name": "add"}, REPLY],
     [USER, call({}) | {"content": ""}, ANSWER, REPLY],
     "<call>add{}<|end|><think></think>4<|end|>"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "reference", "trained"), [case[1:] for case in HONOURED], ids=[c[0] for c in HONOURED]
)
def test_a_turn_is_written_as_transformers_writes_it(turns: list[Any], reference: list[Any], trained: str) -> None:
    tokenizer = tokenizer_of(THINKING)
    example = parse_row({"messages": turns}, {})
    assert tokenizer.decode(tokenise(example, tokenizer, 10_000)["input_ids"]) == tokenizer.apply_chat_template(
        reference, tokenize=False
    )
    assert trained_text(tokenizer, example) == trained


def test_prompt_and_completion_may_be_turns() -> None:
    row = {"prompt": [{"role": "system", "content": "s"}, USER], "completion": [REPLY]}
    assert parse_row(row, {}) == parse_row({"messages": [*row["prompt"], REPLY]}, {})


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER, {"role": "assistant", "content": None}], "has no role and content"),
        ([USER, {"from": "gpt", "text": "4"}], "no role and content; it has from, text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, REPLY], "only parts of type 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}, REPLY], "'cache_control'"),
        ([USER, call("{broken")], "arguments is no JSON: "),
        ([USER, call("[1]")], "must be an object or its JSON text"),
        ([USER, call(None)], "must be an object or its JSON text"),
        ([USER, call({}, index=0)], "'index' has no meaning here; known: id, type"),
        ([USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}], r"tool_calls\[0\] has no name"),
        ([USER, REPLY | {"weight": 0.5}], "weight is 0.5; 1 or true trains"),
        ([USER | {"train": True}, REPLY], "only turns of the assistant are trained on"),
        ([USER, REPLY | {"weight": 0}], "no turn of the assistant is trained on"),
        ([USER, REPLY | {"weight": 1, "train": False}], "weight and train disagree"),
        ([USER, call({}, id="a"), ANSWER | {"tool_call_id": "b"}, REPLY], "'b'; in the order of"),
        ([USER, call({}), ANSWER | {"name": "sub"}, REPLY], "'sub'; in the order of calls it is"),
        ([USER, ANSWER | {"name": "add"}, REPLY], "that the turn before does not make"),
        ([USER, {"role": "assistant", "content": "a\ud83d"}], "half of a surrogate pair"),
        ([USER | {"name": "\udc00"}, REPLY], "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_turn_that_would_be_misread_is_refused(turns: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row({"messages": turns}, {})


@pytest.mark.parametrize("field", ["name", "note", "thoughts", "function_call", "refusal"])
def test_a_field_that_the_template_does_not_write_is_refused(field: str) -> None:
    example = parse_row({"messages": [USER, REPLY | {field: "x"}]}, {}, "a.jsonl, row 3")
    with pytest.raises(DataError, match=f"a.jsonl, row 3: chat template: it does not write `{field}`"):
        tokenise(example, tokenizer_of(THINKING), 500)
    written = tokenizer_of(THINKING.replace("{{ content }}", f"{{{{ m.{field} }}}}{{{{ content }}}}"))
    assert trained_text(written, example).endswith("x4<|end|>")


def test_a_thought_inside_the_content_is_refused_with_where_it_belongs() -> None:
    example = parse_row({"messages": [USER, {"role": "assistant", "content": "<think>x</think>\n\n4"}]}, {}, "row 7")
    with pytest.raises(DataError, match=r"row 7: .* give the thought as the turn's `reasoning_content`"):
        tokenise(example, tokenizer_of(THINKING), 500)


def test_rows_of_other_programs_whose_meaning_is_elsewhere_are_refused() -> None:
    for name in ("functions", "chat_template_kwargs"):
        with pytest.raises(RowError, match=f"`{name}` would be ignored"):
            parse_row({"messages": [USER, REPLY], name: {"x": 1}}, {})


def test_results_from_rows_that_were_misread_before_get_a_new_fingerprint_and_no_others(tmp_path: Path) -> None:
    before: dict[str, Any] = {"limit": None, "columns": {}}
    for turns, anew in (
        ([USER, REPLY], False),
        ([USER, call({}), ANSWER, REPLY], False),
        ([USER, call("{}"), ANSWER, REPLY], True),
        ([USER, REPLY | {"reasoning_content": "x"}], True),
        ([USER, REPLY | {"reasoning_content": None}], False),
        ([USER, REPLY | {"weight": 0}, USER, REPLY], True),
        ([USER, call({})], True),
    ):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"messages": turns, "name": "a row's own column"}))
        from cpift.disk.artifacts import digest
        from cpift.disk.files import file_sha256

        same = digest(before | {"file": file_sha256(file)})
        assert (source_fingerprint(DataSource(file=file)) != same) == anew, turns


# --- columns ---


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        ({"i": "do", "input": None}, "{i}\n{input:?}", "do\n"),
        ({"i": "do", "input": "x"}, "{i}\n{input:?}", "do\nx"),
        ({"n": 3.14159, "b": True}, "{n:.2f} {b} {{}}", "3.14 True {}"),
        ({"n": {"a": ["x", "y"]}}, "{n[a][1]:>3}", "  y"),
    ],
)
def test_columns_are_filled(row: dict[str, Any], template: str, text: str) -> None:
    found = parse_row({**row, "completion": "r"}, DataSource(file=Path("x"), columns={"prompt": template}).columns)
    assert found.messages == (Message("user", text), Message("assistant", "r"))


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"i": "do", "input": None}, "{i}\n{input}", r"\{input\} is null; write \{input:\?\}"),
        ({"o": ["a", "b"]}, "{o}", "is no text but list"),
        ({"o": {"a": None}}, "{o[a]}", "is null"),
        ({"o": "x"}, "{o:d}", "cannot be filled"),
        ({"o": "x"}, "{o[9]}", "cannot be filled"),
    ],
)
def test_columns_that_would_be_invented_are_refused(row: dict[str, Any], template: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row({**row, "completion": "r"}, {"prompt": template})


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("prompt", "{q:>3000000000}"),
        ("prompt", "{q:1000}"),
        ("prompt", "{n:.3000000000f}"),
        ("prompt", "{q:{w}}"),
        ("prompt", "{q.__class__.__mro__}"),
        ("prompt", "{q[a].b}"),
        ("prompt", "{q!r}"),
        ("prompt", "{}"),
        ("prompt", "{0}"),
        ("prompt", "{q"),
        ("promt", "{q}"),
        ("answer", "{q.real}"),
    ],
)
def test_columns_that_reach_too_far_are_refused_in_the_config(name: str, template: str) -> None:
    with pytest.raises(ValidationError, match=f"columns.{name}"):
        DataSource(file=Path("x"), columns={name: template})


# --- templates ---

BROKEN = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "power": ("{{ 10 ** (10 ** 9) }}", "processor time|memory"),
    "gigabytes": ("{{ 'a' * 30000000000 }}", "memory"),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "processor time|memory",
    ),
    "formats": ("{{ '{:>3000000000}'.format('x') }}", "memory"),
    "megabytes": ("{{ 'a' * 20000000 }}", "more than 16,777,216 characters"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails|exit code"),
    "python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "sandbox|fails"),
    "syntax": ("{% for %}", "is no jinja template"),
    "undefined": ("{{ messages[0].a.b }}", "fails .UndefinedError"),
    "raised": ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
    "types": ("{{ messages + 1 }}", "fails .TypeError"),
}  # fmt: skip


_EACH_A_NEW_CHILD = ("power", "doubling", "megabytes", "recursion")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if one in _EACH_A_NEW_CHILD else one for one in BROKEN]
)
def test_templates_are_limited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    template, message = BROKEN[name]
    with pytest.raises(DataError, match=f"rows.jsonl, row 1: chat template: it .*({message})"):
        tokenise(parse_row({"messages": [USER, REPLY]}, {}, "rows.jsonl, row 1"), tokenizer_of(template), 500)


def test_a_checked_template_renders_in_this_process_to_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    example = parse_row({"messages": [USER, REPLY]}, {})
    limited = tokenise(example, tokenizer_of(THINKING), 500)
    monkeypatch.setattr(templates, "renderer", lambda: pytest.fail("asked the child"))
    with templates.checked_templates():
        assert tokenise(example, tokenizer_of(THINKING), 500) == limited
        with pytest.raises(DataError, match="is no jinja template"):
            tokenise(example, tokenizer_of("{% for %}"), 500)


class Unreachable(Exception):
    """As httpx raises, which is no OSError."""


def test_a_hub_that_does_not_answer_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Unreachable("connection refused")

    def broken(*_: Any, **__: Any) -> Any:
        yield {"prompt": "p", "completion": "r"}
        raise Unreachable("connection lost")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(HubError, match=r"no answer for model 'org/net' .*connection refused"):
        resolve_revision("model", "org/net", None)
    with pytest.raises(HubError, match="connection refused"):
        download("org/net", "0" * 40)
    for loader, message in ((refuse, "connection refused"), (broken, "connection lost")):
        monkeypatch.setattr("datasets.load_dataset", loader)
        with pytest.raises(DataError, match=message):
            load_examples(DataSource(hub="org/set", revision="0" * 40))


def test_examples_know_their_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": [USER, REPLY]}) for _ in range(2)))
    assert [one.place for one in load_examples(DataSource(file=file))] == [f"{file}, row 1", f"{file}, row 2"]
