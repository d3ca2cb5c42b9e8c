"""Hashes of files, and JSON and text on the disk that no reader meets half-written."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpift.errors import CpiftError, naming
from cpift.untrusted.json import RECORD
from cpift.untrusted.json import read_json as read_untrusted

SOURCE_TREE = Path(__file__).resolve().parents[2]  # where cpift runs from a clone: pyproject.toml, benchmarks/

MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-serialisable value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes; read once as long as the file stays as it is, whatever its names."""
    known = file_identity(path)
    if known not in _SHA256:
        with path.open("rb") as file:
            sha256 = (
                hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunked(file)
            )
        _SHA256[known] = sha256
    return _SHA256[known]


def remember_sha256(path: Path, value: str) -> None:
    """Tell `file_sha256` of a file whose bytes were hashed as they were written."""
    _SHA256[file_identity(path)] = value


def file_identity(path: Path) -> tuple[int, ...]:
    """What changes when a file's bytes change, by whatever means: device, inode, size, and both of its times in ns.

    The last, of the change of its inode, cannot be set back by those who set back the first.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def known_sha256(identity: tuple[int, ...]) -> str | None:
    """The sha256 that a file of this identity was found or told to have, None if it was not read yet."""
    return _SHA256.get(identity)


_SHA256: dict[tuple[int, ...], str] = {}


def _chunked(file: Any) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder by its relative name, the manifest itself apart."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary neighbour, so that a reader never meets half a file."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A value as it is written to files."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write through a temporary neighbour and flush it to the disk before the rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming(path, len(text)):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def folder_made(place: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `place`, a user's, when the block ends; after an error nothing is
    left. Until then it lies beside that under a name that nobody else has. Raises CpiftError where none can be made."""
    partial = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CpiftError(f"{partial.parent}: no folder can be made there ({error.strerror}) → give another") from error
    try:
        yield partial
        os.rename(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links; its hash is known as before."""
    known = _SHA256.get(file_identity(source))
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return
    if known is not None:
        remember_sha256(target, known)  # a further name changes the inode's time


def link_folder(source: Path, target: Path) -> None:
    """Second names for all files of a folder, as `link_or_copy` gives them; `target` appears when it is whole."""
    partial = target.with_name(f".{target.name}.partial")
    for left in (partial, target):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=lambda one, other: link_or_copy(Path(one), Path(other)))
    os.rename(partial, target)


def is_json(path: Path) -> bool:
    """Whether a file is there and holds a JSON object."""
    try:
        return isinstance(read_json(path), dict)
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> Any:
    """What cpift wrote. Raises UnreadableError naming a damaged file, OSError where it cannot be opened."""
    return read_untrusted(path, RECORD)
