"""Rows that are kept while several checks look at them one after the other, for reading and parsing takes longest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from cpift.data.sources import rows_of
from cpift.disk.files import digest, file_identity
from cpift.errors import CpiftError
from cpift.rows.shapes import size_of

if TYPE_CHECKING:
    from cpift.config.run import DataSource
    from cpift.rows.examples import Example

_CHARACTERS = 2**23  # of all rows that are kept; as objects they take several times as many bytes
_kept: ContextVar[_KeptRows | None] = ContextVar("kept", default=None)


@contextmanager
def kept_rows() -> Iterator[None]:
    """Within it rows of files and generators are read once, as far as they are few and their files stay the same."""
    token = _kept.set(_KeptRows())
    try:
        yield
    finally:
        _kept.reset(token)


def rows_once(source: DataSource, read: Callable[[], Iterator[Example]]) -> Iterator[Example]:
    """The rows that `read` gives: those kept before, if this source's are."""
    kept = _kept.get()
    return read() if kept is None or source.hub is not None else kept.rows(source, read)


class _KeptRows:
    def __init__(self) -> None:
        self._rows: dict[str, list[Example]] = {}
        self._left = _CHARACTERS

    def rows(self, source: DataSource, read: Callable[[], Iterator[Example]]) -> Iterator[Example]:
        key = _identity(source)
        if key in self._rows:
            yield from self._rows[key]
            return
        rows, size = [], 0
        for example in read():
            yield example
            size += size_of(example)
            if size <= self._left:
                rows.append(example)
        if key is not None and size <= self._left and key == _identity(source):
            self._rows[key], self._left = rows, self._left - size


def _identity(source: DataSource) -> str | None:
    """What decides the rows that are read, of files their identity; None where these cannot be looked at."""
    try:
        files = [file_identity(file) for file in rows_of(source).files()]
    except (CpiftError, OSError):
        return None
    return digest([source.model_dump(mode="json", exclude={"holdout", "held"}), files])
