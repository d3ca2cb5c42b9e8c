"""Which fields of a run's file are paths: `${NAME}` is replaced in these and nowhere else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpift.errors import Problem

_VARIABLE = re.compile(r"\$\{(\w+)\}")
# Inputs start from the config's folder and have to be there; `*`: any number of the list.
_INPUTS = ("model.path", "model.gguf.file", "tasks.*.train.file", "tasks.*.test.file", "tasks.*.checkpoint.path")
_PLACES = ("output", "resources.storage")  # where results go: as they are
_SOURCE = "backbone.source"  # an input if there is such a folder, otherwise a word or a hub id


def is_path(field: str) -> bool:
    """Whether a field, by its dotted name, holds a path."""
    name = re.sub(r"\.\d+(?=\.|$)", ".*", field)
    return name in (*_INPUTS, *_PLACES, _SOURCE)


def expanded(value: str) -> tuple[str, list[str]]:
    """A path with `${NAME}` replaced from the environment, and the names that are not there."""
    missing = [name for name in _VARIABLE.findall(value) if name not in os.environ]
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value), missing


def resolve_paths(raw: dict[str, Any], folder: Path) -> Iterator[Problem]:
    """Replace variables and make inputs absolute, from `folder` on, in place."""
    for section, key, field in list(_texts(raw)):
        if not is_path(field):
            continue
        value, missing = expanded(section[key])
        for name in missing:
            yield Problem(field, f"the environment has no variable {name}", f"export {name}=... first")
        packaged = field == "model.gguf.file" and section.get("package") is not None
        section[key] = value
        if missing or packaged or field in _PLACES:
            continue
        try:
            path = (folder / Path(value).expanduser()).resolve()
            if path.exists() or field != _SOURCE:
                section[key] = str(path)
            if not path.exists() and field != _SOURCE:
                yield Problem(field, f"there is no such file or folder: {path}", "check the path")
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, the home of nobody
            yield Problem(field, f"{value!r} is no usable path ({error})", "check the path")


def _texts(node: Any, where: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every text of a nested structure: what holds it, its key or place, its dotted name."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        field = f"{where}.{key}" if where else str(key)
        if isinstance(value, str):
            yield node, key, field
        else:
            yield from _texts(value, field)
