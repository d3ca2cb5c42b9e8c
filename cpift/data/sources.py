"""Where rows may come from: files, the hub, a generator."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpift.config.run import DataSource
from cpift.disk.files import file_sha256
from cpift.errors import CpiftError, DataError, Problem, entry
from cpift.hub import resolve_revision
from cpift.pretrained.loading import hub_rows
from cpift.rows.formats import files_of, rows_in
from cpift.text.escaping import code, markdown
from cpift.untrusted.json import UnreadableError, shown


class Rows(ABC):
    """Everything that differs by which of a source's `file`, `hub` and `procedural` is given."""

    def __init__(self, source: DataSource):
        self.source = source

    @abstractmethod
    def rows(self) -> Iterator[Any]:
        """Every row, or in its place the error that reading it gave."""

    @abstractmethod
    def decided_by(self) -> dict[str, Any]:
        """What decides the rows, `limit` and `columns` apart."""

    def files(self) -> list[Path]:
        """The local files that hold them."""
        return []

    @property
    @abstractmethod
    def description(self) -> str:
        """Where the rows are from, in errors."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """The same in a model card."""


class _File(Rows):
    def rows(self) -> Iterator[Any]:
        return _file_rows(self.source)

    def decided_by(self) -> dict[str, Any]:
        if problems := _check_file(self.source):
            raise DataError(self.description, problems)
        assert self.source.file is not None
        path = self.source.file
        if not path.is_dir():
            return {"file": file_sha256(path)}
        with _as_data_error(self.source):
            return {"folder": [[file.name, file_sha256(file)] for file in files_of(path, self.source.split)]}

    def files(self) -> list[Path]:
        assert self.source.file is not None
        with _as_data_error(self.source):
            return files_of(self.source.file, self.source.split)

    @property
    def description(self) -> str:
        return str(self.source.file)

    @property
    def origin(self) -> str:
        return code(self.source.file.name if self.source.file else "")


class _HubRows(Rows):
    def rows(self) -> Iterator[Any]:
        return iter(_hub_rows(self.source))

    def decided_by(self) -> dict[str, Any]:
        source = self.source
        commit = resolve_revision("dataset", str(source.hub), source.revision)
        named = {"hub": source.hub, "subset": source.subset, "split": source.split, "commit": commit}
        return named | ({"data_files": list(source.data_files)} if source.data_files else {})

    @property
    def description(self) -> str:
        return f"hub data set {self.source.hub}"

    @property
    def origin(self) -> str:
        subset = f" ({markdown(self.source.subset)})" if self.source.subset else ""
        return f"{code(str(self.source.hub))}{subset}, {markdown(self.source.split)}"


class _Generated(Rows):
    def rows(self) -> Iterator[Any]:
        from cpift.rows.synthetic import generate

        source = self.source
        return iter(generate(str(source.procedural), source.size or 0, source.seed, source.split))

    def decided_by(self) -> dict[str, Any]:
        from cpift.rows.synthetic import VERSION

        source = self.source
        named = {"procedural": source.procedural, "version": VERSION, "split": source.split}
        return named | {"size": source.size, "seed": source.seed}

    @property
    def description(self) -> str:
        return f"generator {self.source.procedural}"

    @property
    def origin(self) -> str:
        return f"generated: {markdown(str(self.source.procedural))}"


def _check_file(source: DataSource) -> list[Problem]:
    assert source.file is not None
    remedy = "check the path; it starts from the config's folder"
    try:
        kind = source.file.stat().st_mode
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = f"there is no {source.file}" if missing else f"{shown(str(source.file))}: {error.strerror}"
        return [Problem("file", what, remedy)]
    known = stat.S_ISREG(kind) or stat.S_ISDIR(kind)
    return [] if known else [Problem("file", f"{source.file} is no regular file", remedy)]


def _file_rows(source: DataSource) -> Iterator[Any]:
    """As `rows.formats.rows_in`."""
    problems = _check_file(source)
    if problems:
        raise DataError(rows_of(source).description, problems)
    assert source.file is not None
    with _as_data_error(source):
        yield from rows_in(source.file, source.split)


@contextmanager
def _as_data_error(source: DataSource) -> Iterator[None]:
    try:
        yield
    except UnreadableError as error:
        raise DataError(rows_of(source).description, [error.problem("file")]) from None
    except OSError as error:
        what = error.strerror or str(error)
        raise DataError(
            rows_of(source).description, [Problem("file", what, "check the path and its permissions")]
        ) from None


def _hub_rows(source: DataSource) -> Iterator[Any]:
    """Rows of a hub data set at the commit that its revision means; code in the repository is never run."""
    assert source.hub is not None
    commit = resolve_revision("dataset", source.hub, source.revision)
    files = {"data_files": list(source.data_files)} if source.data_files else {}
    how = {"split": source.split, "revision": commit, "streaming": source.streaming} | files
    try:
        yield from hub_rows(source.hub, source.subset, **how)
    except CpiftError:
        raise
    except Exception as error:  # what datasets, the hub's client and the layers of its network raise
        remedy = "check hub, subset, split and revision; data sets that need a script to load are not supported"
        raise DataError(
            rows_of(source).description, [Problem("hub", str(error).strip() or type(error).__name__, remedy)]
        ) from error


ROWS: dict[str, type[Rows]] = {"file": _File, "hub": _HubRows, "procedural": _Generated}


def rows_of(source: DataSource) -> Rows:
    """Raises CpiftError for a kind that is not in ROWS."""
    return entry(ROWS, source.kind, "rows")(source)
