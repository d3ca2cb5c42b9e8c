"""Conversations as token ids, with labels on what the model must write itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.errors import DataError, Problem
from cpift.examples import Example, Message
from cpift.rows_on_disk import rows_on_disk

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
IGNORED = -100  # the label that cross entropy leaves out
_MARK = "\ue000reply\ue001"  # private-use characters, so that no template treats them specially


def tokenise(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """Token ids of the conversation in the tokenizer's chat template, and labels of equal length.

    Labels are the ids of each assistant turn: its text and the end-of-turn token after it, −100 everywhere else. The
    text is tokenised once as a whole and spans are found in characters, so ids are what inference sees. Both lists are
    cut after `max_length` tokens.

    Raises:
        DataError: the chat template changes the assistant's text, or writes no special token after it.
    """
    text = render(example.messages, tokenizer, tools=example.tools)
    _require_shown(example, text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    special = _special_ids(tokenizer)
    for turn, message in enumerate(example.messages):
        if message.role == "assistant":
            span = _call_span if message.tool_calls else _reply_span
            first, last = _token_span(ids, offsets, span(example, turn, text, tokenizer), special)
            labels[first : last + 1] = ids[first : last + 1]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def tokenised_dataset(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, file: Path | None = None
) -> Dataset:
    """A map-style data set with columns `input_ids` and `labels`, in the examples' order.

    `file`: where its rows are kept, 8 bytes a token, so that neither they nor the examples are ever all in memory.
    Examples whose prompt alone fills `max_length` have nothing to learn from; they are left out and counted in the log.

    Raises:
        DataError: no example is left.
    """
    from datasets import Dataset

    total = left_out = 0

    def rows() -> Iterator[dict[str, list[int]]]:
        nonlocal total, left_out
        for example in examples:
            row = tokenise(example, tokenizer, max_length)
            total += 1
            if learnable(row):
                yield row
            else:
                left_out += 1

    found = rows_on_disk(rows(), file) if file else Dataset.from_list(list(rows()))
    if not total - left_out:
        remedy = "raise max_length"
        raise DataError("training data", [Problem("max_length", f"no reply begins within {max_length} tokens", remedy)])
    if left_out:
        _log.warning("%d of %d examples left out: prompt ≥ %d tokens", left_out, total, max_length)
    return found


def count_tokens(dataset: Dataset) -> Iterator[int]:
    """The length of each row, in order; rows are read a thousand at a time."""
    for batch in dataset.select_columns("input_ids").iter(1000):
        yield from map(len, batch["input_ids"])


def learnable(row: Mapping[str, Sequence[int]]) -> bool:
    """Whether any label is left. The first never counts: a causal model has nothing to predict it from."""
    return any(label != IGNORED for label in row["labels"][1:])


class CompletionCollator:
    """Pads a batch on the right to its longest row, rounded up to a multiple of 8 tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.pad_token_id is None:
            raise DataError("tokenizer", [Problem("pad_token", "is not set", "load it with models.load_tokenizer")])
        self.pad_token_id = int(tokenizer.pad_token_id)

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 of shape (rows, padded length).

        Of packed rows (see `packing.py`) `position_ids` instead of `attention_mask`; each token of padding has position
        0, so that it is an example of its own.
        """
        import torch

        longest = max(len(row["input_ids"]) for row in features)
        shape = (len(features), -(-longest // 8) * 8)
        input_ids = torch.full(shape, self.pad_token_id)
        extra = "position_ids" if "position_ids" in features[0] else "attention_mask"
        beside = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for place, row in enumerate(features):
            length = len(row["input_ids"])
            input_ids[place, :length] = torch.tensor(row["input_ids"])
            beside[place, :length] = torch.tensor(row[extra]) if extra == "position_ids" else 1
            labels[place, :length] = torch.tensor(row["labels"])
        return {"input_ids": input_ids, extra: beside, "labels": labels}


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[str] = (),
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text in the tokenizer's chat template."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        calls = {"tool_calls": json.loads(message.tool_calls)} if message.tool_calls else {}
        turns.append({"role": message.role, "content": message.content} | calls)
    schemas = [json.loads(tool) for tool in tools] or None
    text = tokenizer.apply_chat_template(
        turns, tools=schemas, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def _require_shown(example: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if the template leaves tools or tool calls out: the model would learn to call the unseen."""
    without = [replace(message, tool_calls="") for message in example.messages]
    for what, shown in (
        ("tools", not example.tools or render(example.messages, tokenizer) != text),
        ("tool calls", without == list(example.messages) or render(without, tokenizer, tools=example.tools) != text),
    ):
        if not shown:
            problem = Problem(
                "chat_template", f"it does not write {what}", "use the template of a model trained on them"
            )
            raise DataError("chat template", [problem])


def _reply_span(example: Example, turn: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """First and one-past-last character of what the model writes in an assistant turn, up to the end of its content.

    The content is located by rendering a mark in its place. A template may write something between the generation
    prompt and the content (an empty thought, say): the model has to write that too.
    """
    messages, tools = example.messages, example.tools
    marked_turns = [*messages[:turn], replace(messages[turn], content=_MARK), *messages[turn + 1 :]]
    before, found, after = render(marked_turns, tokenizer, tools=tools).partition(_MARK)
    end = len(text) - len(after)
    content = text[len(before) : end]
    unchanged = found and text[: len(before)] == before and text[end:] == after
    if not unchanged or content.strip() != messages[turn].content.strip():
        what = f"the assistant's text of message {turn} does not appear in it as it is"
        raise DataError("chat template", [Problem("chat_template", what, "use one that keeps contents unchanged")])
    prompt = render(messages[:turn], tokenizer, tools=tools, add_generation_prompt=True)
    return (len(prompt) if before.startswith(prompt) else len(before)), end


def _call_span(example: Example, turn: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """`_reply_span` of a turn that calls tools: all that the template writes of it after the generation prompt."""
    prompt, through = (
        render(example.messages[:count], tokenizer, tools=example.tools, add_generation_prompt=count == turn)
        for count in (turn, turn + 1)
    )
    if not through.startswith(prompt) or not text.startswith(through):
        what = f"the tool calls of message {turn} are written otherwise when more turns follow"
        raise DataError(
            "chat template", [Problem("chat_template", what, "use one whose turns do not depend on later ones")]
        )
    ends = [through.rfind(token, len(prompt)) for token in tokenizer.all_special_tokens]
    return len(prompt), max(*ends, len(prompt))


def _token_span(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], span: tuple[int, int], special: frozenset[int]
) -> tuple[int, int]:
    """First token of the span, and the end-of-turn token: the first special token at or after the span's end."""
    start, end = span
    first = next((place for place, (_, stop) in enumerate(offsets) if stop > start), len(ids))
    after = (place for place in range(first, len(ids)) if offsets[place][0] >= end and ids[place] in special)
    last = next(after, None)
    if last is None:
        what = "it writes no special token after the assistant's text, so a model could not learn to stop"
        raise DataError("chat template", [Problem("chat_template", what, "end assistant turns with eos_token")])
    return first, last


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    if not tokenizer.is_fast:
        what = f"{type(tokenizer).__name__} cannot tell where its tokens lie in the text"
        raise DataError("tokenizer", [Problem("tokenizer", what, "use the model's fast tokenizer (tokenizer.json)")])
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))
