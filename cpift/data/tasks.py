"""Tasks' rows: loaded from files, the hub or a generator, checked, fingerprinted, sampled and mixed."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from cpift.config.run import DataSource
from cpift.config.tasks import HeldSource
from cpift.config.training import Mixing
from cpift.data.kept_rows import rows_once
from cpift.data.sources import rows_of
from cpift.data.tokenise import CompletionCollator, count_tokens, tokenise
from cpift.disk.facts import remembered
from cpift.disk.files import digest, file_identity
from cpift.disk.input_watch import unchanged
from cpift.errors import ChangedInput, DataError, Problem, entry
from cpift.rows.examples import Example, Message, RowError, options_otherwise, parse_row
from cpift.rows.formats import is_json_lines
from cpift.rows.holdout import held_key, last_held
from cpift.rows.problems import RowProblems
from cpift.rows.turns import TRAIN_FLAGS
from cpift.untrusted.json import RESTORE, UnreadableError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "CompletionCollator",
    "Example",
    "Message",
    "balanced_sample",
    "count_examples",
    "load_examples",
    "mixture",
    "read_examples",
    "source_fingerprint",
    "tokenise",
]
Item = TypeVar("Item")
_HELD: dict[str, int] = {}
_NEWLY_READ_OF: dict[str, dict[str, int]] = {}
# A letter alone, which may stand for an option; and signs that part lines for Python, and no option from the next.
_NEW_OPTIONS = re.compile(rb':\s*"\s*[A-Z]\s*"|[\x0b\x0c\x1c-\x1e]|\xc2\x85|\xe2\x80[\xa8\xa9]|\\(?:f|u00|u202)')
# In a file's bytes; arguments only as text.
_NEWLY_READ = re.compile(
    rb'"(arguments)"\s*:\s*"|"(tool_calls|tool_call_id|name|reasoning_content|reasoning|thinking|thought|'
    + "|".join(TRAIN_FLAGS).encode()
    + rb')"\s*:'
)


def read_examples(source: DataSource) -> Iterator[Example]:
    """The source's rows one by one in order, at most `limit` of them; none is kept.

    Raises, what is wrong with rows at its end and after the first of them giving no more:
        DataError: the source cannot be read or has no rows, or rows are no examples (by what is wrong with them).
        HubError: the hub does not answer.
    """
    if not isinstance(source, HeldSource):
        yield from _read(source)
        return
    last = _last_held(source)
    for example in _whole(source):
        key = held_key(example, source.holdout)
        if (key is not None and key <= last) is source.held:
            yield example


def _last_held(source: HeldSource) -> int:
    """Up to which key rows are held out; remembered, for every split of a task asks."""
    identity = [rows_of(source).decided_by(), source.limit, source.columns, source.holdout.model_dump()]
    identity += source.within.sides if source.within is not None else []
    where = digest(identity)
    if where not in _HELD:
        _HELD[where] = remembered("last row held out", identity, lambda: _find_last_held(source))
    return _HELD[where]


def _find_last_held(source: HeldSource) -> int:
    wanted = source.holdout.rows
    last, rows = last_held((held_key(example, source.holdout) for example in _whole(source)), wanted)
    if last is None:
        what = f"{wanted:,} of {rows:,} rows would be held out: too few, or none left to train on"
        problem = Problem("holdout.rows", what, "give fewer, or rows of other prompts")
        raise DataError(rows_of(source).description, [problem])
    return last


def _whole(source: HeldSource) -> Iterator[Example]:
    """The rows of which some are held out."""
    return _read(source) if source.within is None else read_examples(source.within)


def _read(source: DataSource) -> Iterator[Example]:
    return rows_once(source, lambda: _parsed(source))


def _parsed(source: DataSource) -> Iterator[Example]:
    name, bad, number = rows_of(source).description, RowProblems(), 0
    for number, row in enumerate(islice(rows_of(source).rows(), source.limit), start=1):
        try:
            example = parse_row(_as_mapping(row), source.columns, f"{name}, row {number}")
        except RowError as error:
            bad.add(number, str(error), error.remedy)
        else:
            if not bad:
                yield example
    if bad:
        raise DataError(name, bad.problems(number))
    if not number:
        raise DataError(name, [Problem(name, "no rows", "give a source that has some")])


def load_examples(source: DataSource) -> list[Example]:
    """All of `read_examples`."""
    return list(read_examples(source))


def count_examples(source: DataSource) -> int:
    """How many `read_examples` gives."""
    return sum(1 for _ in read_examples(source))


def source_fingerprint(source: DataSource) -> str:
    """sha256 (hex) of what decides the rows.

    That is a file's bytes, a hub data set's id, subset, split and commit, or a generator's name, version, split, size
    and seed; with all of them `limit` and `columns`, and which of them are held out.

    Raises:
        DataError: the file is not there.
        HubError: the commit is not pinned and the hub does not answer.
    """
    identity: dict[str, Any] = {"limit": source.limit, "columns": source.columns}
    identity |= rows_of(source).decided_by()
    if isinstance(source, HeldSource):
        identity |= source.sides[-1] | ({"within": source.within.sides} if source.within is not None else {})
    if source.file is not None and is_json_lines(source.file):  # all that earlier versions read
        identity |= _newly_read(source)
    return digest(identity)


@contextlib.contextmanager
def same_rows(sources: Mapping[str, DataSource], expected: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Around a read of rows, by the field that names them; gives the fingerprint of each source.

    Raises ChangedInput where one is not the `expected` one, or changes meanwhile.
    """
    files = [file for source in sources.values() for file in rows_of(source).files()]
    with unchanged("what was read of the rows", files):
        by_name = {name: source_fingerprint(source) for name, source in sources.items()}
        what = "is not what it was when the command began"
        others = [
            Problem(name, what, "run it again") for name in sources if by_name[name] != (expected or by_name)[name]
        ]
        if others:
            raise ChangedInput("what was read of the rows", others)
        yield by_name


