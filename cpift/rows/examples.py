"""One row of a data set as a conversation whose last message is the reference reply."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.config.columns import ColumnError, Template, fill
from cpift.rows.kinds import NUMBERS, RowKind, kind_of
from cpift.rows.turns import Message, RowError, check_links, parse_turn
from cpift.untrusted.json import ROW, UnreadableError, parse_json, require_limits

__all__ = ["Example", "Message", "RowError", "parse_row"]
# Columns by which other programs change what a template writes; here they would be ignored.
_REFUSED = {"functions": "give the functions as `tools`", "chat_template_kwargs": "set it in the template itself"}


@dataclass(frozen=True)
class Example:
    """One row of a task: the conversation, and what its metric compares with.

    The last message is the assistant's reference reply. `answer` is the right option (metric `choice`) or the text that
    ends in the right number (metric `number`); `choices` are the options' texts, none for other metrics. `tools` are
    the JSON schemas of the functions that the assistant may call, shown to it as the chat template says. `place`:
    source and row, for messages. `plain`: a text that is trained on as it stands; it is the only message.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    choices: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    place: str = field(default="", compare=False)
    plain: bool = False

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def distinct(self) -> tuple[Message, ...]:
        """By which rows are told apart when some are kept for testing: the prompt, of a plain text the text."""
        return self.messages if self.plain else self.prompt

    @property
    def reply(self) -> str:
        return self.messages[-1].content


def parse_row(row: Mapping[str, Any], columns: Mapping[str, Template], place: str = "") -> Example:
    """Read a row of one of `kinds.KINDS`; `columns` first builds its columns from others.

    Of `choices` the right option, `answer`, is its text, its position from 0 as an integer, its letter, or what stands
    for it in the choices' own labels. `place`: see `Example`.

    Raises:
        RowError: a field is missing or of the wrong type, a role is unknown, the last message is no assistant's reply.
    """
    for name, remedy in _REFUSED.items():
        if row.get(name) and name not in columns:
            raise RowError(f"`{name}` would be ignored: {remedy}, or take it out")
    try:
        fields = {**row, **{name: fill(name, template, row) for name, template in columns.items()}}
    except ColumnError as error:
        raise RowError(str(error), error.remedy) from None
    choices, labels = _choices(fields.get("choices"))
    fields["answer"] = answer = _answer(fields.get("answer"), choices, labels)
    kind = kind_of(fields)
    example = Example(_messages(fields, kind), answer, choices, _tools(fields.get("tools")), place, kind.plain)
    _require_characters(example)
    return example


def options_otherwise(row: Mapping[str, Any], columns: Mapping[str, Template]) -> bool:
    """Whether earlier versions read other choices or another answer of a row: see `data.tasks.source_fingerprint`."""
    try:
        raw = {
            name: fill(name, columns[name], row) if name in columns else row.get(name) for name in ("choices", "answer")
        }
        choices, labels = _choices(raw["choices"])
        lines = isinstance(raw["choices"], str) and [line for line in raw["choices"].splitlines() if line.strip()]
        answered = isinstance(raw["answer"], str) and _answer(raw["answer"], choices, labels) != raw["answer"]
    except (ColumnError, RowError):
        return False
    return answered or (lines is not False and lines != list(choices))


def _messages(fields: Mapping[str, Any], kind: RowKind) -> tuple[Message, ...]:
    messages = _to_last_reply([parse_turn(item, place) for place, item in enumerate(kind.turns(fields))])
    if messages[-1].role != "assistant":
        what = f"the last message must be the assistant's reply, not the {messages[-1].role}'s"
        raise RowError(what, "take out what comes after the last reply")
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        raise RowError("the text is empty" if kind.plain else "the assistant's last reply is empty")
    if not kind.plain and not any(message.role == "user" for message in messages):
        raise RowError("no message of the user")
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise RowError("no turn of the assistant is trained on; leave the row out")
    check_links(messages)
    return messages


def _to_last_reply(messages: list[Message]) -> tuple[Message, ...]:
    """Without what the user says after the last reply, as logs of chats end: nothing can be learnt from it."""
    replied = any(message.role == "assistant" for message in messages)
    while replied and messages[-1].role == "user":
        messages = messages[:-1]
    return tuple(messages)


def _require_characters(example: Example) -> None:
    """Raise RowError for half of a character (a lone surrogate), which no tokenizer takes and no file can hold."""
    try:
        require_limits([[message.role, message.content] for message in example.messages], ROW)
        require_limits([example.answer, example.choices], ROW)
    except UnreadableError as error:
        raise RowError(str(error)) from None


def _tools(raw: Any) -> tuple[str, ...]:
    """A list of schemas, or its JSON text."""
    try:
        raw = parse_json(raw, ROW) if isinstance(raw, str) else raw
        require_limits(raw, ROW)
    except UnreadableError as error:
        raise RowError(f"`tools` {error}") from None
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or not all(isinstance(tool, Mapping) for tool in raw):
        raise RowError("`tools` must be a list of JSON schemas")
    try:
        return tuple(json.dumps(tool) for tool in raw)
    except (TypeError, ValueError) as error:
        raise RowError(f"`tools` holds what JSON cannot: {error}") from None


def _choices(raw: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options' texts and what stands for each in `answer`, its letter if nothing else is said.

    A list of texts or its JSON text; a text with an option a line; or `text` and `label`, two lists of equal length.
    """
    labels: Any = None
    if isinstance(raw, Mapping) and set(raw) == {"text", "label"}:
        raw, labels = raw["text"], raw["label"]
    options = _option_lines(raw) if isinstance(raw, str) else () if raw is None else raw
    if not isinstance(options, Sequence) or not all(isinstance(option, str) for option in options):
        raise RowError("`choices` must be a list of text")
    labels = string.ascii_uppercase[: len(options)] if labels is None else labels
    if not isinstance(labels, Sequence) or (
        len(labels) != len(options) and len(options) <= len(string.ascii_uppercase)
    ):
        raise RowError("`choices` must have a label for each text")
    return tuple(options), tuple(map(str, labels))


def _option_lines(text: str) -> Any:
    if text.lstrip().startswith("[") and "\n" not in text.strip():
        try:
            return parse_json(text, ROW)
        except UnreadableError:
            pass  # an option that begins with a bracket
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _answer(raw: Any, choices: tuple[str, ...], labels: tuple[str, ...]) -> str | None:
    if isinstance(raw, str) and raw not in choices and raw.strip() in labels:
        return choices[labels.index(raw.strip())]
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, NUMBERS):
        raise RowError(f"`answer` must be text or a number, not {type(raw).__name__}")
    if isinstance(raw, bool):
        return str(raw)  # as a template of `columns` writes it
    if choices and isinstance(raw, int):
        if not 0 <= raw < len(choices):
            raise RowError(f"`answer` {raw} is no position in the {len(choices)} choices")
        return choices[raw]
    return str(raw)
