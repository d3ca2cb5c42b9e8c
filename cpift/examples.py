"""One row of a data set as a conversation whose last message is the reference reply."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpift.untrusted import ROW, UnreadableError, parse_json, require_limits

ROLES = ("system", "user", "assistant", "tool")
# Fields that take a column's own value, not its text, where their template is one placeholder: '{options}'.
_RAW_FIELDS = ("messages", "choices", "answer", "tools")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `tool_calls`: JSON of the calls that an assistant's turn makes, else empty."""

    role: str
    content: str
    tool_calls: str = ""


@dataclass(frozen=True)
class Example:
    """One row of a task: the conversation, and what its metric compares with.

    The last message is the assistant's reference reply. `answer` is the right option (metric `choice`) or the text that
    ends in the right number (metric `number`); `choices` are the options' texts, none for other metrics. `tools` are
    the JSON schemas of the functions that the assistant may call, shown to it as the chat template says.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    choices: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def reply(self) -> str:
        return self.messages[-1].content


class RowError(ValueError):
    """A row that is no example; the message says why."""


def parse_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    """Read a row with `messages`, or with `prompt` and `completion`; `columns` first builds these from other columns.

    A missing `completion` is `answer`. An integer `answer` beside `choices` is the right option's position, from 0.

    Raises:
        RowError: a field is missing or of the wrong type, a role is unknown, the last message is no assistant's reply.
    """
    fields = {**row, **{name: _filled(name, template, row) for name, template in columns.items()}}
    choices = _choices(fields.get("choices"))
    answer = _answer(fields.get("answer"), choices)
    return Example(_messages(fields, answer), answer, choices, _tools(fields.get("tools")))


def _filled(name: str, template: str, row: Mapping[str, Any]) -> Any:
    """A template over the row's columns, as str.format reads it; `{column[key]}` reaches into nested columns."""
    parts = list(string.Formatter().parse(template))
    try:
        if name in _RAW_FIELDS and len(parts) == 1 and parts[0][0] == "" and parts[0][1] and not parts[0][2]:
            return string.Formatter().get_field(parts[0][1], (), row)[0]
        return template.format_map(row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        known = ", ".join(sorted(row))
        raise RowError(f"columns.{name}: {template!r} cannot be filled ({error}); the row has {known}") from None


def _messages(fields: Mapping[str, Any], answer: str | None) -> tuple[Message, ...]:
    raw = fields.get("messages")
    if raw is None:
        raw = _prompt_and_completion(fields, answer)
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RowError(f"`messages` must be a list of role and content, not {type(raw).__name__}")
    messages = tuple(_message(item, place) for place, item in enumerate(raw))
    if messages[-1].role != "assistant":
        raise RowError(f"the last message must be the assistant's reply, not the {messages[-1].role}'s")
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        raise RowError("the assistant's last reply is empty")
    if not any(message.role == "user" for message in messages):
        raise RowError("no message of the user")
    return messages


def _prompt_and_completion(fields: Mapping[str, Any], answer: str | None) -> list[dict[str, Any]]:
    completion = fields.get("completion")
    completion = answer if completion is None else completion
    if fields.get("prompt") is None or completion is None:
        known = ", ".join(sorted(fields)) or "nothing"
        raise RowError(f"needs `messages`, or `prompt` and `completion`; it has {known}")
    return [{"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": completion}]


def _message(item: Any, place: int) -> Message:
    calls = item.get("tool_calls") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or "role" not in item or not ("content" in item or calls):
        raise RowError(f"messages[{place}] has no role and content")
    if item["role"] not in ROLES:
        raise RowError(f"messages[{place}] has role {item['role']!r}; known: {', '.join(ROLES)}")
    content = "" if calls and item.get("content") is None else item["content"]
    if not isinstance(content, str):
        raise RowError(f"messages[{place}]: content must be text, not {type(content).__name__}")
    if calls and (item["role"] != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str)):
        raise RowError(f"messages[{place}]: tool_calls must be a list, in a turn of the assistant")
    return Message(item["role"], content, json.dumps(calls) if calls else "")


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
    return tuple(json.dumps(tool) for tool in raw)


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
