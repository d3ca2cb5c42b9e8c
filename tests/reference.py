"""docs/reference.md: every field, command and public name, from the code: `python -m tests.reference`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

import cpift
from cpift.cli.main import app
from cpift.compare.config import CompareConfig
from cpift.config.run import RunConfig
from cpift.config.settings import Plain
from cpift.evaluation.metrics import METRICS
from cpift.merging.base import MergeMethod
from cpift.merging.conflicts import CONFLICTS
from cpift.merging.registry import METHODS
from cpift.method.measures import MEASURES, SCOPES
from cpift.sweep.config import SweepConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "reference.md"
FILES: Mapping[str, tuple[type[BaseModel], str]] = {
    "run": (RunConfig, "`cpift run`, `plan` and every stage take it. [Quick start](quickstart.md) shows one."),
    "sweep": (SweepConfig, "`cpift sweep` takes it: [Sweeps](sweeps.md)."),
    "comparison": (CompareConfig, "`cpift compare` takes it, or a run's file."),
}
_HEAD = """# Reference

Every field, every command and every public name of Python. `python -m tests.reference` writes this page from the
code.
`cpift schema run`, `sweep` and `compare` print the fields for editors; `cpift COMMAND --help` prints options.
"""
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "any value"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_VALUES = {"Path": "PATH", "int": "NUMBER", "float": "NUMBER"}
_ENTRIES = ("of them", "of them")
_LENGTHS = {True: "min_length", False: "max_length"}
_COUNTED = 2**31  # no field takes a larger number of anything
_EMPTY: tuple[object, ...] = ((), {}, None, "")


def page() -> str:
    """The whole document."""
    files = [_file(name, *of) for name, of in FILES.items()]
    return "\n".join([_HEAD, *files, _metrics(), _methods(), _commands(), _python()]).rstrip() + "\n"


# ---- fields of files -------------------------------------------------------------------------------------------------


def _file(kind: str, model: type[BaseModel], told: str) -> str:
    """All sections of a kind of file. A section that several fields share is shown where it stands first."""
    places: dict[type[BaseModel], str] = {}
    parts = [f"## A {kind}'s file\n\n{told} A field without a default has to be given.\n"]
    for place, section in _sections(model, ""):
        if section not in places:
            places[section] = f"{kind}: {place or 'top level'}"
    for section, title in places.items():
        text = _plain(section.__doc__ or "")
        parts.append(f"### {title}\n\n{text}\n\n{_fields(section, places)}\n" if section.model_fields else "")
    return "\n".join(part for part in parts if part)


def _sections(model: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield place, model
    for name, field in model.model_fields.items():
        for section in _models_in(field.annotation):
            yield from _sections(section, f"{place}.{name}".lstrip("."))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _fields(section: type[BaseModel], places: Mapping[type[BaseModel], str]) -> str:
    """The table of a section's fields, without those that the section that it extends has."""
    parents = [parent for parent in section.__mro__[1:] if parent in places]
    inherited = set(parents[0].model_fields) if parents else set()
    rows = [
        (f"`{name}`", _type(field.annotation, field.metadata, places), _default(field), _meaning(field))
        for name, field in section.model_fields.items()
        if name not in inherited
    ]
    beside = f"All fields of {_link(places[parents[0]])}, and:\n\n" if parents else ""
    return beside + _table(("field", "type", "default", "meaning"), rows)


def _meaning(field: FieldInfo) -> str:
    """Its description; of a section without one what the section says of itself."""
    return _plain(field.description or next((section.__doc__ or "" for section in _models_in(field.annotation)), ""))


def _default(field: FieldInfo) -> str:
    default = _default_of(field)
    if field.is_required() or default in _EMPTY:
        return "" if field.is_required() else "none"
    if isinstance(default, BaseModel):
        changed = {name: value for name, value in default if value != _default_of(type(default).model_fields[name])}
        return f"`{{{', '.join(f'{name}: {_shown(value)}' for name, value in changed.items() if value is not None)}}}`"
    sized = default if any(isinstance(mark, BeforeValidator) for mark in field.metadata) else None
    return f"`{_shown(default) if not isinstance(sized, int) else _size(sized)}`"


