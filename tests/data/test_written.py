"""Replies are found between the words of a template as they are found when it is asked for each of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpift.config.inputs import ScratchModel
from cpift.data import written as conversations
from cpift.data.templates import checked_templates
from cpift.data.written import asked, written
from cpift.errors import DataError
from cpift.models.scratch import make_scratch_tokenizer
from cpift.rows.examples import Example, Message

TURN = "{{ '<|start|>' + m.role + '\\n' + %s + '<|end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
UNLESS_TOLD = "{% if messages[-1].content and '/x' not in messages[-1].content %}<t></t>{% endif %}{% endif %}"
THOUGHTFUL = TURN % "('<t></t>' if m.role == 'assistant' else '') + m.content"
TEMPLATES = {
    "plain": TURN % "m.content",
    "trimmed": TURN % "m.content | trim",
    "thought before the last": TURN % "('<t>' if loop.last and m.role == 'assistant' else '') + m.content",
    "thoughts taken out": TURN % "m.content.split('</t>')[-1]",
    "system within a user's turn": "{% if m.role != 'system' %}" + TURN % "m.content" + "{% endif %}",
    "contents twice": TURN % "m.content + m.content",
    "another prompt for later turns": TURN % "('' if loop.first else '<t></t>') + m.content",
    "ends with line breaks": "{{ m.role + ':' + m.content + '\\n\\n' }}",
    "thinks if nothing says not to": THOUGHTFUL,
    "looks for a word": TURN % "('<t>' if 'x' in messages[0].content and m.role == 'assistant' else '') + m.content",
}
CONTENTS = st.lists(st.sampled_from(["a", "x", " ", "\n", "</t>", "<|end|>", "/x"]), max_size=3).map("".join)


def tokenizer_of(template: str) -> Any:
    tokenizer = make_scratch_tokenizer(ScratchModel())
    prompt = PROMPT.replace("{% endif %}", UNLESS_TOLD) if template is THOUGHTFUL else PROMPT
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}" + prompt
    return tokenizer


def outcome(write: Any, example: Example, tokenizer: Any) -> Any:
    try:
        found = write(example, tokenizer)
        return found.text, [found.span(turn) for turn in range(1, len(example.messages), 2)]
    except DataError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(CONTENTS, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0))
def test_replies_lie_where_a_mark_in_place_of_each_shows_them(name: str, contents: list[str]) -> None:
    roles = ("user", "assistant")
    messages = [Message(roles[turn % 2], content) for turn, content in enumerate(contents)]
    example, tokenizer = Example(tuple(messages)), tokenizer_of(TEMPLATES[name])
    with checked_templates():
        assert outcome(written, example, tokenizer) == outcome(asked, example, tokenizer)


def test_a_chat_is_rendered_once_however_many_turns_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, counts = tokenizer_of(TEMPLATES["plain"]), list[int]()
    rendered = conversations.rendered

    def counted(template: str, variables: Any, wanted: Any) -> list[str]:
        counts.append(len(wanted))
        return rendered(template, variables, wanted)

    monkeypatch.setattr(conversations, "rendered", counted)
    with checked_templates():
        for content in "abc":
            written(Example(tuple(Message(role, content) for role in ("user", "assistant") * 9)), tokenizer)
    assert counts in ([1, 10, 1, 1], [1, 1, 1])  # the words are asked once, if no test before had to
