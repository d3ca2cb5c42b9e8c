"""Files that others wrote, read within limits: JSON and JSON lines. Whatever is in them, one error comes out.

Python's own reader takes what then surprises: a name twice (the last wins), numbers without end, NaN, thousands of
levels; and `open` takes a pipe that never ends. Here all of that is refused, in time and memory that the limits bound.
YAML is in `yaml`.
"""

from __future__ import annotations

import json
import math
import os
import stat
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from cpift.errors import CpiftError, Problem

RESTORE = "restore the file"  # where nothing better can be said


class UnreadableError(CpiftError, ValueError):
    """A text that cannot be used: what is wrong with it, and what to do. `subject`: the file, where there is one."""

    def __init__(self, what: str, remedy: str = RESTORE, subject: str = ""):
        self.what, self.remedy, self.subject = what, remedy, subject
        super().__init__(str(self.problem(subject)) if subject else what)

    def __reduce__(self) -> tuple[type[UnreadableError], tuple[str, str, str]]:
        return type(self), (self.what, self.remedy, self.subject)

    def problem(self, where: str) -> Problem:
        return Problem(where, self.what, self.remedy)


@dataclass(frozen=True)
class Limits:
    """What a text may hold. `values` counts an alias as often as it is used; `digits` are those of a whole number."""

    size: int  # bytes
    values: int
    depth: int = 32
    digits: int = 20  # 64 bits
    signed: bool = True  # whether whole numbers may have a minus
    constants: tuple[str, ...] = ()  # of NaN, Infinity and -Infinity, which are no JSON
    mark: bool = False  # whether it may begin with a byte order mark, as editors on Windows write it


CONFIG = Limits(size=1 << 18, values=100_000, mark=True)  # a run, a sweep, a comparison, the value of --set
# config.json and its neighbours: Mamba has Infinity in time_step_limit, tokenizers 10³⁰ for model_max_length. What
# transformers reads too may have no byte order mark, for it takes none.
MODEL_CONFIG = Limits(size=1 << 24, values=2_000_000, digits=31, constants=("Infinity", "-Infinity"))
ADAPTER = Limits(size=1 << 22, values=500_000, mark=True)
INDEX = Limits(size=1 << 26, values=5_000_000)
TENSOR_HEADER = Limits(size=100_000_000, values=20_000_000, depth=4, signed=False)  # the format's own limit of bytes
ROW = Limits(size=1 << 24, values=1 << 24, depth=64, digits=300)  # below the largest float
ANSWER = Limits(size=1 << 22, values=500_000, constants=("NaN", "Infinity", "-Infinity"))  # of a server
RECORD = Limits(size=1 << 28, values=50_000_000, constants=("NaN", "Infinity", "-Infinity"))  # what cpift wrote


