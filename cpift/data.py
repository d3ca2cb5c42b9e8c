"""Tasks' rows: loaded from files, the hub or a generator, checked, fingerprinted, sampled and mixed."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from cpift.config import DataSource, TaskConfig
from cpift.config_training import Mixing
from cpift.errors import ChangedInput, CpiftError, DataError, Problem, entry
from cpift.examples import Example, Message, RowError, parse_row
from cpift.files import digest
from cpift.hub import HubError
from cpift.input_watch import unchanged
from cpift.metrics import metric_of
from cpift.row_sources import rows_of
from cpift.tokens import CompletionCollator, count_tokens, tokenise, tokenised_dataset
from cpift.turns import TRAIN_FLAGS
from cpift.untrusted import UnreadableError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "CompletionCollator",
    "Example",
    "Message",
    "balanced_sample",
    "check_task",
    "count_examples",
    "load_examples",
    "mixture",
    "pick_examples",
    "read_examples",
    "source_fingerprint",
    "tokenise",
    "tokenised_dataset",
]
Item = TypeVar("Item")
# In a file's bytes; arguments only as text.
_NEWLY_READ = re.compile(
    rb'"(arguments)"\s*:\s*"|"(tool_calls|tool_call_id|name|reasoning_content|reasoning|thinking|thought|'
    + "|".join(TRAIN_FLAGS).encode()
    + rb')"\s*:'
)
_SHOWN = 10  # bad rows listed by number; more are counted


def read_examples(source: DataSource) -> Iterator[Example]:
    """The source's rows one by one in order, at most `limit` of them; none is kept.

    Raises, what is wrong with rows at its end and after the first of them giving no more:
        DataError: the source cannot be read or has no rows, or rows are no examples (listed by number, from 1).
        HubError: the hub does not answer.
    """
    name = rows_of(source).told
    problems: list[Problem] = []
    number = bad = 0
    for number, row in enumerate(islice(rows_of(source).rows(), source.limit), start=1):
        try:
            example = parse_row(_as_mapping(row), source.columns, f"{name}, row {number}")
        except RowError as error:
            bad += 1
            if bad <= _SHOWN:
                problems.append(Problem(f"row {number}", str(error)))
        else:
            if not bad:
                yield example
    if bad:
        raise DataError(name, problems + _unlisted(bad))
    if not number:
        raise DataError(name, [Problem(name, "no rows", "give a source that has some")])


def load_examples(source: DataSource) -> list[Example]:
    """All of `read_examples`."""
    return list(read_examples(source))


def count_examples(source: DataSource) -> int:
    """How many `read_examples` gives."""
    return sum(1 for _ in read_examples(source))


def pick_examples(source: DataSource, rows: Sequence[int]) -> list[Example]:
    """The examples in these places, counted from 0, in the order of `rows`; the others are read and let go."""
    places = {row: place for place, row in enumerate(rows)}
    found = {places[row]: one for row, one in enumerate(read_examples(source)) if row in places}
    return [found[place] for place in range(len(rows))]


def source_fingerprint(source: DataSource) -> str:
    """sha256 (hex) of what decides the rows.

    That is a file's bytes, a hub data set's id, subset, split and commit, or a generator's name, version, split, size
    and seed; with all of them `limit` and `columns`.

    Raises:
        DataError: the file is not there.
        HubError: the commit is not pinned and the hub does not answer.
    """
    identity: dict[str, Any] = {"limit": source.limit, "columns": source.columns}
    identity |= rows_of(source).decided_by()
    identity |= {"turns": 2} if source.file is not None and _read_otherwise(source) else {}
    return digest(identity)


@contextlib.contextmanager
def same_rows(sources: Mapping[str, DataSource], expected: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Around a read of rows, by the field that names them; gives the fingerprint of each source.

    Raises ChangedInput where one is not the `expected` one, or changes meanwhile.
    """
    files = [source.file for source in sources.values() if source.file is not None]
    with unchanged("what was read of the rows", files):
        found = {name: source_fingerprint(source) for name, source in sources.items()}
        what = "is not what it was when the command began"
        others = [Problem(name, what, "run it again") for name in sources if found[name] != (expected or found)[name]]
        if others:
            raise ChangedInput("what was read of the rows", others)
        yield found


def check_task(
    task: TaskConfig,
    *,
    download: bool = True,
    splits: Sequence[str] = ("train", "test"),
    see: Callable[[str, str, Example], None] = lambda task, split, example: None,
) -> list[Problem]:
    """What can be found wrong with a task before any training: sources, rows, and the columns that its metric needs.

    With `download=False` hub data sets are not looked at, so nothing is fetched. `see` gets every row that is read.
    """
    problems: list[Problem] = []
    for split in splits:
        source: DataSource | None = getattr(task, split)
        if source is None or (source.hub is not None and not download):
            continue
        try:
            if split == "test":
                examples = load_examples(source)
                problems += _shortened(list(_metric_problems(task, examples)))
            for example in examples if split == "test" else read_examples(source):
                see(task.name, split, example)
        except (DataError, HubError) as error:
            problems += _located(f"tasks.{task.name}.{split}", error)
    return problems


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


def _read_otherwise(source: DataSource) -> bool:
    """Whether rows hold what earlier versions left out or wrote otherwise: results from them are no longer the same.

    Those dropped every field of a turn but role, content and tool_calls, wrote arguments as the text that they came as,
    and scored a last reply without its calls.
    """
    assert source.file is not None
    with source.file.open("rb") as lines:
        found = {match[1] or match[2] for line in lines for match in _NEWLY_READ.finditer(line)}
    if not found or b"arguments" in found:
        return bool(found)
    with contextlib.suppress(DataError):
        for one in read_examples(source):
            if one.messages[-1].tool_calls or any(turn.fields or not turn.trained for turn in one.messages):
                return True
    return False


def _as_mapping(row: Any) -> dict[str, Any]:
    if isinstance(row, UnreadableError):
        raise RowError(str(row))
    if not isinstance(row, dict):
        raise RowError(f"must be a JSON object, not {type(row).__name__}")
    return row


def _located(where: str, error: CpiftError) -> list[Problem]:
    if isinstance(error, DataError):
        return [Problem(f"{where}, {problem.where}", problem.what, problem.remedy) for problem in error.problems]
    return [Problem(where, str(error))]


def _metric_problems(task: TaskConfig, examples: Sequence[Example]) -> Iterator[Problem]:
    for number, example in enumerate(examples, start=1):
        where = f"tasks.{task.name}.test, row {number}"
        metric = metric_of(task.metric)
        if (found := metric.doubt(example) or metric.problem(example)) is not None:
            yield Problem(where, *found)


def _shortened(problems: list[Problem]) -> list[Problem]:
    return [*problems[:_SHOWN], *_unlisted(len(problems))]


def _unlisted(found: int) -> list[Problem]:
    return [Problem("and", f"{found - _SHOWN} more rows with problems")] if found > _SHOWN else []
