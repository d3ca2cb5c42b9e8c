"""The rows of a source as tokens, made once and kept in files that every worker of a run maps.

Their folder is named by all that decides them: the rows, the tokenizer with its template, `max_length`, cpift and its
libraries. So nothing that changed is ever taken for what it was, and what is longer serves for what is shorter. A
folder appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from cpift.data.on_disk import Row, rows_on_disk
from cpift.data.tasks import read_examples, same_rows
from cpift.data.templates import ASKS_TODAY
from cpift.data.token_workers import Chunk, tokenised
from cpift.data.use import RowUse
from cpift.disk import facts
from cpift.disk.files import digest, is_json, read_json, write_json
from cpift.errors import DataError, Problem
from cpift.rows.problems import one_per_kind

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from cpift.config.run import DataSource

_ROWS, _FACTS, _SIZES = "rows.arrow", "facts.npy", "sizes.json"
_FILES = (_ROWS, _FACTS)
_UNKNOWN = secrets.token_hex(16)  # stands for what cannot be told, as libraries that somebody works on: of this process
_PROBLEMS = 5  # after which rows are looked at no longer


@dataclass(frozen=True)
class TokenRows:
    """rows: the source's, in order, with columns `input_ids` and `labels`, cut at `max_length`; without those that
    nothing is learnt from. facts: int32 `[2, all rows of the source]`: tokens before the cut, place of the first label
    that counts. name: differs where any of it does."""

    rows: Dataset
    facts: np.ndarray
    max_length: int
    name: str

    def __len__(self) -> int:
        """Rows of the source."""
        return int(self.facts.shape[1])

    def use(self, places: Sequence[int] | None = None) -> RowUse:
        """How much is learnt of all rows, or of those in these places."""
        lengths, firsts = self.facts if places is None else self.facts[:, list(places)]
        learnt = firsts < self.max_length
        cut = learnt & (lengths > self.max_length)
        return RowUse(self.max_length, len(lengths), int((~learnt).sum()), int(cut.sum()))

    def chosen(self, places: Sequence[int] | None = None) -> Dataset:
        """The rows that are learnt from, all or of those in these places and in their order."""
        if places is None:
            return self.rows
        learnt = self.facts[1] < self.max_length
        positions = learnt.cumsum() - 1
        return self.rows.select([int(positions[place]) for place in places if learnt[place]])


class TokenFiles:
    """What is kept in `folder` of rows that this tokenizer writes."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase):
        self._folder, self._tokenizer = folder, tokenizer
        self._how = digest([_identity(tokenizer), facts.code(), facts.releases() or _UNKNOWN])

    def rows(self, source: DataSource, fingerprint: str, max_length: int) -> TokenRows:
        """The rows of a source that has this fingerprint, made if they are not kept. Who wants the same rows meanwhile
        waits for them. Their template was checked before (`preflight`).

        Raises:
            DataError: the source cannot be read, or the template cannot write some of its rows.
            ChangedInput: the source is another.
        """
        key = digest([fingerprint, self._how])[:24]
        place = self._folder / f"{key}-{max_length}"
        if not _whole(place):
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / f".{key}.lock"):
                if not _whole(place):
                    longer = self._longer(key, max_length)
                    made = (
                        self._written(source, fingerprint, max_length) if longer is None else _cut(longer, max_length)
                    )
                    _keep(place, made)
        return _opened(place)

    def has(self, fingerprint: str, max_length: int) -> bool:
        """Whether `rows` would have nothing to tokenise."""
        key = digest([fingerprint, self._how])[:24]
        return _whole(self._folder / f"{key}-{max_length}") or self._longer(key, max_length) is not None

    def _longer(self, key: str, max_length: int) -> TokenRows | None:
        """The same rows cut later."""
        lengths = {int(place.name.rpartition("-")[2]): place for place in self._folder.glob(f"{key}-*")}
        fitting = [length for length, place in lengths.items() if length > max_length and _whole(place)]
        return _opened(lengths[min(fitting)]) if fitting else None

    def _written(self, source: DataSource, fingerprint: str, max_length: int) -> Iterator[Chunk]:
        problems: list[Problem] = []
        with same_rows({"rows": source}, {"rows": fingerprint}):
            for chunk in tokenised(read_examples(source), self._tokenizer, max_length):
                yield chunk
                problems += chunk.problems
                if len(problems) >= _PROBLEMS:
                    break
        if problems:
            raise DataError("training rows", one_per_kind(problems[:_PROBLEMS]))


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides how a tokenizer writes rows, and the day where its template writes that."""
    template = tokenizer.chat_template
    day = date.today().isoformat() if ASKS_TODAY in str(template) else ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # nothing tells whether it is the same in another process, which costs time only
        return [type(tokenizer).__name__, template, day, _UNKNOWN]
    rules = json.loads(backend.to_str()) | dict.fromkeys(("truncation", "padding"))  # what the last call left there
    special = sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    tokens = [tokenizer.special_tokens_map, tokenizer.eos_token_id, special, tokenizer.split_special_tokens]
    return [type(tokenizer).__name__, rules, template, tokens, day]


def _whole(place: Path) -> bool:
    """Whether its files are there, as long as they were written."""
    if not is_json(place / _SIZES):
        return False
    sizes = read_json(place / _SIZES)
    return all((place / name).is_file() and (place / name).stat().st_size == sizes.get(name) for name in _FILES)


def _opened(place: Path) -> TokenRows:
    from datasets import Dataset

    length = int(place.name.rpartition("-")[2])
    return TokenRows(
        Dataset.from_file(str(place / _ROWS)), np.load(place / _FACTS, allow_pickle=False), length, place.name
    )


def _keep(place: Path, chunks: Iterable[Chunk]) -> None:
    partial = place.with_name(f".{place.name}.partial")
    for left in (partial, place):  # interrupted, or not whole
        shutil.rmtree(left, ignore_errors=True)
    found: list[np.ndarray] = []

    def rows() -> Iterator[Row]:
        for chunk in chunks:
            found.append(np.array([chunk.lengths, chunk.firsts], dtype=np.int32))
            yield from chunk.rows

    rows_on_disk(rows(), partial / _ROWS)
    np.save(partial / _FACTS, np.concatenate(found, axis=1))
    for name in _FILES:
        _flush(partial / name)
    write_json(partial / _SIZES, {name: (partial / name).stat().st_size for name in _FILES})
    os.rename(partial, place)


def _flush(path: Path) -> None:
    """To the disk, before the folder has its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cut(kept: TokenRows, max_length: int) -> Iterator[Chunk]:
    """As `tokenised` would give them."""
    learnt = iter(kept.rows)
    for length, first in kept.facts.T.tolist():
        row = next(learnt) if first < kept.max_length else {}
        rows = [{name: ids[:max_length] for name, ids in row.items()}] if first < max_length else []
        yield Chunk(rows, [length], [first])
