"""Facts that are slow to find out, kept in the user's cache folder: what the second `plan` need not ask again.

A fact is a JSON value that follows from its inputs, from cpift's code and from the releases of the libraries that are
asked. All three decide the name of its file, so an entry is never stale. A cache that is damaged or cannot be written
costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

# Libraries whose code decides a fact: distribution → its package.
LIBRARIES = {
    "transformers": "transformers",
    "torch": "torch",
    "tokenizers": "tokenizers",
    "Jinja2": "jinja2",
    "gguf": "gguf",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
}
ENTRIES = 2000  # files in the folder; where there are more, the oldest half goes


def remembered(what: str, of: Any, find: Callable[[], Any], holds: Callable[[Any], bool] = lambda value: True) -> Any:
    """`find()`, or what it returned before for the same `what`, `of`, cpift and libraries; as JSON gives it back.

    of: everything that decides the value, as JSON. holds: whether a value may be kept, and an entry be taken.
    What `find` raises is passed on, and nothing is kept.
    """
    file = _file(what, of)
    if file is None:
        return json.loads(json.dumps(find()))
    value, known = _read(file)
    if known and holds(value):
        return value
    value = json.loads(json.dumps(find()))
    if holds(value):
        _write(file, value)
    return value


def recalled(what: str, of: Any) -> Any:
    """What `remembered` kept, or None."""
    file = _file(what, of)
    return None if file is None else _read(file)[0]


def replace_fact(what: str, of: Any, value: Any) -> None:
    """Keep a value in place of what was kept before: of something measured, which no call finds out again."""
    file = _file(what, of)
    if file is not None:
        _write(file, value)


def folder() -> Path | None:
    """Where facts are kept: in $XDG_CACHE_HOME, else in ~/.cache; None where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cpift" / "facts"
    except RuntimeError:
        return None


@lru_cache(maxsize=1)
def releases() -> tuple[str, ...] | None:
    """The libraries' versions; None where somebody works on one of them, so that its version says nothing."""
    parts = [sys.version]
    for name, package in LIBRARIES.items():
        try:
            spec = importlib.util.find_spec(package)
            parts.append(f"{name} {importlib.metadata.version(name) if spec else 'absent'}")
            place = importlib.metadata.distribution(name).locate_file(package) if spec else None
        except (importlib.metadata.PackageNotFoundError, ValueError):  # a package without a record of its release
            return None
        if spec and (not spec.origin or Path(spec.origin).parent != Path(str(place))):
            return None
    return tuple(parts)


@lru_cache(maxsize=1)
def code() -> str:
    """sha256 (hex) of cpift's own source."""
    state = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def _file(what: str, of: Any) -> Path | None:
    where, versions = folder(), releases()
    if where is None or versions is None:
        return None
    return where / f"{_sha256([what, of, code(), *versions])}.json"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> tuple[Any, bool]:
    """The value of an entry, and whether it is whole."""
    try:
        entry = json.loads(file.read_bytes())
        return entry["value"], bool(entry["sha256"] == _sha256([file.name, entry["value"]]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, False


def _write(file: Path, value: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps({"sha256": _sha256([file.name, value]), "value": value}), encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        _thin_out(file.parent)


def _thin_out(where: Path) -> None:
    files = list(where.iterdir())
    if len(files) > ENTRIES:
        for path in sorted(files, key=lambda path: path.stat().st_mtime)[: len(files) // 2]:
            path.unlink(missing_ok=True)
