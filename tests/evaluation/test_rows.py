"""Which test rows a look before a run takes."""

from __future__ import annotations

import pytest

from cpift.evaluation.rows import _first
from cpift.rows.examples import Example, Message

_ROWS = [
    Example((Message("user", "Which?"), Message("assistant", reply)), reply, ("a", "b"))
    for reply in ("a", "b", "a" * 9, "b")
]


@pytest.mark.parametrize(
    ("texts", "by_options", "places"),
    [
        (None, True, [0, 1, 2, 3]),
        (5, True, [0, 2]),  # three texts a row: the reply and two options
        (6, True, [0, 1, 2]),
        (9, True, [0, 1, 2, 3]),
        (99, True, [0, 1, 2, 3]),
        (2, True, [2]),
        (1, False, [0, 2]),
    ],
)
def test_a_look_counts_options_as_texts_and_takes_the_longest_row(
    texts: int | None, by_options: bool, places: list[int]
) -> None:
    assert _first(_ROWS, texts, by_options) == places