def read_bytes(path: Path, size: int) -> bytes:
    """A regular file of at most `size` bytes. Raises UnreadableError for anything else, OSError as `open` does."""
    with opened(path) as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise UnreadableError(f"has more than {size:,} bytes", "is it the right file?", str(path))
    return data


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file open for reading. Raises as `read_bytes`."""
    # A pipe that nobody writes to would block for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UnreadableError(f"is {_KINDS.get(kind, 'no regular file')}", "give a file", str(path))
    with os.fdopen(descriptor, "rb") as file:
        yield file


_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"} | dict.fromkeys(
    (stat.S_IFCHR, stat.S_IFBLK), "a device"
)


def read_json(path: Path, limits: Limits = RECORD) -> Any:
    """The value in a file. Raises UnreadableError naming the file, OSError where it cannot be opened."""
    return read_with(path, limits, parse_json)


def read_object(path: Path, limits: Limits) -> dict[str, Any]:
    """As `read_json`, where only an object of names and values makes sense."""
    content = read_json(path, limits)
    if not isinstance(content, dict):
        raise UnreadableError(f"holds {_words(content)}, not an object of fields", subject=str(path))
    return content


def read_weight_map(path: Path) -> dict[str, str]:
    """Which file of the same folder has each tensor, from an index of shards. Raises as `read_json`."""
    weight_map = read_object(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableError("has no weight_map of tensors and files", "download it again", str(path))
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\\0"):
            what = f"has {shown(name)} in {shown(file)}, which is no file of its folder"
            raise UnreadableError(what, "name the files beside the index", str(path))
    return weight_map


def read_with(path: Path, limits: Limits, parse: Callable[[bytes, Limits], Any]) -> Any:
    """What `parse` makes of a file, whose name its UnreadableError then has."""
    data = read_bytes(path, limits.size)
    try:
        return parse(data, limits)
    except UnreadableError as error:
        raise UnreadableError(error.what, error.remedy, str(path)) from None


def parse_json(text: str | bytes, limits: Limits) -> Any:
    """The value that a text in JSON stands for. Raises UnreadableError."""
    text = decoded(text, limits)
    # An upper bound of the values, for commas and brackets also stand in strings; it bounds the memory beforehand.
    openings = text.count("[") + text.count("{")
    if openings + text.count(",") > limits.values:
        raise UnreadableError(f"holds more than {limits.values:,} values")
    try:
        value = _decoder(limits).decode(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is no JSON: {error.msg}, line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep(limits) from None
    if openings > limits.depth or "\\u" in text:
        require_limits(value, limits)
    return value


def json_lines(path: Path) -> Iterator[Any]:
    """The JSON value of each line that is not empty; in place of a line that has none, the UnreadableError.

    Names given twice and endless numbers are refused at the price of `json.loads`: only a line that the first attempt
    does not take to its end is looked at more closely. Levels are limited by the interpreter alone: who keeps a nested
    value calls `require_limits`. Raises UnreadableError where the file is no text of lines, OSError as `open` does.
    """
    scan = _decoder(ROW).scan_once
    with opened(path) as file:
        _require_line_breaks(file, path)
        file.seek(len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0)  # as editors on Windows write it
        try:
            for line in TextIOWrapper(file, encoding="utf-8"):
                try:
                    value, end = scan(line, 0)
                except (StopIteration, ValueError, RecursionError):
                    end = 0
                if line[end:] == "\n" and end:
                    yield value
                elif line.strip():
                    yield _line(line)
        except UnicodeDecodeError as error:
            raise UnreadableError(f"is no UTF-8: {error.reason}", "save it as UTF-8", str(path)) from None


def _require_line_breaks(file: BinaryIO, path: Path) -> None:
    """One in every stretch of ROW.size bytes, so that no line is longer than two of them; reads up to the first."""
    for start in range(0, os.fstat(file.fileno()).st_size, ROW.size):
        file.seek(start)
        if len(file.readline(ROW.size)) == ROW.size:
            what = f"has a line of more than {ROW.size:,} bytes, from byte {start:,} on or before"
            raise UnreadableError(what, "is it JSON lines?", str(path))
    file.seek(0)


def _line(line: str) -> Any:
    try:
        return parse_json(line, ROW)
    except UnreadableError as error:
        return error


def decoded(text: str | bytes, limits: Limits) -> str:
    """The text of bytes in UTF-8, within the limit of size. Raises UnreadableError."""
    if len(text) > limits.size:
        raise UnreadableError(f"has more than {limits.size:,} bytes")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is no UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8") from None
    _check_text(text)
    if text.startswith("\ufeff") and limits.mark:
        return text[1:]
    if text.startswith("\ufeff"):
        raise UnreadableError("begins with a byte order mark", "save it as UTF-8 without one")
    return text


def row_decoder() -> Any:
    """The decoder of JSON that holds the limits of a row, for who goes over a text himself with `scan_once`."""
    return _decoder(ROW)


@lru_cache
def _decoder(limits: Limits) -> Any:
    return json.JSONDecoder(
        object_pairs_hook=_unique,
        parse_int=partial(_whole, limits=limits),
        parse_float=_finite,
        parse_constant=partial(_constant, known=limits.constants),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise UnreadableError(f"has {shown(twice)} twice", "keep one of the two")


def _whole(text: str, limits: Limits) -> int:
    if text[0] == "-" and not limits.signed:
        raise UnreadableError(f"has {shown(text)} where no number is negative")
    if len(text.lstrip("-")) > limits.digits:
        raise UnreadableError(f"has a number of {len(text)} digits, {shown(text)}", "give a number that fits 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UnreadableError(f"has {shown(text)}, which is no finite number", "give a finite number")
    return value


def _constant(name: str, known: tuple[str, ...]) -> float:
    if name not in known:
        raise UnreadableError(f"has {name}, which is no JSON", "give a finite number, or null")
    return float(name)


def require_limits(value: Any, limits: Limits) -> None:
    """Raise UnreadableError for more values or levels than may be, and for text that cannot be written."""
    count, waiting = 0, [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > limits.values:
            raise UnreadableError(f"holds more than {limits.values:,} values", "use fewer aliases")
        if depth > limits.depth:
            raise _too_deep(limits)
        if isinstance(node, dict):
            for name in node:
                _check_text(name)
            waiting += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, (list, tuple)):
            waiting += [(child, depth + 1) for child in node]
        else:
            _check_text(node)


def _check_text(value: Any) -> None:
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"holds half of a surrogate pair ({value[error.start]!a}), which is no character"
            raise UnreadableError(what, "mend the escape sequence") from None


def _too_deep(limits: Limits) -> UnreadableError:
    return UnreadableError(f"is nested more than {limits.depth} levels deep", "is it the right file?")


def _words(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )


def shown(value: object, length: int = 60) -> str:
    """A value as a message may show it: escaped, and not at length."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
