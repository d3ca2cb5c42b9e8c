"""Reads of mapped files, guarded: a file that is cut short or written to meanwhile is an error with a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cpift_kernels import lost_pages, watch_pages

from cpift.disk.input_watch import noted
from cpift.errors import ChangedInput, Problem

_REMEDY = "put it back whole; the same command goes on with what it has finished"


@contextmanager
def guarded_reads(title: str, files: Iterable[Path] = ()) -> Iterator[None]:
    """Around reads for something called `title`, also of files that a library maps.

    Raises ChangedInput where a page of a mapped file could not be read, or one of `files` is no longer what it was.
    """
    before, changes = lost_pages(), noted(files)
    failure: Exception | None = None
    with watch_pages():
        try:
            yield
        except Exception as error:  # maybe of zeros that came in place of what was cut off
            failure = error
    if lost_pages() > before and not isinstance(failure, ChangedInput):
        cut = changes() or [Problem("a file that was being read", "was cut short", _REMEDY)]
        raise ChangedInput(title, cut, resumable=True) from failure
    if failure is not None:
        raise failure
    if problems := changes():
        raise ChangedInput(title, problems)
