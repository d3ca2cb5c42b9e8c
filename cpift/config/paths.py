"""Which fields of a run's file are paths: `${NAME}` is replaced in these and nowhere else.

In a field that is neither a path nor prose (instructions and columns, which have signs of their own) it is refused: it
would be taken as it stands, and was meant as something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cpift.errors import Problem
from cpift.text.redaction import is_prose, is_template

_VARIABLE = re.compile(r"\$\{(\w+)\}")
PathKind = Literal["model", "rows", "place", "source"]
# Every field that holds a path; `*`: any number of the list. Inputs (a model, rows) start from the config's folder and
# have to be there; a place is where results go, as it is; a source is an input if there is such a file or folder,
# otherwise a word or a hub id.
PATHS: Mapping[str, PathKind] = {
    "model.path": "model",
    "model.gguf.file": "model",
    "model.chat_template": "source",
    "tasks.*.checkpoint.path": "model",
    "tasks.*.moments": "model",
    "tasks.*.train.file": "rows",
    "tasks.*.test.file": "rows",
    "tasks.*.validation.file": "rows",
    "parent.run": "model",
    "parent.tasks.*.checkpoint.path": "model",
    "parent.tasks.*.moments": "model",
    "parent.tasks.*.train.file": "rows",
    "parent.tasks.*.test.file": "rows",
    "parent.tasks.*.validation.file": "rows",
    "backbone.source": "source",
    "output": "place",
    "resources.storage": "place",
}


def path_kind(field: str) -> PathKind | None:
    """What kind of path a field holds, by its dotted name; None if it holds none."""
    return PATHS.get(_shape(field))


def _shape(field: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", field)


def is_path(field: str) -> bool:
    return path_kind(field) is not None


def _is_written_out(field: str, value: str) -> bool:
    return field == "model.chat_template" and is_template(value)


def expanded(value: str) -> tuple[str, list[str]]:
    """A path with `${NAME}` replaced from the environment, and the names that are not there."""
    missing = [name for name in _VARIABLE.findall(value) if name not in os.environ]
    return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value), missing


def resolve_paths(raw: dict[str, Any], folder: Path) -> Iterator[Problem]:
    """Replace variables and make inputs absolute, from `folder` on, in place."""
    problems = list(expand_paths(raw, PATHS))
    yield from problems
    failed = {problem.where for problem in problems}
    for section, key, field in list(texts(raw)):
        kind, value = path_kind(field), section[key]
        if kind in (None, "place") or field in failed or is_packaged(section, field) or _is_written_out(field, value):
            continue
        try:
            path = (folder / Path(value).expanduser()).resolve()
            if path.exists() or kind != "source":
                section[key] = str(path)
            if not path.exists() and kind != "source":
                yield Problem(field, f"there is no such file or folder: {path}", "check the path")
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, the home of nobody
            yield Problem(field, f"{value!r} is no usable path ({error})", "check the path")


def expand_paths(raw: dict[str, Any], paths: Container[str]) -> Iterator[Problem]:
    """Replace variables in these fields of a file, in place; in all others they are a problem, as an empty path is."""
    for section, key, field in list(texts(raw)):
        if _is_written_out(field, section[key]):
            continue
        if _shape(field) in paths:
            section[key], missing = expanded(section[key])
            for name in missing:
                yield Problem(field, f"the environment has no variable {name}", f"export {name}=... first")
            if not section[key]:
                yield Problem(
                    field, "is empty, which is no path", "give one (. is the current folder), or leave it out"
                )
        elif _VARIABLE.search(section[key]) and not is_prose(field):
            what = "holds ${...}, which is replaced in a path alone, and here would be taken as it stands"
            yield Problem(
                field, what, "write the value out; a path belongs into the run's own file, not into a sweep's"
            )


def is_packaged(section: Mapping[str, Any], field: str) -> bool:
    """Whether a path lies inside an installed package, not in a folder."""
    return field == "model.gguf.file" and section.get("package") is not None


def texts(node: Any, where: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every text of a nested structure: what holds it, its key or place, its dotted name."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        field = f"{where}.{key}" if where else str(key)
        if isinstance(value, str):
            yield node, key, field
        else:
            yield from texts(value, field)
