"""The tables of documents that the code decides, each from its module. `python -m tests.supported` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.merging import beside
from cpift.checkpoints import layout, lora_config
from cpift.pretrained import fields as model_fields
from cpift.rows import formats as row_formats
from cpift.rows import kinds as row_kinds
from cpift.rows.examples import parse_row
from cpift.rows.turns import RowError
from cpift.untrusted import json as untrusted

DOCUMENTS = [Path(__file__).parents[1] / "docs" / name for name in ("supported.md", "security.md", "comparison.md")]
_READ = {
    "CONFIG": "a run's, sweep's or comparison's YAML, values of `--set`",
    "MODEL_CONFIG": "`config.json`, the tokenizer's and generation's configs",
    "ADAPTER": "`adapter_config.json`",
    "INDEX": "`model.safetensors.index.json`",
    "TENSOR_HEADER": "a safetensors header",
    "ROW": "one row of a data file",
    "ANSWER": "a judge's answer",
    "RECORD": "what cpift wrote",
}


def limits_table() -> str:
    """What each reader of JSON and YAML takes at most."""
    limits = {name: limit for name, limit in vars(untrusted).items() if isinstance(limit, untrusted.Limits)}
    rows = [
        f"| {_READ[name]} | {limit.size:,} | {limit.values:,} | {limit.depth} | {limit.digits} |"
        for name, limit in limits.items()
    ]
    head = "| what is read | bytes | values | levels | digits of a whole number |"
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows])


TABLES: dict[str, Callable[[], str]] = {
    "adapters": lora_config.fields_table,
    "models": layout.models_table,
    "configuration": model_fields.fields_table,
    "limits": limits_table,
    "beside mergekit": beside.table,
}  # a marker in the document → the function that gives its table as markdown

_USER, _REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "r"}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_CALLS, _ANSWER = _REPLY | {"tool_calls": [_CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "1"}


def _talk(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


# What is shown of rows: name, the row, templates of `columns`. What becomes of each is asked of the code.
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("`messages`, text contents", _talk(_USER, _REPLY), {}),
    ("`prompt` and `completion`, text", {"prompt": "u", "completion": "r"}, {}),
    ("`prompt` and `completion`, turns", {"prompt": [_USER], "completion": [_REPLY]}, {}),
    ("`prompt` and `answer`", {"prompt": "u", "answer": "r"}, {}),
    ("content: list of parts of type text", _talk(_USER | {"content": [{"type": "text", "text": "u"}]}, _REPLY), {}),
    ("content: a part of another type", _talk(_USER | {"content": [{"type": "image"}]}, _REPLY), {}),
    ("content null beside `tool_calls`", _talk(_USER, _REPLY | {"content": None, "tool_calls": [_CALL]}), {}),
    ("content null", _talk(_USER, _REPLY | {"content": None}), {}),
    ("any other field null", _talk(_USER, _REPLY | {"reasoning_content": None}), {}),
    ("`reasoning_content`, `name` and every other field", _talk(_USER, _REPLY | {"reasoning_content": "t"}), {}),
    ("`weight`, `train`, `training`, `trainable`, `loss`", _talk(_USER, _REPLY | {"weight": 0}, _USER, _REPLY), {}),
    ("`weight` between 0 and 1", _talk(_USER, _REPLY | {"weight": 0.5}), {}),
    ("`tool_calls`, arguments an object or its JSON text", _talk(_USER, _CALLS), {}),
    ("`tool_call_id`, `name` of a tool's answer",
     _talk(_USER, _CALLS, _ANSWER, _REPLY), {}),
    ("`tool_call_id` of another call",
     _talk(_USER, _CALLS, _ANSWER | {"tool_call_id": "c2"}, _REPLY), {}),
    ("role `developer`", _talk({"role": "developer", "content": "d"}, _USER, _REPLY), {}),
    ("another role", _talk({"role": "robot", "content": "d"}, _USER, _REPLY), {}),
    ("ShareGPT: `conversations` of `from` and `value`",
     {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "r"}], "system": "s"}, {}),
    ("Alpaca: `instruction`, `input`, `output`", {"instruction": "u", "input": "i", "output": "r"}, {}),
    ("Alpaca, `input` empty, null or absent", {"instruction": "u", "input": "", "output": "r"}, {}),
    ("Dolly: `instruction`, `context`, `response`", {"instruction": "u", "context": "c", "response": "r"}, {}),
    ("plain `text`, trained on as it stands, without the chat template", {"text": "r"}, {}),
    ("`text` beside columns that mean something", {"text": "u", "label": "r"}, {}),
    ("`choices`, and `answer` the right one's text, position or letter",
     {"prompt": "u", "choices": ["q", "r"], "answer": "B"}, {}),
    ("the same list of `choices` in every row", {"i": "u", "o": "r"},
     {"prompt": "{i}", "completion": "{o}", "choices": ("q", "r")}),
    ("half of a character (lone surrogate)", _talk(_USER, _REPLY | {"content": "\ud83d"}), {}),
    ("`functions`, `chat_template_kwargs`", {"messages": [_USER, _REPLY], "functions": [{"name": "f"}]}, {}),
    ("a column in a text of `columns`", {"i": "u", "o": "r"}, {"prompt": "{i}", "completion": "{o}"}),
    ("a null column in a text", {"i": None, "o": "r"}, {"prompt": "x{i}", "completion": "{o}"}),
    ("a null column, written `{i:?}`", {"i": None, "o": "r"}, {"prompt": "x{i:?}", "completion": "{o}"}),
    ("a list in a text", {"i": ["u"], "o": "r"}, {"prompt": "{i}", "completion": "{o}"}),
]  # fmt: skip


def rows() -> str:
    """Shapes of rows and fields of turns, and what `parse_row` makes of each."""
    lines = ["| what a row has | what becomes of it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_becomes(row, columns)} |" for name, row, columns in ROWS)])


def _becomes(row: dict[str, Any], columns: dict[str, str]) -> str:
    try:
        example = parse_row(row, columns)
    except RowError as error:
        return f"refused: {ascii(str(error))[1:-1]}"
    parts = []
    for turn in example.messages:
        extra = "".join(f", {name} {value!r}" for name, value in turn.turn.items() if name not in ("role", "content"))
        parts.append(f"{turn.role} {turn.content!r}{extra}" + ("" if turn.trained else ", not trained on"))
    fields = any(turn.fields for turn in example.messages if turn.role != "tool")
    return "; ".join(parts) + (" (refused where the chat template does not write it)" if fields else "")


TABLES["rows"] = rows


def formats() -> str:
    """Files of rows: what is read, by what of it, and what is refused by name."""
    packed = ", ".join(name for name, _ in row_formats.COMPRESSIONS.values())
    binary = ", ".join(sorted({kind.title for kind in row_formats.BINARY.values()}))
    tables = ", ".join(dict.fromkeys(row_formats.TABLES.values()))
    lines = ["| file | known by |", "|---|---|"]
    lines += [
        f"| JSON lines, a JSON array, {tables}; as they are or compressed ({packed}) | first sign; ending of its name |"
    ]
    lines += [
        f"| {binary} | first bytes |",
        "| folders of datasets' `save_to_disk`, with or without splits | state.json |",
    ]
    lines += [
        f"| one that {what} | refused: {remedy} |" for what, remedy in dict.fromkeys(row_formats.REFUSED.values())
    ]
    kinds = (f"{kind.title} ({', '.join(f'`{name}`' for name in kind.needs)})" for kind in row_kinds.KINDS)
    return "\n".join([*lines, "", f"Shapes of rows, the first that fits: {'; '.join(kinds)}."])


TABLES["formats"] = formats


def written(text: str) -> str:
    """The document with every table as the code has it."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table().rstrip()}\n{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
