"""One turn of a conversation: which fields it may have, and what each becomes. Null means that a field is absent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpift.untrusted.json import ROW, UnreadableError, parse_json, require_limits

ROLES = ("system", "user", "assistant", "tool")
# What others call the same roles: OpenAI's newer models, ShareGPT and what grew from it.
ALIASES = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
_CALLED = "function_call"  # ShareGPT's role of a turn whose text is the call of a tool
# Whether a turn of the assistant is trained on, as OpenAI, axolotl, ms-swift and others call it: true, false, 1 or 0.
TRAIN_FLAGS = ("weight", "train", "training", "trainable", "loss")
# What ties a tool's answer to its call: checked here, so that a template may leave it out.
LINKS = ("tool_call_id", "name")
_CALL, _FUNCTION = ("id", "type", "function", "name", "arguments"), ("name", "arguments")


class RowError(ValueError):
    """A row that is no example; the message says why, and `remedy` what to do if that is known."""

    def __init__(self, what: str, remedy: str = ""):
        self.remedy = remedy
        super().__init__(what)


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` and `fields` are JSON, empty where there are none.

    tool_calls: the calls that an assistant's turn makes, their arguments as values. fields: every other field of the
    turn, for the chat template. trained: whether an assistant's turn is learnt.
    """

    role: str
    content: str
    tool_calls: str = ""
    fields: str = ""
    trained: bool = True

    @property
    def turn(self) -> dict[str, Any]:
        """As chat templates take it."""
        calls = {"tool_calls": json.loads(self.tool_calls)} if self.tool_calls else {}
        return {"role": self.role, "content": self.content, **calls, **self.other}

    @property
    def other(self) -> dict[str, Any]:
        """`fields` as values."""
        return dict(json.loads(self.fields)) if self.fields else {}


def parse_turn(item: Any, place: int) -> Message:
    """The turn `messages[place]`, with role and content or ShareGPT's from and value. Raises RowError naming it."""
    where = f"messages[{place}]"
    known = {str(name): value for name, value in item.items() if value is not None} if _is_mapping(item) else {}
    if "role" not in known and {"from", "value"} <= set(known):
        known = _of_sharegpt(known, where)
    calls = known.pop("tool_calls", None)
    if "role" not in known or not ("content" in known or calls):
        raise RowError(f"{where} has no role and content" + _instead(known))
    role, content = known.pop("role"), known.pop("content", "")
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowError(f"{where} has role {role!r}; known: {', '.join((*ROLES, *ALIASES))}")
    trained = _trained(known, role, where)
    return Message(role, _content(content, where), _calls(calls, role, where), _json(known, where), trained)


def _of_sharegpt(known: dict[str, Any], where: str) -> dict[str, Any]:
    """`from` and `value` as role and content; what calls a tool as its call."""
    role, value = known.pop("from"), known.pop("value")
    if role != _CALLED:
        return {"role": role, "content": value, **known}
    try:
        call = parse_json(value, ROW) if isinstance(value, str) else value
    except UnreadableError as error:
        raise RowError(f"{where}: a {_CALLED} {error}") from None
    return {"role": "assistant", "tool_calls": call if isinstance(call, list) else [call], **known}


def check_links(messages: Sequence[Message]) -> None:
    """Raise RowError where a tool's answer names a call or a function that the turns before it do not make.

    Templates may leave both names out and tell answers by their order: where they do, that is the order of the calls.
    """
    open_calls: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        if message.role != "tool":
            open_calls = json.loads(message.tool_calls) if message.tool_calls else []
            continue
        named = {key: value for key in LINKS if (value := message.other.get(key)) is not None}
        wanted = open_calls.pop(0) if open_calls else None
        if named and wanted is None:
            raise RowError(f"messages[{place}] answers a call of a tool that the turn before does not make")
        for key, value in named.items():
            expected = (wanted or {}).get("id") if key == "tool_call_id" else function_of(wanted or {}).get("name")
            if expected is not None and value != expected:
                raise RowError(f"messages[{place}]: {key} is {value!r}; in the order of calls it is {expected!r}")


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name and arguments of a call, with or without OpenAI's `function` around them."""
    inner = call.get("function", call)
    return inner if isinstance(inner, Mapping) else {}


def _is_mapping(item: Any) -> bool:
    return isinstance(item, Mapping)


def _instead(known: Mapping[str, Any]) -> str:
    return f"; it has {', '.join(sorted(known))}" if known else ""


def _content(content: Any, where: str) -> str:
    """Text, or parts of type text, which are joined as transformers' own templates join them: with nothing between."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise RowError(f"{where}: content must be text, not {type(content).__name__}")
    return "".join(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
        kind = repr(fields.get("type")) if fields else type(part).__name__
        raise RowError(f"{where}: only parts of type 'text' with their text are trained on, not {kind}")
    if more := sorted(set(fields) - {"type", "text"}):
        raise RowError(f"{where}: field {more[0]!r} has no meaning here; take it out")
    return str(fields["text"])


def _trained(known: dict[str, Any], role: str, where: str) -> bool:
    """Takes the flags out of the turn's fields; of several all must agree."""
    flags = {name: known.pop(name) for name in TRAIN_FLAGS if name in known}
    for name, value in flags.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(f"{where}: {name} is {value!r}; 1 or true trains a turn, 0 or false does not")
        if value and role != "assistant":
            raise RowError(f"{where}: {name} is {value!r}, but only turns of the assistant are trained on")
    if len(set(map(bool, flags.values()))) > 1:
        raise RowError(f"{where}: {' and '.join(flags)} disagree")
    return all(flags.values())


def _calls(calls: Any, role: str, where: str) -> str:
    if not calls:
        return ""
    if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise RowError(f"{where}: tool_calls must be a list, in a turn of the assistant")
    return _json([_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)], where)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call whose arguments, which OpenAI writes as JSON text, are an object: templates write them themselves."""
    outer = _known(call, _CALL, where)
    if "function" in outer:
        if extra := sorted({"name", "arguments"} & set(outer)):
            raise RowError(f"{where}: {extra[0]} stands beside `function`; put it into it")
        return outer | {"function": _function(outer["function"], f"{where}.function")}
    return outer | _function({key: value for key, value in outer.items() if key in _FUNCTION}, where)


def _function(raw: Any, where: str) -> dict[str, Any]:
    function = _known(raw, _FUNCTION, where)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where} has no name")
    return function | {"arguments": _arguments(function.get("arguments"), where)}


def _known(raw: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise RowError(f"{where} must be an object, not {type(raw).__name__}")
    fields = {str(key): value for key, value in raw.items() if value is not None}
    if unknown := sorted(set(fields) - set(names)):
        raise RowError(f"{where}: field {unknown[0]!r} has no meaning here; known: {', '.join(names)}")
    return fields


def _arguments(raw: Any, where: str) -> dict[str, Any]:
    try:
        value = parse_json(raw, ROW) if isinstance(raw, str) else raw
    except UnreadableError as error:
        raise RowError(f"{where}.arguments {error}: {raw[:60]!r}") from None
    if not isinstance(value, Mapping):
        raise RowError(f"{where}.arguments must be an object or its JSON text; {{}} where there are none")
    return dict(value)


def _json(value: Any, where: str) -> str:
    """JSON of fields; empty for none."""
    if not value:
        return ""
    try:
        require_limits(value, ROW)
        return json.dumps(value)
    except UnreadableError as error:
        raise RowError(f"{where} {error}") from None
    except (TypeError, ValueError) as error:
        raise RowError(f"{where} holds what JSON cannot: {error}") from None
