"""One row of a data set as a conversation whose last message is the reference reply."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.columns import ColumnError, fill
from cpift.turns import Message, RowError, check_links, parse_turn
from cpift.untrusted import ROW, UnreadableError, parse_json, require_limits

__all__ = ["Example", "Message", "RowError", "parse_row"]
# Columns by which other programs change what a template writes; here they would be ignored.
_REFUSED = {"functions": "give the functions as `tools`", "chat_template_kwargs": "set it in the template itself"}


@dataclass(frozen=True)
class Example:
    """One row of a task: the conversation, and what its metric compares with.

    The last message is the assistant's reference reply. `answer` is the right option (metric `choice`) or the text that
    ends in the right number (metric `number`); `choices` are the options' texts, none for other metrics. `tools` are
    the JSON schemas of the functions that the assistant may call, shown to it as the chat template says. `place`:
    source and row, for messages.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    choices: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    place: str = field(default="", compare=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def reply(self) -> str:
        return self.messages[-1].content


def parse_row(row: Mapping[str, Any], columns: Mapping[str, str], place: str = "") -> Example:
    """Read a row with `messages`, or with `prompt` and `completion`; `columns` first builds these from other columns.

    Prompt and completion may be text or turns. A missing `completion` is `answer`. An integer `answer` beside `choices`
    is the right option's position, from 0. `place`: see `Example`.

    Raises:
        RowError: a field is missing or of the wrong type, a role is unknown, the last message is no assistant's reply.
    """
    for name, remedy in _REFUSED.items():
        if row.get(name) and name not in columns:
            raise RowError(f"`{name}` would be ignored: {remedy}, or take it out")
    try:
        fields = {**row, **{name: fill(name, template, row) for name, template in columns.items()}}
    except ColumnError as error:
        raise RowError(str(error)) from None
    choices = _choices(fields.get("choices"))
    answer = _answer(fields.get("answer"), choices)
    example = Example(_messages(fields, answer), answer, choices, _tools(fields.get("tools")), place)
    _require_characters(example)
    return example


def _messages(fields: Mapping[str, Any], answer: str | None) -> tuple[Message, ...]:
    raw = fields.get("messages")
    if raw is None:
        raw = _prompt_and_completion(fields, answer)
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RowError(f"`messages` must be a list of role and content, not {type(raw).__name__}")
    messages = tuple(parse_turn(item, place) for place, item in enumerate(raw))
    if messages[-1].role != "assistant":
        raise RowError(f"the last message must be the assistant's reply, not the {messages[-1].role}'s")
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        raise RowError("the assistant's last reply is empty")
    if not any(message.role == "user" for message in messages):
        raise RowError("no message of the user")
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise RowError("no turn of the assistant is trained on; leave the row out")
    check_links(messages)
    return messages


def _prompt_and_completion(fields: Mapping[str, Any], answer: str | None) -> list[Any]:
    """Both are text, or both turns, as TRL writes them."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    completion = answer if completion is None else completion
    if prompt is None or completion is None:
        known = ", ".join(sorted(map(str, fields))) or "nothing"
        raise RowError(f"needs `messages`, or `prompt` and `completion`; it has {known}")
    before = prompt if _are_turns(prompt) else [{"role": "user", "content": prompt}]
    return [*before, *(completion if _are_turns(completion) else [{"role": "assistant", "content": completion}])]


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) and "role" in item for item in value)


def _require_characters(example: Example) -> None:
    """Raise RowError for half of a character (a lone surrogate), which no tokenizer takes and no file can hold."""
    try:
        require_limits([[one.role, one.content] for one in example.messages], ROW)
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


def _choices(raw: Any) -> tuple[str, ...]:
    """A list of texts, or one text with an option a line."""
    if raw is None:
        return ()
    options = [line for line in raw.splitlines() if line.strip()] if isinstance(raw, str) else raw
    if not isinstance(options, Sequence) or not all(isinstance(option, str) for option in options):
        raise RowError("`choices` must be a list of text")
    return tuple(options)


def _answer(raw: Any, choices: tuple[str, ...]) -> str | None:
    if raw is None or isinstance(raw, str):
        return raw
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        raise RowError(f"`answer` must be text or a number, not {type(raw).__name__}")
    if choices and isinstance(raw, int):
        if not 0 <= raw < len(choices):
            raise RowError(f"`answer` {raw} is no position in the {len(choices)} choices")
        return choices[raw]
    return str(raw)
