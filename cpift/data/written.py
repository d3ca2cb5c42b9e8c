"""A conversation in a tokenizer's chat template, and where in the text each reply lies.

Most templates write a turn's content as it is between words that depend on the roles alone. For each sequence of roles
these words are asked once, with marks for contents (`_Frame`); a row's text is then rendered once, and its contents are
found between them. Where they are not (a template that drops thoughts, a row with tools or further fields), or where a
content has what the template may look for in it, the template is asked for every reply again (`asked`): as often as
there are replies, each time for the whole conversation.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from cpift.data.templates import TemplateError, rendered
from cpift.errors import DataError, Problem
from cpift.rows.examples import Example, Message
from cpift.rows.turns import LINKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WRITES = dict.fromkeys(("tools", "tool calls"), "use the template of a model trained on them")
_THOUGHTS = ("</think>", "<think>", "</thought>", "<thought>", "</seed:think>", "[/THINK]")  # written into a content
_MARK = "\ue000reply{}\ue001"  # private-use characters, so that no template treats them specially
_FRAMES = 1024  # sequences of roles that are remembered

Span = tuple[int, int]


class Written(Protocol):
    @property
    def text(self) -> str:
        """The whole conversation."""

    def span(self, turn: int) -> Span:
        """First and one-past-last character of what the model writes in an assistant's turn, up to the end of its
        content or of its tool calls. Raises DataError, naming the row, where that cannot be told."""


def written(example: Example, tokenizer: PreTrainedTokenizerBase) -> Written:
    """The conversation in the tokenizer's chat template.

    Raises, naming the row:
        DataError: the template fails, or leaves something out that the model would then be expected to know.
    """
    if example.tools or any(message.tool_calls or message.fields for message in example.messages):
        return asked(example, tokenizer)
    (text,) = _rendered(example, tokenizer, [_conversation(example.messages, ())])
    template, variables = tokenizer.get_chat_template(), json.dumps(tokenizer.special_tokens_map)
    contents = [message.content for message in example.messages]
    if any(not content or any(word in content for word in _looked_for(template)) for content in contents):
        return asked(example, tokenizer)
    frame = _frame(template, variables, tuple(message.role for message in example.messages))
    spans = frame.spans(text, contents) if frame else None
    return asked(example, tokenizer) if spans is None else _Framed(text, spans)


def asked(example: Example, tokenizer: PreTrainedTokenizerBase) -> Written:
    """As `written`, of any row."""
    return _Asked(example, tokenizer)


def refused(example: Example, what: str, remedy: str) -> DataError:
    """What is wrong with a template, told at the row that showed it."""
    return DataError("chat template", [Problem(example.place or "chat template", f"chat template: {what}", remedy)])


# ---- contents between the words that a sequence of roles has in common -----------------------------------------------


@dataclass(frozen=True)
class _Framed:
    text: str
    spans: Sequence[Span]

    def span(self, turn: int) -> Span:
        return self.spans[turn]


@dataclass(frozen=True)
class _Frame:
    """`between`: what is written before, between and after contents. `own`: how many characters of what is before each
    content the model writes itself, for they come after the generation prompt (an empty thought, say)."""

    between: Sequence[str]
    own: Sequence[int]

    def spans(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """Where these contents lie, each with what is its own; None where the text is not made so, or could be in
        several ways. A template may strip a content."""
        spans = []
        end = len(self.between[0])
        fits = text.startswith(self.between[0])
        for content, own, after in zip(contents, self.own, self.between[1:], strict=True):
            ways = dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip()))
            found = [way for way in ways if text.startswith(way + after, end)]
            if not fits or len(found) != 1:
                return None
            spans.append((end - own, end + len(found[0])))
            end += len(found[0]) + len(after)
        return spans if end == len(text) else None


@lru_cache(maxsize=8)
def _looked_for(template: str) -> frozenset[str]:
    """What the template could find in a content, and write a generation prompt by (`/no_think`): its quoted texts, but
    for signs alone, which are everywhere, and for single words, which are roles and fields."""
    from jinja2 import Environment

    quoted = (token.value for token in Environment().lexer.tokenize(template) if token.type == "string")
    return frozenset(text for text in quoted if re.search("[^\\W_]", text) and not text.strip().isidentifier())


@lru_cache(maxsize=_FRAMES)
def _frame(template: str, variables: str, roles: Sequence[str]) -> _Frame | None:
    """None for a template that does not write every content once, in the order of the turns."""
    messages = [Message(role, _MARK.format(turn)) for turn, role in enumerate(roles)]
    replies = [turn for turn, role in enumerate(roles) if role == "assistant"]
    wanted = [_conversation(messages, ()), *(_conversation(messages[:turn], (), prompt=True) for turn in replies)]
    try:
        text, *prompts = rendered(template, json.loads(variables), wanted)
    except TemplateError:
        return None
    between, rest = [], text
    for message in messages:
        before, there, rest = rest.partition(message.content)
        if not there or text.count(message.content) > 1:
            return None
        between.append(before)
    own = [0] * len(roles)
    for turn, prompt in zip(replies, prompts, strict=True):
        before = text[: text.index(messages[turn].content)]
        own[turn] = len(before) - len(prompt) if before.startswith(prompt) else 0
        if own[turn] > len(between[turn]):
            return None
    return _Frame((*between, rest), tuple(own))


# ---- every reply asked for -------------------------------------------------------------------------------------------


class _Asked:
    """All that is asked of the template for one row, in one go."""

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerBase):
        self._example, self._ends, self._mark = example, tokenizer.all_special_tokens, _absent_mark(example)
        asked = {"text": _conversation(example.messages, example.tools)}
        asked |= {what: _conversation(*left) for what, left in _left_out(example).items()}
        for turn, message in enumerate(example.messages):
            if message.role == "assistant" and message.trained:
                asked |= _of_reply(example, turn, self._mark)
        self._texts = dict(zip(asked, _rendered(example, tokenizer, list(asked.values())), strict=True))
        self.text = self._texts["text"]
        for what in _left_out(example):
            if self._texts[what] == self.text:
                raise refused(example, f"it does not write {what}", _WRITES.get(what, "take it out of the rows"))

    def span(self, turn: int) -> Span:
        return (self._call_span if self._example.messages[turn].tool_calls else self._reply_span)(turn)

    def _reply_span(self, turn: int) -> Span:
        """The content is located by rendering a mark in its place. What the template writes between the generation
        prompt and the content (an empty thought, say) the model has to write too.
        """
        content = self._example.messages[turn].content
        before, mark_there, after = self._texts[f"marked {turn}"].partition(self._mark)
        end = len(self.text) - len(after)
        unchanged = mark_there and self.text[: len(before)] == before and self.text[end:] == after
        if not unchanged or self.text[len(before) : end].strip() != content.strip():
            thought = next((mark for mark in _THOUGHTS if mark in content), None)
            what = f"the assistant's text of message {turn} does not appear in it as it is"
            if thought:
                remedy = f"give the thought as the turn's `reasoning_content`, and the content without {thought}"
                raise refused(self._example, f"{what}, for it takes the {thought} part for a thought", remedy)
            raise refused(self._example, what, "use one that keeps contents unchanged")
        prompt = self._texts[f"prompt {turn}"]
        return (len(prompt) if before.startswith(prompt) else len(before)), end

    def _call_span(self, turn: int) -> Span:
        """All that the template writes of the turn after the generation prompt."""
        prompt, through = self._texts[f"prompt {turn}"], self._texts[f"through {turn}"]
        if not through.startswith(prompt) or not self.text.startswith(through):
            what = f"the tool calls of message {turn} are written otherwise when more turns follow"
            raise refused(self._example, what, "use one whose turns do not depend on later ones")
        ends = [through.rfind(token, len(prompt)) for token in self._ends]
        return len(prompt), max(*ends, len(prompt))


def _rendered(
    example: Example, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Mapping[str, Any]]
) -> list[str]:
    try:
        template = tokenizer.get_chat_template(None, conversations[0]["tools"])
        return rendered(template, tokenizer.special_tokens_map, conversations)
    except ValueError as error:  # a TemplateError, or a tokenizer with several templates and no default
        raise refused(example, f"it {error}", "change the row, or use another template") from None


def _conversation(messages: Sequence[Message], tools: Sequence[str], *, prompt: bool = False) -> dict[str, Any]:
    return {
        "messages": [message.turn for message in messages],
        "tools": [json.loads(tool) for tool in tools] or None,
        "add_generation_prompt": prompt,
    }


def _absent_mark(example: Example) -> str:
    """A text that no message of the example holds."""
    marks = (_MARK.format(number or "") for number in itertools.count())
    return next(mark for mark in marks if not any(mark in message.content for message in example.messages))


def _of_reply(example: Example, turn: int, mark: str) -> dict[str, dict[str, Any]]:
    """What shows where an assistant's turn begins and ends."""
    messages, tools = example.messages, example.tools
    asked = {f"prompt {turn}": _conversation(messages[:turn], tools, prompt=True)}
    if messages[turn].tool_calls:
        return asked | {f"through {turn}": _conversation(messages[: turn + 1], tools)}
    marked = [*messages[:turn], replace(messages[turn], content=mark), *messages[turn + 1 :]]
    return asked | {f"marked {turn}": _conversation(marked, tools)}


def _left_out(example: Example) -> dict[str, tuple[Sequence[Message], Sequence[str]]]:
    """The example without each thing that a template may not know; its text must then be another.

    A tool's answer is told by its place among the answers too (`turns.check_links`): its names may be left out.
    """
    messages, tools = example.messages, example.tools
    asked: dict[str, tuple[Sequence[Message], Sequence[str]]] = {"tools": (messages, ())} if tools else {}
    if any(message.tool_calls for message in messages):
        asked["tool calls"] = [replace(message, tool_calls="") for message in messages], tools
    names = {name for message in messages if message.fields for name in message.other if not _linked(message, name)}
    for name in sorted(names):
        asked[f"`{name}`"] = [_without(message, name) for message in messages], tools
    return asked


def _linked(message: Message, name: str) -> bool:
    return message.role == "tool" and name in LINKS


def _without(message: Message, name: str) -> Message:
    fields = {key: value for key, value in message.other.items() if key != name or _linked(message, name)}
    return replace(message, fields=json.dumps(fields) if fields else "")
