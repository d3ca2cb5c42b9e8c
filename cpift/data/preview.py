"""A task's training data as the model sees it: tokens in the chat template, what is trained on, and how much of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from cpift.config.run import TrainingConfig
from cpift.data.packing import packed_rows
from cpift.data.tokenise import IGNORED, UNCUT, learnable, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cpift.rows.examples import Example

TRAINED, CUT = "bold green", "red strike"


@dataclass(frozen=True)
class Counts:
    """Of one task. Tokens are those within `max_length` of the examples that are kept."""

    examples: int
    left_out: int  # prompt alone fills max_length: nothing to learn
    cut: int  # longer than max_length
    tokens: int
    trained: int
    longest: int
    rows: int  # after packing

    @property
    def fill(self) -> float:
        return self.tokens / (self.rows * self.longest) if self.rows else 0.0


def count(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, training: TrainingConfig) -> Counts:
    """What training will make of the examples; they are looked at one by one."""
    limit = training.max_length
    counts = Counter[str]()
    longest = 0

    def kept() -> Iterator[dict[str, list[int]]]:
        nonlocal longest
        for example in examples:
            uncut = tokenise(example, tokenizer, UNCUT)
            row = {key: values[:limit] for key, values in uncut.items()}
            counts.update(examples=1, cut=len(uncut["input_ids"]) > limit)
            if learnable(row):
                longest = max(longest, len(row["input_ids"]))
                counts.update(kept=1, tokens=len(row["input_ids"]), trained=sum(x != IGNORED for x in row["labels"]))
                yield row

    rows = sum(1 for _ in (packed_rows(kept(), limit) if training.packing else kept()))
    return Counts(
        examples=counts["examples"],
        left_out=counts["examples"] - counts["kept"],
        cut=counts["cut"],
        tokens=counts["tokens"],
        trained=counts["trained"],
        longest=limit if training.packing else longest,
        rows=rows,
    )


def coloured(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, *, marks: bool) -> Text:
    """The conversation's tokens: trained ones green, those cut off red; with `marks` also between ⟦ ⟧ and after ✂."""
    row = tokenise(example, tokenizer, UNCUT)
    text = Text()
    for (trained, cut), ids in _runs(row["input_ids"], row["labels"], max_length):
        words = str(tokenizer.decode(ids))
        style = CUT if cut else TRAINED if trained else "dim"
        before, after = ("✂", "") if cut else ("⟦", "⟧") if trained else ("", "")
        text.append(f"{before}{words}{after}" if marks else words, style=style)
    return text


def _runs(ids: list[int], labels: list[int], max_length: int) -> Iterator[tuple[tuple[bool, bool], list[int]]]:
    """Neighbouring tokens of one kind: (trained on, cut off)."""
    kinds = ((at < max_length and label != IGNORED, at >= max_length) for at, label in enumerate(labels))
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        yield kind, [token for _, token in group]