SIZES: dict[str, Callable[[Dataset], int]] = {"rows": len, "tokens": lambda dataset: sum(count_tokens(dataset))}


def mixture(datasets: Sequence[Dataset], seed: int, mixing: Mixing = Mixing()) -> Dataset:  # noqa: B008 (frozen)
    """The tasks of one group for joint training, in a random order that `seed` decides.

    Temperature 1: all rows of all tasks. T > 1: task i's share becomes n_i^(1/T) / Σ_j n_j^(1/T), where n counts rows
    or tokens, and the whole stays as long as it was: a task that is to give more rows than it has repeats all of them
    before any a second time, one that is to give fewer gives a random choice.
    """
    from datasets import concatenate_datasets

    parts = []
    for place, (dataset, rows) in enumerate(zip(datasets, _quotas(datasets, mixing), strict=True)):
        extra = random.Random(f"{seed}/{place}").sample(range(len(dataset)), rows % len(dataset))
        parts += [dataset] * (rows // len(dataset)) + ([dataset.select(sorted(extra))] if extra else [])
    return concatenate_datasets(parts).shuffle(seed=seed, keep_in_memory=True)  # the order, 8 bytes a row


def _quotas(datasets: Sequence[Dataset], mixing: Mixing) -> list[int]:
    """Rows that each task gives, at least one."""
    rows = [len(dataset) for dataset in datasets]
    if mixing.temperature == 1:
        return rows
    sizes = [entry(SIZES, mixing.by, "mixing.by")(dataset) for dataset in datasets]
    weights = [size ** (1 / mixing.temperature) for size in sizes]
    shares = [weight / sum(weights) * sum(sizes) for weight in weights]
    return [max(1, round(share * n / size)) for share, n, size in zip(shares, rows, sizes, strict=True)]


def balanced_sample(examples_by_task: Sequence[Sequence[Item]], per_task: int | None, seed: int) -> list[list[Item]]:
    """`per_task` random rows (or places of rows) of each task, without repetition; None: as many as the smallest has.

    A task with fewer than `per_task` rows gives all of them. What one task gives does not depend on the other tasks.
    """
    wanted = per_task if per_task is not None else min(len(examples) for examples in examples_by_task)
    return [
        random.Random(f"{seed}/{place}").sample(examples, min(wanted, len(examples)))
        for place, examples in enumerate(examples_by_task)
    ]


def _newly_read(source: DataSource) -> dict[str, int]:
    """By what is read otherwise than by earlier versions, 2; found out once for a file that stays as it is."""
    assert source.file is not None
    where = digest([file_identity(source.file), source.model_dump(mode="json")])
    if where not in _NEWLY_READ_OF:
        otherwise = {"turns": _read_otherwise(source), "choices": _options_otherwise(source)}
        _NEWLY_READ_OF[where] = {name: 2 for name, newly in otherwise.items() if newly}
    return _NEWLY_READ_OF[where]


def _read_otherwise(source: DataSource) -> bool:
    """Whether rows hold what earlier versions left out or wrote otherwise: results from them are no longer the same.

    Those dropped every field of a turn but role, content and tool_calls, wrote arguments as the text that they came as,
    and scored a last reply without its calls.
    """
    assert source.file is not None
    with source.file.open("rb") as lines:
        fields = {match[1] or match[2] for line in lines for match in _NEWLY_READ.finditer(line)}
    if not fields or b"arguments" in fields:
        return bool(fields)
    with contextlib.suppress(DataError):
        for example in read_examples(source):
            if example.messages[-1].tool_calls or any(turn.fields or not turn.trained for turn in example.messages):
                return True
    return False


def _options_otherwise(source: DataSource) -> bool:
    """Whether earlier versions took other options, or the letter of one for its text."""
    assert source.file is not None
    with source.file.open("rb") as lines:
        if not any(_NEW_OPTIONS.search(line) for line in lines):
            return False
    rows = islice(rows_of(source).rows(), source.limit)
    return any(isinstance(row, dict) and options_otherwise(row, source.columns) for row in rows)


def _as_mapping(row: Any) -> dict[str, Any]:
    if isinstance(row, UnreadableError):
        raise RowError(
            row.what, row.remedy if row.remedy != RESTORE else "one JSON object a line; name tables .csv or .tsv"
        )
    if not isinstance(row, dict):
        raise RowError(f"must be a JSON object, not {type(row).__name__}")
    return row
