"""Several examples in one row, so that little of a batch is padding, and no example sees another.

A row's `position_ids` start again at 0 with each example. transformers' models build a block-diagonal causal mask from
that where they are given no attention mask and no cache, with every attention implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_OPEN = 64  # rows that still take examples; more would fill rows better and mix near and far examples more
_IGNORED = -100


def packed_rows(examples: Iterable[dict[str, Any]], max_length: int) -> Iterator[dict[str, list[int]]]:
    """Rows of at most `max_length` tokens with columns `input_ids`, `labels` and `position_ids`, each once it is full.

    Every example (with `input_ids` and `labels`) is in one row, whole: the first of the open rows that has room for it.
    The first token of an example is nobody's label, for the token before it is another example's.
    """
    open_rows: list[dict[str, list[int]]] = []
    for example in examples:
        length = len(example["input_ids"])
        row = next((row for row in open_rows if len(row["input_ids"]) + length <= max_length), None)
        if row is None:
            row = new_row()
            open_rows.append(row)
            if len(open_rows) > _OPEN:
                fullest = max(range(_OPEN), key=lambda at: len(open_rows[at]["input_ids"]))
                yield open_rows.pop(fullest)
        append(row, example)
    yield from open_rows


def new_row() -> dict[str, list[int]]:
    """A row without an example."""
    return {"input_ids": [], "labels": [], "position_ids": []}


def append(row: dict[str, list[int]], example: Mapping[str, list[int]]) -> None:
    """Put an example, or a row of several, behind those of a row. Its first token is nobody's label, for the token
    before it is another's."""
    row["input_ids"] += example["input_ids"]
    row["labels"] += [_IGNORED, *example["labels"][1:]]
    row["position_ids"] += example.get("position_ids", range(len(example["input_ids"])))
