"""What `cpift init` is given: files, folders and hub data sets, as tasks with their splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.config.inputs import DataSource
from cpift.errors import ConfigError, Problem
from cpift.hub import resolve_revision
from cpift.rows.tables import splits_of
from cpift.untrusted.json import UnreadableError

# What splits are called, the first that is there is taken for testing.
TESTS = ("test", "testing", "eval", "validation", "valid", "val", "dev")
TRAINS = ("train", "training")
_SPLIT = re.compile(rf"(?:(.*?)[-_.])?({'|'.join((*TRAINS, *TESTS))})", re.IGNORECASE)
_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet", ".arrow", ".feather")
_PACKED = (".gz", ".zst")
_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class TaskFiles:
    """A task's name and where its rows come from; `test` None: rows of `train` are to be held out."""

    name: str
    train: DataSource
    test: DataSource | None = None


def tasks_of(arguments: Iterable[str]) -> list[TaskFiles]:
    """A task for each data set. Raises ConfigError with all that is wrong."""
    problems: list[Problem] = []
    sources: list[tuple[str, DataSource, str]] = []
    for argument in arguments:
        try:
            sources += _sources(argument)
        except UnreadableError as error:
            problems.append(error.problem(argument))
        except OSError as error:
            problems.append(Problem(argument, error.strerror or str(error), "check the path"))
    problems += _repeated(sources)
    tasks = list(_paired(sources, problems))
    if not tasks and not problems:
        problems.append(Problem("DATA", "no data", "give files of rows: cpift init data/*.jsonl --model MODEL"))
    if len(tasks) > 16:
        problems.append(Problem("DATA", f"{len(tasks)} tasks, at most 16", "give fewer, or put files together"))
    if problems:
        raise ConfigError("init", problems)
    return tasks


def rows_at(argument: str) -> tuple[str, DataSource]:
    """A name and the rows of one file, folder or hub data set. Raises ConfigError where it is none, or several."""
    try:
        sources = list(_sources(argument))
    except UnreadableError as error:
        raise ConfigError("test rows", [error.problem(argument)]) from None
    except OSError as error:
        raise ConfigError("test rows", [Problem(argument, error.strerror or str(error), "check the path")]) from None
    if len(sources) > 1:
        raise ConfigError("test rows", [Problem(argument, f"holds {len(sources)} files or splits", "give one of them")])
    ((name, source, _),) = sources
    return _as_name(name), source


def _repeated(sources: list[tuple[str, DataSource, str]]) -> list[Problem]:
    """Files and splits that are given more than once: each would become a second task of the same rows."""
    same = [(source.file.resolve() if source.file else source.hub, source.split) for _, source, _ in sources]
    twice = [place for at, (place, split) in enumerate(same) if (place, split) in same[:at]]
    return [Problem(str(place), "is given twice", "give it once") for place in twice]


def _sources(argument: str) -> Iterator[tuple[str, DataSource, str]]:
    """Name, source and split ("" where it has none) of what an argument means."""
    path = Path(argument).expanduser()
    if not path.exists():
        if not _HUB.fullmatch(argument) or Path(argument).suffix in (*_ROWS, *_PACKED):
            raise UnreadableError("there is no such file or folder", "check the path; hub data sets are org/name")
        commit = resolve_revision("dataset", argument, None)
        yield argument.rsplit("/", 1)[1], DataSource(hub=argument, revision=commit), ""
    elif (path / "config.json").is_file() and not (path / "state.json").is_file():
        raise UnreadableError("is a model's folder, not rows", f"give it as --model {argument}")
    elif path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        inside = sorted(below for below in path.iterdir() if below.is_file() and _stem(below) != below.name)
        if not inside:
            raise UnreadableError("holds no files of rows", f"known endings: {', '.join(_ROWS)}, each with .gz or .zst")
        for file in inside:
            yield from _sources(str(file))
    elif path.is_dir() and (splits := splits_of(path)):
        for split in splits:
            yield path.name, DataSource(file=path.absolute(), split=split), split.lower()
    elif path.suffix in (".yaml", ".yml"):  # axolotl's, for example
        raise UnreadableError("is a file of fields, not of rows", f"`cpift plan {argument}` says what to do with it")
    else:
        name, split = _split_of(path)
        yield name, DataSource(file=path.absolute()), split


def _stem(path: Path) -> str:
    """A file's name without the endings that say how rows are written."""
    name = path.name
    for endings in (_PACKED, _ROWS):
        name = next((name.removesuffix(ending) for ending in endings if name.lower().endswith(ending)), name)
    return name


def _split_of(path: Path) -> tuple[str, str]:
    """A name, and the split that the end of a file's name says."""
    stem = _stem(path)
    if (match := _SPLIT.fullmatch(stem)) is None:
        return stem, ""
    return match[1] or path.absolute().parent.name, match[2].lower()


def _paired(sources: list[tuple[str, DataSource, str]], problems: list[Problem]) -> Iterator[TaskFiles]:
    named: dict[str, dict[str, DataSource]] = {}
    for name, source, split in sources:
        splits = named.setdefault(_as_name(name), {})
        if split in splits:
            named[_another(_as_name(name), named)] = {split: source}
        else:
            splits[split] = source
    for name, splits in named.items():
        train = next((splits[word] for word in (*TRAINS, "") if word in splits), None)
        test = next((splits[word] for word in TESTS if word in splits), None)
        if train is None and test is None:
            where = ", ".join(splits)
            problems.append(Problem(name, f"has splits {where}, and none to train on", f"call it {TRAINS[0]}"))
        else:
            yield TaskFiles(name, train or _only(test), test if train else None)


def _only(source: Any) -> DataSource:
    """Rows for testing alone: they are trained on, and some of them held out."""
    assert isinstance(source, DataSource)
    return source


def _as_name(name: str) -> str:
    cleaned = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:50]
    return cleaned or "task"


def _another(name: str, taken: Iterable[str]) -> str:
    known = set(taken)
    return next(f"{name}-{number}" for number in range(2, 1000) if f"{name}-{number}" not in known)
