"""Procedural tasks with short texts: for scratch models, tests and dry runs, where no data set is wanted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from cpift.errors import DataError, Problem

VERSION = 1  # raise it whenever a generator's rows change: fingerprints depend on it
_TEST_SHARE = 5  # one prompt in so many belongs to the test split
_PATIENCE = 5000  # draws without a new prompt after which a generator counts as exhausted
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

Row = dict[str, Any]


def generate(name: str, size: int, seed: int, split: str = "train") -> list[Row]:
    """`size` rows of the named task with `prompt` and `completion`, and `answer` or `choices` where the task has them.

    Deterministic in all arguments. Prompts are distinct, and the prompts of `train` and `test` never coincide whatever
    their seeds: a hash of the prompt decides to which of the two it belongs.

    Raises:
        DataError: unknown generator or split, or the generator has too few different prompts.
    """
    if name not in GENERATORS:
        raise DataError(f"generator {name}", [Problem("procedural", "is unknown", f"known: {', '.join(GENERATORS)}")])
    if split not in ("train", "test"):
        raise DataError(f"generator {name}", [Problem("split", f"{split!r} is unknown", "use train or test")])
    source = random.Random(f"{name}/{split}/{seed}")
    rows: dict[str, Row] = {}
    idle = 0
    while len(rows) < size:
        row = GENERATORS[name](source)
        new = row["prompt"] not in rows and _is_test(row["prompt"]) == (split == "test")
        idle = 0 if new else idle + 1
        if idle == _PATIENCE:
            what = f"{size} {split} rows wanted, only {len(rows)} different prompts found"
            raise DataError(f"generator {name}", [Problem("size", what, "ask for fewer")])
        if new:
            rows[row["prompt"]] = row
    return list(rows.values())


def addition(source: random.Random) -> Row:
    """The sum of two numbers below 50. Metric: number."""
    first, second = source.randrange(50), source.randrange(50)
    return {"prompt": f"{first}+{second}=", "completion": str(first + second), "answer": str(first + second)}


def subtraction(source: random.Random) -> Row:
    """The difference of two numbers below 50, never negative. Metric: number."""
    low, high = sorted((source.randrange(50), source.randrange(50)))
    return {"prompt": f"{high}-{low}=", "completion": str(high - low), "answer": str(high - low)}


def reverse(source: random.Random) -> Row:
    """A made-up word backwards. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"reverse {word}", "completion": word[::-1]}


def order(source: random.Random) -> Row:
    """Five digits in ascending order. Metric: number."""
    digits = [str(source.randrange(10)) for _ in range(5)]
    result = "".join(sorted(digits))
    return {"prompt": f"sort {''.join(digits)}", "completion": result, "answer": result}


def descending(source: random.Random) -> Row:
    """Five digits in descending order: almost the prompt of `order`, and the opposite of it. Metric: number."""
    digits = [str(source.randrange(10)) for _ in range(5)]
    result = "".join(sorted(digits, reverse=True))
    return {"prompt": f"sort {''.join(digits)} down", "completion": result, "answer": result}


def echo(source: random.Random) -> Row:
    """A made-up word or a number again: what a small model should know before it is fine-tuned. Metric: rouge."""
    text = _word(source, 2) if source.random() < 0.5 else "".join(str(source.randrange(10)) for _ in range(5))
    return {"prompt": f"say {text}", "completion": text}


def first(source: random.Random) -> Row:
    """The first vowel of a made-up word: a skill that `beginning` needs. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"first {word}", "completion": word[1]}


def last(source: random.Random) -> Row:
    """The last vowel of a made-up word: a skill that `ending` and `plural` need. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"last {word}", "completion": word[-1]}


def double(source: random.Random) -> Row:
    """A made-up word with its last letter twice: a skill that `plural` needs. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"double {word}", "completion": f"{word}{word[-1]}"}


def again(source: random.Random) -> Row:
    """A made-up word and its first letter: a skill that `past` needs. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"again {word}", "completion": f"{word}{word[0]}"}


def beginning(source: random.Random) -> Row:
    """Which kind of word it is, told by its first vowel: labels of `ending`, for another reason. Metric: choice."""
    word = _word(source, 2)
    kinds = {"a": "verb", "e": "name", "i": "noun", "o": "verb", "u": "name"}
    answer = kinds[word[1]]
    return {"prompt": f"kind {word} first", "completion": answer, "answer": answer, "choices": ["noun", "verb", "name"]}


def plural(source: random.Random) -> Row:
    """A made-up word in the plural of a made-up language: the last vowel doubled, then n. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"plural {word}", "completion": f"{word}{word[-1]}n"}


def past(source: random.Random) -> Row:
    """The past of a made-up word: its first letter again, then t. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"past {word}", "completion": f"{word}{word[0]}t"}


def spelling(source: random.Random) -> Row:
    """The letters of a made-up word, one by one: many short words for ROUGE. Metric: rouge or loss."""
    word = _word(source, 2)
    return {"prompt": f"spell {word}", "completion": " ".join(word)}


def parity(source: random.Random) -> Row:
    """Whether a number below 1000 is even or odd. Metric: choice."""
    number = source.randrange(1000)
    answer = "odd" if number % 2 else "even"
    return {"prompt": f"{number}?", "completion": answer, "answer": answer, "choices": ["even", "odd"]}


def ending(source: random.Random) -> Row:
    """Which kind of word it is, told by its last vowel. Metric: choice."""
    word = _word(source, 2)
    kinds = {"a": "noun", "e": "verb", "i": "name", "o": "noun", "u": "verb"}
    answer = kinds[word[-1]]
    return {"prompt": f"kind {word}", "completion": answer, "answer": answer, "choices": ["noun", "verb", "name"]}


GENERATORS: dict[str, Callable[[random.Random], Row]] = {
    generator.__name__: generator
    for generator in (
        addition,
        subtraction,
        reverse,
        order,
        descending,
        echo,
        first,
        last,
        double,
        again,
        plural,
        past,
        spelling,
        parity,
        ending,
        beginning,
    )
}


def _word(source: random.Random, syllables: int) -> str:
    return "".join(source.choice(_CONSONANTS) + source.choice(_VOWELS) for _ in range(syllables))


def _is_test(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] % _TEST_SHARE == 0
