"""Fields whose word is one of ours, or names code that the user brings (`cpift/extensions.py`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator

from cpift.config.paths import texts
from cpift.config.words import ConflictName, MergeName, MetricName
from cpift.errors import ConfigError, Problem
from cpift.extensions import TITLES, Extension, ExtensionKind, find, placed, short_name, wrong_word


@dataclass(frozen=True)
class Word:
    """A field that may name code: what kind, and the words that are ours."""

    kind: ExtensionKind
    ours: tuple[str, ...]


# By the field's dotted name in a run's file; `*` is any number.
WORDS: Mapping[str, Word] = {
    "tasks.*.metric": Word("metrics", get_args(MetricName)),
    "fusion.method": Word("methods", get_args(MergeName)),
    "fusion.conflict": Word("conflicts", get_args(ConflictName)),
}


def _checked(name: str) -> BeforeValidator:
    word = WORDS[name]

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"is no name of a {TITLES[word.kind]} → one of {', '.join(word.ours)}")
        if wrong := wrong_word(word.kind, value, word.ours):
            raise ValueError(wrong)
        return value

    return BeforeValidator(check)


Metric = Annotated[MetricName | str, _checked("tasks.*.metric")]
Method = Annotated[MergeName | str, _checked("fusion.method")]
Conflict = Annotated[ConflictName | str, _checked("fusion.conflict")]


def place_words(raw: dict[str, Any], folder: Path) -> Iterator[Problem]:
    """Give words of a file that name code in `folder`, the file's, its whole path, in place.

    For files of runs, sweeps and comparisons: a field of the run counts wherever its dotted name stands.
    """
    for section, key, field in list(texts(raw)):
        if (word := word_at(field)) is None or section[key] in word.ours:
            continue
        placed_word = placed(word.kind, section[key], folder)
        if isinstance(placed_word, Problem):
            yield Problem(field, placed_word.what, placed_word.remedy)
        else:
            section[key] = placed_word


def require_words(raw: dict[str, Any], folder: Path, subject: str) -> None:
    """`place_words` in the file of a sweep or a comparison, but for the run in it. Raises ConfigError."""
    if problems := list(place_words({name: value for name, value in raw.items() if name != "run"}, folder)):
        raise ConfigError(subject, problems)


def word_at(field: str) -> Word | None:
    """By its dotted name, whatever stands before it, and with the number of a value in a list of them."""
    shape = "." + re.sub(r"\.\d+(?=\.|$)", ".*", field).removesuffix(".*")
    return next((word for name, word in WORDS.items() if shape.endswith(f".{name}")), None)


def code_of(config: BaseModel) -> dict[str, Extension]:
    """By dotted field, what of a loaded config is the user's code. Nothing is imported."""
    extensions = {}
    for section, key, field in texts(config.model_dump(mode="json")):
        if (word := word_at(field)) is not None and section[key] not in word.ours:
            extensions[field] = find(word.kind, section[key])
    return extensions


def code_lines(config: BaseModel) -> list[str]:
    """A line for each file whose code a command is about to run, which is said before it is run."""
    files: dict[str, list[str]] = {}
    for extension in code_of(config).values():
        files.setdefault(extension.origin, []).append(f"{TITLES[extension.kind]} {extension.name}")
    return [f"Runs code of {origin}: {', '.join(dict.fromkeys(names))}" for origin, names in files.items()]


def with_short_words(raw: dict[str, Any]) -> dict[str, Any]:
    """A dumped config as people would write it: words without the place of the file, in place."""
    for section, key, field in list(texts(raw)):
        if word_at(field) is not None:
            section[key] = short_name(section[key])
    return raw
