"""What of a row a chat template may take otherwise than another's: `plan` writes a row of each shape that there is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cpift.rows.examples import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 256  # shapes of a task that are written
_LITERALS = re.compile(r"'([^'\n]{3,80})'|\"([^\"\n]{3,80})\"")


class Shapes:
    """The shapes of the rows seen so far.

    Two neighbours in a row: their roles, fields, whether they call tools, are trained, are empty; and the texts within
    that the template itself names, such as </think>, for it may look for them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        template: Any = tokenizer.chat_template
        written = " ".join(template.values()) if isinstance(template, dict) else str(template or "")
        literals = {one or two for one, two in _LITERALS.findall(written)}
        marks = {part for text in literals for part in text.split("\\n") if not part.replace(" ", "").isalnum()}
        self._marks = sorted(mark for mark in marks if len(mark) >= 3)
        self._seen: set[Any] = set()

    def add(self, example: Example) -> bool:
        """Whether a row has a shape that none before it had."""
        turns = [self._of(message) for message in example.messages]
        shape = bool(example.tools), frozenset(zip([None, *turns], [*turns, None], strict=True))
        new = shape not in self._seen and len(self._seen) < MOST
        if new:
            self._seen.add(shape)
        return new

    def _of(self, message: Message) -> tuple[Any, ...]:
        fields = tuple(sorted(message.other)) if message.fields else ()
        named = tuple(mark for mark in self._marks if mark in message.content)
        return message.role, message.trained, bool(message.tool_calls), not message.content.strip(), fields, named


def size_of(example: Example) -> int:
    """Characters of a row."""
    return sum(len(message.content) + len(message.fields) + len(message.tool_calls) for message in example.messages)
