"""Final numbers and ROUGE-L against examples worked out by hand and a brute-force reference."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpift.evaluation.text import last_number, longest_common_subsequence, rouge_l, same_final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 142", "142"),
        ("The total is $1,234,567.", "1234567"),
        ("10-3", "3"),
        ("x = -3", "-3"),
        ("x = −3", "-3"),
        ("(-3)", "-3"),
        ("3.50 apples", "3.5"),
        ("it is .25", "0.25"),
        ("so 12.", "12"),
        ("1,2,3", "3"),
        ("1,23", "23"),
        ("room 7b", "7"),
        ("5)-2", "2"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none at all", "-", "...", ",,,"])
def test_text_without_number(text: str) -> None:
    assert last_number(text) is None
    assert not same_final_number(text, "1")


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("1,000", "1000", True),
        ("3.0", "3", True),
        ("first 4, then 5", "5", True),
        ("5, no, 4", "5", False),
        ("-5", "5", False),
        ("0.1", "#### 0.10", True),
        ("12345678901234567890.1", "12345678901234567890.2", False),
    ],
)
def test_same_final_number(text: str, answer: str, same: bool) -> None:
    assert same_final_number(text, answer) is same


@given(st.integers(), st.integers())
def test_integers_are_equal_only_to_themselves(first: int, second: int) -> None:
    assert same_final_number(f"it is {first:,}", f"{second}") is (first == second)


def brute_force_lcs(first: list[str], second: list[str]) -> int:
    def is_subsequence(part: tuple[str, ...]) -> bool:
        remaining = iter(second)
        return all(word in remaining for word in part)

    return max(n for n in range(len(first) + 1) if any(map(is_subsequence, combinations(first, n))))


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    assert longest_common_subsequence(first, second) == brute_force_lcs(first, second)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The cat sat.", "the CAT sat", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("a b", "a x b y", 2 * 2 / (2 + 4)),
        ("b a", "a b", 0.5),
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("日本", "日本", 1.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, score: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(score)
