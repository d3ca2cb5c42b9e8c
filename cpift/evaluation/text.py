"""Scores of generated text that need no model: the final number, and ROUGE-L."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus sign counts only where no word or digit precedes it: in "10-3" the last number is 3, in "= -3" it is −3.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w.)])[-−])?\.\d+")
_WORD = re.compile(r"\w+")


def last_number(text: str) -> Decimal | None:
    """The last number written in `text`: digits, thousands commas, a decimal point; None where there is none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def same_final_number(text: str, answer: str) -> bool:
    """Whether the last number in `text` equals the last one in `answer` as a number ("1,000" = "1000", "3.0" = "3")."""
    said = last_number(text)
    return said is not None and said == last_number(answer)


def words(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, in O(len(first) · len(second)) time and one row of memory."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 (Lin, 2004) in 0..1: the harmonic mean of LCS precision and recall over word tokens."""
    predicted, expected = words(prediction), words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    common = longest_common_subsequence(predicted, expected)
    return 2 * common / (len(predicted) + len(expected))
