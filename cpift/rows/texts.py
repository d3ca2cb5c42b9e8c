"""Rows out of a stream of text: JSON lines, a JSON array, a table. Every row is at most `ROW.size` long."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cpift.untrusted.json import ROW, UnreadableError, parse_json, row_decoder

_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_DELIMITERS = (",", "\t", ";", "|")


def lines(stream: BinaryIO, path: Path) -> Iterator[Any]:
    """The JSON value of each line that is not empty; in place of a line that has none, the UnreadableError."""
    for line in _Lines(stream, path):
        if line.strip():
            try:
                yield parse_json(line, ROW)
            except UnreadableError as error:
                yield error


class _Lines:
    """Lines of UTF-8 with their ends. `taken`: bytes since it was last set to 0; a row has at most ROW.size."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream, self.path, self.taken, self.first = stream, path, 0, True

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(ROW.size + 1)
        if not line:
            raise StopIteration
        self.taken += len(line)
        if len(line) > ROW.size:
            raise UnreadableError(
                f"has a line of more than {ROW.size:,} bytes", "is it the right file?", str(self.path)
            )
        line = line.removeprefix(codecs.BOM_UTF8) if self.first else line
        self.first = False
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(f"is no UTF-8: {error.reason}", "save it as UTF-8", str(self.path)) from None


def array(stream: BinaryIO, path: Path) -> Iterator[Any]:
    """The values of one JSON array, which is read piece by piece. Raises UnreadableError where it is none."""
    text = _Text(stream, path)
    text.take("[")
    number = 0
    while number or text.after() != "]":
        number += 1
        yield text.value(number)
        if text.after() != ",":
            break
        text.take(",")
    text.take("]")
    if text.after():
        raise UnreadableError("goes on after the end of its array", "one array, or one object a line", str(path))


class _Text:
    """The part of a text that is not taken yet."""

    def __init__(self, stream: BinaryIO, path: Path):
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False

    def _more(self) -> bool:
        """Read on; twice as much as there is, so that a long row is not looked at too often."""
        if self._ended:
            return False
        data = self._stream.read(max(_CHUNK, 2 * (len(self._text) - self._at)))
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise UnreadableError(f"is no UTF-8: {error.reason}", "save it as UTF-8", str(self._path)) from None
        self._at = 0
        return True

    def after(self) -> str:
        """The next character that is no space, which is not taken; nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, sign: str) -> None:
        text = self.after()
        if text != sign:
            what = f"has {text!r} where {sign!r} belongs" if text else f"ends where {sign!r} belongs"
            raise UnreadableError(f"is no JSON array: {what}", "mend it, or download it again", str(self._path))
        self._at += 1

    def value(self, number: int) -> Any:
        """The next value, row `number`."""
        self.after()
        while True:
            try:
                value, end = row_decoder().scan_once(self._text, self._at)
            except UnreadableError as error:
                raise UnreadableError(f"row {number} {error.what}", error.remedy, str(self._path)) from None
            except (StopIteration, ValueError, RecursionError) as error:
                if len(self._text) - self._at > ROW.size or not self._more():
                    raise self._broken(number, error) from None
                continue
            if end < len(self._text) or not self._more():  # a number may go on
                self._at = end
                return value

    def _broken(self, number: int, error: Exception) -> UnreadableError:
        if len(self._text) - self._at > ROW.size:
            return UnreadableError(f"row {number} has more than {ROW.size:,} characters", subject=str(self._path))
        why = error.msg if isinstance(error, json.JSONDecodeError) else "no value"
        return UnreadableError(f"row {number} is no JSON: {why}", "mend it, or download it again", str(self._path))


def table(stream: BinaryIO, path: Path) -> Iterator[Any]:
    """The rows of a table with a header as texts by column; nothing is taken for a number or for missing.

    Columns are separated by the sign of `_DELIMITERS` that the header has most of. Raises UnreadableError.
    """
    csv.field_size_limit(ROW.size)
    source = _Lines(stream, path)
    try:
        first = next(source, "")
        delimiter = max(_DELIMITERS, key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))
        header = next(csv.reader(_chain(first, source), delimiter=delimiter, strict=True), [])
        _check_header(header, path)
        yield from _records(csv.reader(source, delimiter=delimiter, strict=True), header, source)
    except csv.Error as error:
        what = f"is no table: {error}"
        raise UnreadableError(what, 'put cells with quotes or line breaks in quotes, "" for one', str(path)) from None


def _chain(first: str, source: _Lines) -> Iterator[str]:
    yield first
    yield from source


def _check_header(header: list[str], path: Path) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UnreadableError(f"has column {twice[0]!r} twice", "keep one of the two", str(path))


def _records(reader: Iterator[list[str]], header: list[str], source: _Lines) -> Iterator[Any]:
    for cells in reader:
        if source.taken > ROW.size:
            what = f"has a row of more than {ROW.size:,} bytes"
            raise UnreadableError(what, "is a quote left open?", str(source.path))
        source.taken = 0
        if not cells:
            continue
        if len(cells) != len(header):
            remedy = "put cells that hold the separator in quotes"
            yield UnreadableError(f"has {len(cells)} cells, the header {len(header)}", remedy)
        else:
            yield {name: cell for name, cell in zip(header, cells, strict=True) if name}
