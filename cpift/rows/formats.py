"""Files of rows as they are: JSON lines, a JSON array, CSV, TSV, Parquet, Arrow, folders of datasets' `save_to_disk`.

The content decides which it is; a name tells only a table of text from JSON lines. JSON and tables may be compressed.
Rows are streamed: none of these is copied or ever whole in memory. Arrow's files are read by pyarrow itself, for
datasets would write each a second time into its cache, and opens what pictures and sounds in a row point at.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cpift.rows.tables import arrow_file, arrow_stream, parquet, saved_files, saved_rows
from cpift.rows.texts import array, lines, table
from cpift.untrusted.json import UnreadableError, json_lines, opened

_HEAD = 4096  # bytes that tell formats apart
_MARK = b"\xef\xbb\xbf"  # of UTF-8, as editors on Windows write it
_NO_TEXT = frozenset((*range(9), 0x1A))  # control characters that no text of rows holds as they are
_PROSE = (".txt", ".text", ".md", ".rst")  # names of texts that nobody wrote as rows
TABLES = {".csv": "CSV", ".tsv": "TSV", ".tab": "TSV"}  # by a name's ending; the header tells the separator


@dataclass(frozen=True)
class Format:
    """How a file's rows are written."""

    title: str
    rows: Callable[[Path], Iterator[Any]]


def _zstd(file: BinaryIO) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))


def _gzip(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=file))


# First bytes of a file, and what opens it.
COMPRESSIONS: dict[bytes, tuple[str, Callable[[BinaryIO], BinaryIO]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}
# First bytes of a file that holds Arrow's columns.
BINARY: dict[bytes, Format] = {
    b"PAR1": Format("Parquet", parquet),
    b"ARROW1": Format("Arrow", arrow_file),
    b"\xff\xff\xff\xff": Format("Arrow", arrow_stream),
}
_AS_TEXT = "save it as JSON lines, CSV or Parquet"
# First bytes of what is something else.
REFUSED: dict[bytes, tuple[str, str]] = {
    b"PK\x03\x04": ("is a zip archive or a spreadsheet", f"unpack it, or {_AS_TEXT}"),
    b"\xd0\xcf\x11\xe0": ("is a spreadsheet of old", _AS_TEXT),
    b"SQLite format 3": ("is a database", _AS_TEXT),
    b"\x80\x02": ("is a pickle, which is code", _AS_TEXT),
    b"\x80\x03": ("is a pickle, which is code", _AS_TEXT),
    b"\x80\x04": ("is a pickle, which is code", _AS_TEXT),
    b"\x80\x05": ("is a pickle, which is code", _AS_TEXT),
    b"BZh": ("is compressed with bzip2", "decompress it, or compress it with gzip or zstd"),
    b"\xfd7zXZ": ("is compressed with xz", "decompress it, or compress it with gzip or zstd"),
    b"7z\xbc\xaf": ("is a 7z archive", "unpack it"),
    b"%PDF": ("is a PDF", "give its text in rows"),
    b"\xff\xfe": ("is no UTF-8 but UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("is no UTF-8 but UTF-16", "save it as UTF-8"),
}


def format_of(path: Path) -> Format:
    """How a file or folder holds rows. Raises UnreadableError where it is nothing that is known, OSError as `open`."""
    if path.is_dir():
        return Format("datasets' save_to_disk", lambda folder: saved_rows(folder, None))
    with opened(path) as file:
        head = file.read(_HEAD)
    packed = next((name for mark, (name, _) in COMPRESSIONS.items() if head.startswith(mark)), None)
    if packed:
        with _damage(path), _unpacked(path) as stream:
            head = stream.read(_HEAD)
    for mark, (what, remedy) in REFUSED.items():
        if head.startswith(mark):
            raise UnreadableError(what, remedy, str(path))
    known = next((kind for mark, kind in BINARY.items() if head.startswith(mark)), None)
    if known is not None and packed:
        raise UnreadableError(f"is {known.title} compressed once more with {packed}", "decompress it", str(path))
    return known or _text_format(path, head.removeprefix(_MARK).lstrip(), packed)


def _text_format(path: Path, head: bytes, packed: str | None) -> Format:
    suffix = next((ending for ending in (suffix.lower() for suffix in path.suffixes) if ending in TABLES), None)
    beside = f" ({packed})" if packed else ""
    if not _NO_TEXT.isdisjoint(head):
        raise UnreadableError("is no text, and no known format of rows", _AS_TEXT, str(path))
    if head.startswith(b"["):
        return Format(f"a JSON array{beside}", lambda file: _streamed(file, array))
    if suffix and not head.startswith(b"{"):
        return Format(f"{TABLES[suffix]}{beside}", lambda file: _streamed(file, table))
    if head.split(b"\n", 1)[0].rstrip() == b"{":
        remedy = "save its list of rows as a JSON array, or one row a line"
        raise UnreadableError("is one JSON object over several lines, not rows", remedy, str(path))
    if head and not head.startswith(b"{") and any(ending.lower() in _PROSE for ending in path.suffixes):
        raise UnreadableError("is running text, not rows", 'one JSON object a line: {"text": "..."}', str(path))
    return Format(f"JSON lines{beside}", (lambda file: _streamed(file, lines)) if packed else json_lines)


def rows_in(path: Path, split: str) -> Iterator[Any]:
    """The rows of a file, or of a split of a folder; in place of one that cannot be read the UnreadableError.

    Raises UnreadableError, OSError as `open` does.
    """
    yield from saved_rows(path, split) if path.is_dir() else format_of(path).rows(path)


def is_json_lines(path: Path) -> bool:
    """Whether a path is a file of JSON lines that is not compressed."""
    try:
        return format_of(path).rows is json_lines
    except (UnreadableError, OSError):
        return False


def files_of(path: Path, split: str) -> list[Path]:
    """The files behind `rows_in`. Raises as it does."""
    return saved_files(path, split) if path.is_dir() else [path]


def _streamed(path: Path, read: Callable[[BinaryIO, Path], Iterator[Any]]) -> Iterator[Any]:
    """Rows of a text."""
    with _damage(path), _unpacked(path) as stream:
        yield from read(stream, path)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What decompression raises is about the file; what the system raises has a number."""
    try:
        yield
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableError(f"is damaged: {str(error).strip()}", "get it again", str(path)) from None


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a text, decompressed if need be."""
    with opened(path) as file:
        head = file.read(4)
        file.seek(0)
        yield next((unpack(file) for mark, (_, unpack) in COMPRESSIONS.items() if head.startswith(mark)), file)
