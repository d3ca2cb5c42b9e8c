"""The shapes of rows that are known by their columns, and what to do about a row of none of them."""

from __future__ import annotations

import decimal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpift.rows.turns import RowError
from cpift.untrusted.json import ROW, UnreadableError, parse_json

Fields = Mapping[str, Any]
NUMBERS = (bool, int, float, decimal.Decimal)


@dataclass(frozen=True)
class RowKind:
    """Rows with all columns of `needs` (null is absent) and none of `without`."""

    title: str
    needs: tuple[str, ...]
    turns: Callable[[Fields], list[Any]]  # the conversation as turns with role and content
    without: tuple[str, ...] = ()
    plain: bool = False  # whether it is a text that is trained on as it stands, with no chat template


# What columns of other data sets are called, the likeliest first. `columns_for` builds prompt and completion of them.
PROMPTS = (
    "prompt", "question", "instruction", "query", "problem", "question_stem", "ctx", "input", "source", "document",
    "article", "sentence", "premise", "user", "text",
)  # fmt: skip
REPLIES = (
    "completion", "answer", "response", "output", "solution", "reply", "target", "chosen", "summary", "highlights",
    "translation", "label", "labels", "category", "class",
)  # fmt: skip
CONTEXTS = ("context", "passage", "input")  # what a prompt is about, in a column of its own; may be empty


def _messages(fields: Fields) -> list[Any]:
    return _list("messages", fields["messages"])


def _list(name: str, value: Any) -> list[Any]:
    """A list of turns, or its JSON text, as tables hold it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, ROW)
        except UnreadableError as error:
            raise RowError(f"`{name}` {error}") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(f"`{name}` must be a list of role and content, not {type(value).__name__}")
    return list(value)


def _prompt(fields: Fields) -> list[Any]:
    """Both are text, or both turns, as TRL writes them. A missing completion is the answer."""
    prompt: Any = fields["prompt"]
    completion: Any = fields.get("completion")
    completion = fields.get("answer") if completion is None else completion
    before = prompt if _are_turns(prompt) else [{"role": "user", "content": prompt}]
    after = completion if _are_turns(completion) else [{"role": "assistant", "content": _written(completion)}]
    return [*before, *after]


def _written(value: Any) -> Any:
    """A reply that is a number or true or false as text, as templates of `columns` write it."""
    return str(value) if isinstance(value, NUMBERS) else value


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) and "role" in item for item in value)


def _sharegpt(fields: Fields) -> list[Any]:
    return _system(fields) + _list("conversations", fields["conversations"])


def _system(fields: Fields) -> list[Any]:
    """A system prompt in a column beside the conversation, where it is not empty."""
    return [{"role": "system", "content": fields["system"]}] if fields.get("system") else []


def _instructed(context: str, reply: str) -> Callable[[Fields], list[Any]]:
    """Instruction, a context that may be empty or absent, and the reply."""

    def turns(fields: Fields) -> list[Any]:
        texts = (_text(name, fields[name]) for name in ("instruction", context) if fields.get(name))
        prompt = "\n\n".join(text for text in texts if text.strip())
        return [
            *_system(fields),
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": _written(fields[reply])},
        ]

    return turns


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"`{name}` must be text, not {type(value).__name__}")
    return value


def _plain(fields: Fields) -> list[Any]:
    return [{"role": "assistant", "content": _text("text", fields["text"])}]


# The first that fits is taken.
KINDS: tuple[RowKind, ...] = (
    RowKind("messages", ("messages",), _messages),
    RowKind("prompt and completion", ("prompt", "completion"), _prompt),
    RowKind("prompt and answer", ("prompt", "answer"), _prompt),
    RowKind("ShareGPT", ("conversations",), _sharegpt),
    RowKind("Alpaca", ("instruction", "output"), _instructed("input", "output")),
    RowKind("Dolly", ("instruction", "response"), _instructed("context", "response")),
    RowKind(
        "plain text",
        ("text",),
        _plain,
        without=tuple(name for name in (*PROMPTS, *REPLIES) if name not in ("text", "source")),
        plain=True,
    ),
)


def kind_of(fields: Fields) -> RowKind:
    """Raises RowError, with the columns that there are, where no kind fits."""
    there = {name for name, value in fields.items() if value is not None}
    for kind in KINDS:
        if there.issuperset(kind.needs) and there.isdisjoint(kind.without):
            return kind
    if inside := next((name for name, value in fields.items() if _holds_rows(value)), None):
        raise RowError(f"is no row: its rows stand under {inside!r}", "save that list as a JSON array")
    known = ", ".join(sorted(map(str, there))) or "nothing"
    what = "needs `messages`, `prompt` and `completion`, or another known shape"
    raise RowError(f"{what}; it has {known}", _remedy(there))


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, dict) for element in value)


def _remedy(names: Collection[str]) -> str:
    lacking = [name for name in ("prompt", "completion") if name not in names]
    if columns := columns_for(names):
        written = ", ".join(
            f'{name}: "{template}"'
            for name, template in columns.items()
            if name in lacking or name != template.strip("{}")
        )
        return f"columns: {{{written}}}"
    written = ", ".join(f'{name}: "{{...}}"' for name in lacking)
    return f"say which columns make them: columns: {{{written}}}"


def columns_for(names: Collection[str]) -> dict[str, str]:
    """Templates for `columns` that make prompt and completion of such columns; empty where their names say nothing."""
    prompt = next((name for name in PROMPTS if name in names), None)
    reply = next((name for name in REPLIES if name in names), None)
    if prompt is None or reply is None:
        return {}
    context = next((name for name in CONTEXTS if name in names and name != prompt), None)
    before = f"{{{context}:?}}\n\n" if context else ""
    return {"prompt": f"{before}{{{prompt}}}", "completion": f"{{{reply}}}"}
