"""Procedural tasks: deterministic, distinct, right, and never in both splits."""

from __future__ import annotations

import pytest

from cpift.errors import DataError
from cpift.rows.examples import parse_row
from cpift.rows.synthetic import GENERATORS, generate


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_are_examples_and_the_same_every_time(name: str) -> None:
    rows = generate(name, 40, seed=3)
    assert rows == generate(name, 40, seed=3)
    assert rows != generate(name, 40, seed=4)
    assert len({row["prompt"] for row in rows}) == 40
    for row in rows:
        example = parse_row(row, {})
        assert not example.choices or example.answer in example.choices


@pytest.mark.parametrize("name", GENERATORS)
def test_splits_share_no_prompt_whatever_their_seeds(name: str) -> None:
    train = {row["prompt"] for seed in range(4) for row in generate(name, 60, seed)}
    test = {row["prompt"] for seed in range(4) for row in generate(name, 24, seed, "test")}
    assert not train & test


def test_a_larger_size_only_adds_rows() -> None:
    assert generate("addition", 50, seed=0)[:20] == generate("addition", 20, seed=0)


def test_completions_are_right() -> None:
    for row in generate("addition", 50, seed=0):
        first, second = row["prompt"].rstrip("=").split("+")
        assert int(first) + int(second) == int(row["answer"]) == int(row["completion"])
    for row in generate("subtraction", 50, seed=0):
        first, second = row["prompt"].rstrip("=").split("-")
        assert int(first) - int(second) == int(row["answer"]) >= 0
    for row in generate("reverse", 20, seed=0):
        assert "reverse " + row["completion"][::-1] == row["prompt"]
    for row in generate("order", 20, seed=0):
        assert row["completion"] == "".join(sorted(row["prompt"].removeprefix("sort ")))
    for row in generate("parity", 20, seed=0):
        assert row["answer"] == ("odd" if int(row["prompt"].rstrip("?")) % 2 else "even")
    for row in generate("ending", 20, seed=0):
        kind = {"a": "noun", "o": "noun", "e": "verb", "u": "verb", "i": "name"}
        assert row["answer"] == kind[row["prompt"][-1]]


@pytest.mark.parametrize(
    ("name", "size", "split", "message"),
    [
        ("multiplication", 5, "train", "known: addition"),
        ("addition", 5, "validation", "use train or test"),
        ("addition", 2500, "train", "different prompts found"),
    ],
)
def test_what_cannot_be_generated_is_an_error(name: str, size: int, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(name, size, seed=0, split=split)
