"""Conversations as token ids, with labels on what the model must write itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpift.data.written import refused, written
from cpift.errors import DataError, Problem
from cpift.rows.examples import Example

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

UNCUT = 1 << 30  # a `max_length` of no row
IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Labelled:
    """Token ids, and labels of the same length: the id itself where the model is scored on it, −100 elsewhere."""

    ids: list[int]
    labels: list[int]

    def first_label(self) -> int:
        """Index of the first scored token."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORED)

    def last_label(self) -> int:
        """Index of the last scored token."""
        return max(i for i, label in enumerate(self.labels) if label != IGNORED)

    def scored(self) -> int:
        """Number of tokens that are scored. The first token is never: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


def tokenise(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """Token ids of the conversation in the tokenizer's chat template, and labels of equal length.

    Labels are the ids of each assistant turn: its text and the end-of-turn token after it, −100 everywhere else. The
    text is tokenised once as a whole and spans are found in characters, so ids are what inference sees. Both lists are
    cut after `max_length` tokens. A plain text is written without the template: as the tokenizer begins a text, and
    ended by its end-of-sequence token; all of it is learnt.

    Raises:
        DataError: the chat template changes the assistant's text, or writes no special token after it.
    """
    if example.plain:
        ids = _plain(example.reply, tokenizer)[:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    conversation = written(example, tokenizer)
    encoded = tokenizer(conversation.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    special = _special_ids(tokenizer)
    for turn, message in enumerate(example.messages):
        if message.role == "assistant" and message.trained:
            first, last = _token_span(example, ids, offsets, conversation.span(turn), special)
            labels[first : last + 1] = ids[first : last + 1]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = int(tokenizer.eos_token_id)
    return ids if ids and ids[-1] == end else [*ids, end]


def count_tokens(dataset: Dataset) -> Iterator[int]:
    """The length of each row, in order; rows are read a thousand at a time."""
    for batch in dataset.select_columns("input_ids").iter(1000):
        yield from map(len, batch["input_ids"])


def learnable(row: Mapping[str, Sequence[int]]) -> bool:
    """Whether any label is left. The first never counts: a causal model has nothing to predict it from."""
    return any(label != IGNORED for label in row["labels"][1:])


def padded_length(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of the longest row, rounded up to a multiple of 8."""
    return -(-max(len(row["input_ids"]) for row in rows) // 8) * 8


class CompletionCollator:
    """Pads a batch on the right to its longest row, rounded up to a multiple of 8 tokens, or to `length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int | None = None):
        self._length = length
        if tokenizer.pad_token_id is None:
            raise DataError("tokenizer", [Problem("pad_token", "is not set", "load it with models.load_tokenizer")])
        self.pad_token_id = int(tokenizer.pad_token_id)

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 of shape (rows, padded length).

        Of packed rows (see `packing.py`) `position_ids` instead of `attention_mask`; each token of padding has position
        0, so that it is an example of its own.
        """
        import torch

        shape = (len(features), self._length or padded_length(features))
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


def _token_span(
    example: Example,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    span: tuple[int, int],
    special: frozenset[int],
) -> tuple[int, int]:
    """First token of the span, and the end-of-turn token: the first special token at or after the span's end."""
    start, end = span
    first = next((place for place, (_, stop) in enumerate(offsets) if stop > start), len(ids))
    after = (place for place in range(first, len(ids)) if offsets[place][0] >= end and ids[place] in special)
    last = next(after, None)
    if last is None:
        what = "it writes no special token after the assistant's text, so a model could not learn to stop"
        raise refused(example, what, "end assistant turns with eos_token")
    return first, last


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    if not tokenizer.is_fast:
        what = f"{type(tokenizer).__name__} cannot tell where its tokens lie in the text"
        raise DataError("tokenizer", [Problem("tokenizer", what, "use the model's fast tokenizer (tokenizer.json)")])
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))
