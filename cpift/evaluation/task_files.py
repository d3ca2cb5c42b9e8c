"""lm-eval's task files in a folder of the user's: what in them would run code, before lm-eval reads any.

lm-eval reads every *.yaml below the folder with a loader that builds whatever Python object a tag names, imports what
`!function` names, and has the library evaluate fetch a metric that it does not know: code from the hub.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

import yaml

from cpift.errors import Problem
from cpift.untrusted.json import UnreadableError
from cpift.untrusted.yaml import nodes_of

_DATA = "tag:yaml.org,2002:"
_KINDS = (
    *("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp", "value", "binary", "set", "omap"),
)
_FUNCTION = "!function"
_OFF = ("false", "no", "off", "null", "~", "")
# Fields that have code run wherever they stand, unless they are off.
_SWITCHES = {
    "trust_remote_code": "has a data set's own code run",
    "hf_evaluate": "has a metric's code from the hub run",
    "unsafe_code": "has what the model writes run",
}
_ALLOW = "read the Python files that it names; where you trust them, give --task-code"
_NEVER = "remove it: such code is never run"


def task_file_problems(folder: Path, metrics: Container[str], functions: bool) -> list[Problem]:
    """What in the task files below a folder, and in those that they include, would run code.

    metrics: the names that lm-eval has; functions: whether what `!function` names may run.
    """
    problems, seen = list[Problem](), set[Path]()
    waiting = sorted(file for file in _files(folder) if file.suffix == ".yaml")
    while waiting:
        file = waiting.pop()
        if file.resolve() not in seen:
            seen.add(file.resolve())
            try:
                for name, node in nodes_of(file):
                    problems += _problems(file, name, node, metrics, functions)
                    if name == "include" and isinstance(node, yaml.ScalarNode):
                        waiting += _included(file, node.value)
            except UnreadableError as error:
                problems.append(Problem(str(file), str(error)))
            except OSError as error:
                problems.append(Problem(str(file), error.strerror or str(error), "check the path"))
    return problems


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _included(file: Path, text: str) -> list[Path]:
    """Where releases of lm-eval look for it: beside the file, and some from the working directory first."""
    here, beside = Path(text), file.parent / text
    return [path for path in (here, beside) if path.is_file()] or [beside]


def _problems(file: Path, name: str, node: yaml.Node, metrics: Container[str], functions: bool) -> Iterator[Problem]:
    where = f"{file}, line {node.start_mark.line + 1}"
    value = str(node.value) if isinstance(node, yaml.ScalarNode) else None
    if node.tag == _FUNCTION:
        if not functions:
            yield Problem(where, f"{name}: !function {value} is Python code", _ALLOW)
    elif not node.tag.startswith(_DATA) or node.tag.removeprefix(_DATA) not in _KINDS:
        yield Problem(where, f"{name}: the tag {node.tag.replace(_DATA, '!!')} stands for a Python object", _NEVER)
    elif name == "class" and value is not None and not functions:
        yield Problem(where, f"class {value} is Python code", _ALLOW)
    elif name in _SWITCHES and (value is None or value.lower() not in _OFF):
        yield Problem(where, f"{name} {_SWITCHES[name]}", _NEVER)
    elif name == "metric" and value is not None and value not in metrics and not functions:
        what = f"{value!r} is no metric of lm-eval, which would fetch code of that name from the hub"
        yield Problem(where, what, "name one of lm-eval's; where a function of yours registers it, give --task-code")