def _default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _size(nbytes: int) -> str:
    """Bytes as a file would have them, exactly."""
    units = {2**30: "GiB", 2**20: "MiB", 10**9: "GB", 10**6: "MB", 1: ""}
    unit = next(size for size in units if nbytes % size == 0)
    return f"{nbytes // unit}{units[unit]}"


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, BaseModel):
        return f"{{{', '.join(f'{name}: {_shown(element)}' for name, element in value if element is not None)}}}"
    return f'"{value}"' if value == "*" else f"{value}"


def _type(annotation: Any, marks: Iterable[Any], places: Mapping[type[BaseModel], str]) -> str:
    marks, origin, parts = list(marks), get_origin(annotation), get_args(annotation)
    if any(isinstance(mark, BeforeValidator) for mark in marks) and annotation is int:
        return "bytes, or text such as 512MiB"
    if any(isinstance(mark, BeforeValidator) for mark in marks) and annotation == Plain:
        return "setting"
    if origin is Annotated:
        inner = [part for mark in parts[1:] for part in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return _type(parts[0], [*inner, *marks], places)
    if origin in (Union, UnionType):
        kinds = [_type(part, (), places) for part in parts if part is not NoneType]
        return " or ".join(dict.fromkeys(kinds)) + _bounds(marks)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        each = _type(parts[0], (), places)
        return f"list of {each}{_bounds(marks, _ENTRIES)}" if parts[-1] is Ellipsis else f"pair of {each}"
    if origin is dict:
        return f"mapping of names to {_type(parts[1], (), places)}{_bounds(marks, _ENTRIES)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _link(places[annotation]) if annotation.model_fields else "`{}`"
    return _WORDS[annotation] + _bounds(marks)


def _bounds(marks: Iterable[Any], counted: tuple[str, str] = ("characters", "character")) -> str:
    bounds = []
    for mark in marks:
        for name, sign in _BOUNDS.items():
            bound = getattr(mark, name, None)
            if bound is not None and abs(bound) < _COUNTED:
                bounds.append(f"{sign} {bound:g}")
        if isinstance(mark, annotated_types.MinLen | annotated_types.MaxLen):
            least = isinstance(mark, annotated_types.MinLen)
            bounds.append(
                f"at {'least' if least else 'most'} {(many := getattr(mark, _LENGTHS[least]))} {counted[many == 1]}"
            )
    return f", {', '.join(bounds)}" if bounds else ""


def _link(title: str) -> str:
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return f"[{title.partition(': ')[2]}](#{anchor})"


# ---- tables ----------------------------------------------------------------------------------------------------------


def _metrics() -> str:
    """What `tasks.*.metric` may be."""
    passes = ("", "the loss", "the loss, replies", "the loss, replies, the judge")
    rows = [(f"`{name}`", metric.title, metric.needs, passes[metric.passes]) for name, metric in METRICS.items()]
    own = "Of `tasks.*.metric`; or [one of your own](extending/metric.md), which reads replies."
    table = _table(("metric", "score", "what a row needs beside its prompt", "what is computed"), rows)
    return f"## Metrics\n\n{own}\n\n{table}\n"


def _methods() -> str:
    """What `fusion.method`, `fusion.conflict`, `regions.measure` and `regions.scope` may be."""
    methods = [
        (
            f"`{name}`",
            f"{method.formula} ({method.source})",
            _said(method),
            ", ".join(f"`{field}`" for field in method.fields) or "none",
        )
        for name, method in METHODS.items()
    ]
    rules = [(f"`{name}`", rule.formula) for name, rule in CONFLICTS.items()]
    measures = [(f"`{name}`", measure.formula) for name, measure in MEASURES.items()]
    scopes = [(f"`{name}`", scope.formula) for name, scope in SCOPES.items()]
    return "\n".join(
        [
            "## Ways to merge\n\nOf `fusion.method`, with the fields of `fusion` that each reads; or "
            "[one of your own](extending/merge-method.md).\n",
            _table(("method", "formula", "beside the fine-tunes", "fields"), methods),
            "\nOf `fusion.conflict`: what becomes of an element that is core of several tasks; or "
            "[a rule of your own](extending/conflict-rule.md).\n",
            _table(("rule", "its value"), rules),
            "\nOf `regions.measure`: what is core of a task is the largest of it.\n",
            _table(("measure", "of an element"), measures),
            "\nOf `regions.scope`: among which elements.\n",
            f"{_table(('scope', 'core'), scopes)}\n",
        ]
    )


def _said(method: type[MergeMethod]) -> str:
    """What else decides the result, and how often everything is read before it is written."""
    needs = ["θ0"] * method.needs_base + ["second moments"] * method.needs_moments + ["the seed"] * method.seeded
    return f"{' and '.join(needs) or 'nothing'}; {method.reads + 1} reads"


# ---- commands --------------------------------------------------------------------------------------------------------


def _commands() -> str:
    group = typer.main.get_command(app)
    leaves = list(_leaves(group, "cpift"))
    return "\n".join(["## Commands\n", *(_command(name, command) for name, command in leaves)])


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for word, child in getattr(command, "commands", {}).items():
        yield from _leaves(child, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield name, command


def _command(name: str, command: Any) -> str:
    kinds = {
        parameter.name: str(parameter.annotation)
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values()
    }
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    listed = (param for param in command.params if param.param_type_name == "option" and param.name != "help")
    options = [param for param in listed if not param.hidden]  # other tools' are told in the docs
    usage = " ".join([name, *(_word(argument) for argument in arguments), "[OPTIONS]"])
    rows = [(f"`{_word(argument)}`", _plain(_help(argument))) for argument in arguments]
    rows += [(_flags(option, kinds[option.name]), _plain(_help(option))) for option in options]
    table = f"\n{_table(('', 'what'), rows)}\n" if rows else ""
    return f"### {name}\n\n{_plain(command.help or '')}\n\n```text\n{usage}\n```\n{table}"


def _word(param: Any) -> str:
    """An argument, as the usage has it."""
    name = param.metavar or param.name.upper()
    return name if param.required or name.startswith("[") else f"[{name}]"


def _flags(param: Any, kind: str) -> str:
    """An option's names, with what stands for its value."""
    value = param.metavar or next((word for part, word in _VALUES.items() if part in kind), "TEXT")
    return ", ".join(f"`{name}{'' if param.is_flag else f' {value}'}`" for name in [*param.opts, *param.secondary_opts])


def _help(param: Any) -> str:
    default = param.default
    shown = isinstance(default, (str, int, float, Enum)) and not isinstance(default, bool) and default != ""
    text = param.help or ""
    return f"{text} [default: {default}]" if shown and "[default" not in text else text


# ---- Python ----------------------------------------------------------------------------------------------------------


def _python() -> str:
    names = [name for name in cpift.__all__ if not name.startswith("__")]
    head = "## Python\n\n[Python](python.md) shows each at work; docstrings say more, shapes and errors too.\n"
    return "\n".join([head, *(_public(name, getattr(cpift, name)) for name in names)])


def _public(name: str, value: Any) -> str:
    text = f"### cpift.{name}\n\n{_plain((inspect.getdoc(value) or '').split(chr(10) * 2)[0])}\n"
    if isinstance(value, type) and issubclass(value, Exception):
        return text
    return f"{text}\n```text\n{name}{_signature(value)}\n```\n{_members(value)}"


def _signature(value: Any) -> str:
    """Names, kinds and defaults, one a line where they are many; types are in the source, and editors show them."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(value).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def _members(value: Any) -> str:
    """Public methods and properties of a class, a line each."""
    if not isinstance(value, type):
        return ""
    own = {name: member for name, member in vars(value).items() if not name.startswith("_")}
    rows = [
        (f"`{name}`", _plain(member.__doc__.split("\n\n")[0]))
        for name, member in own.items()
        if (callable(member) or isinstance(member, property | classmethod | staticmethod)) and member.__doc__
    ]
    return f"\n{_table(('member', 'what'), rows)}\n" if rows else ""


# ---- text ------------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Help and docstrings as Markdown: one line a paragraph, without rich's marks; what is no code means nothing."""
    text = re.sub(r"\[/?(?:bold|italic|dim)?\]", "", inspect.cleandoc(text))
    text = re.sub(r"[ \n]*\n[ ]*(?!\n)", lambda match: "\n\n" if match[0].count("\n") > 1 else " ", text)
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*").replace("<", "&lt;") for part in parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
