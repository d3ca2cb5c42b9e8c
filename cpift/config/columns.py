"""`columns`: templates over a row's columns, such as '{question} ({note[by]})'. What a template may hold is closed.

They are read as `str.format` reads them, less everything that reaches further than the row's own values: attributes,
positions without a name, formats inside formats, and widths that would build a text of any size.
"""

from __future__ import annotations

import datetime
import decimal
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

# What a template may build, and whether a lone placeholder takes the column's own value instead of its text.
TARGETS = {"messages": True, "prompt": False, "completion": False, "answer": True, "choices": True, "tools": True}
_TEXTS = (str, bool, int, float, decimal.Decimal, datetime.date, datetime.time)  # a datetime is a date
_FIELD = re.compile(r"[^.\[\]{}]+(?:\[[^\[\]{}]+\])*")
# fill and align, sign, #, 0, width, grouping, precision, type: https://docs.python.org/3/library/string.html
_FORMAT = re.compile(r"(?:.?[<>=^])?[-+ ]?z?#?0?(\d{0,3})[,_]?(?:\.\d{1,3})?[a-zA-Z%]?", re.DOTALL)
_LISTED = "choices"
Template = str | tuple[str, ...]
_OR_EMPTY = "?"  # as a format: nothing where the column is null


class ColumnError(ValueError):
    """A template that cannot be used, or cannot be filled from a row; the message says why, `remedy` what to do."""

    def __init__(self, what: str, remedy: str = ""):
        self.remedy = remedy
        super().__init__(what)


def check_template(name: str, template: Template) -> None:
    """Raise ColumnError for a target that is none, and for a template that a row could not safely fill."""
    if name not in TARGETS:
        raise ColumnError(f"columns.{name} is none of {', '.join(TARGETS)}")
    if not isinstance(template, str):
        if name != _LISTED:
            raise ColumnError(f"columns.{name} is a list; only {_LISTED} may be the same list in every row")
        return
    for _, field, spec, conversion in _parsed(name, template):
        if field is None:
            continue
        if not _FIELD.fullmatch(field) or field.isdigit():
            raise ColumnError(f"columns.{name}: {{{field}}} names no column; write {{column}} or {{column[key]}}")
        if conversion not in (None, "s"):
            raise ColumnError(f"columns.{name}: !{conversion} writes Python's spelling of a value; leave it out")
        if spec != _OR_EMPTY and not _FORMAT.fullmatch(spec or ""):
            raise ColumnError(f"columns.{name}: format {spec!r} is unknown, or wider than 999")


def fill(name: str, template: Template, row: Mapping[str, Any]) -> Any:
    """What a template gives for a row: text; or a column's own value, where it is all of the template and may be one.

    A list is the same in every row. Raises ColumnError: a column is missing, null (unless it is written {column:?}),
    or no text or number.
    """
    if not isinstance(template, str):
        return list(template)
    parts = list(_parsed(name, template))
    if TARGETS[name] and len(parts) == 1 and parts[0][0] == "" and parts[0][1] and not parts[0][2]:
        return _value(name, parts[0][1], row)
    return "".join(
        literal + ("" if field is None else _text(name, field, spec or "", row)) for literal, field, spec, _ in parts
    )


def _parsed(name: str, template: str) -> Iterator[tuple[str, str | None, str | None, str | None]]:
    try:
        yield from string.Formatter().parse(template)
    except ValueError as error:
        raise ColumnError(f"columns.{name}: {template!r} is no template ({error})") from None


def _value(name: str, field: str, row: Mapping[str, Any]) -> Any:
    try:
        return string.Formatter().get_field(field, (), row)[0]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        known = ", ".join(sorted(map(str, row)))
        why = f"{type(error).__name__}: {error}"
        raise ColumnError(f"columns.{name}: '{{{field}}}' cannot be filled ({why}); the row has {known}") from None


def _text(name: str, field: str, spec: str, row: Mapping[str, Any]) -> str:
    value = _value(name, field, row)
    if value is None and spec == _OR_EMPTY:
        return ""
    if value is None:
        remedy = f"write {{{field}:{_OR_EMPTY}}} for nothing in its place"
        raise ColumnError(f"columns.{name}: {{{field}}} is null; {remedy}")
    if not isinstance(value, _TEXTS):
        what = f"{{{field}}} is no text but {type(value).__name__}"
        raise ColumnError(f"columns.{name}: {what}; take one of its values as {{{field}[key]}}")
    try:
        return format(value, "" if spec == _OR_EMPTY else spec)
    except (ValueError, OverflowError) as error:
        raise ColumnError(f"columns.{name}: {{{field}:{spec}}} cannot be filled ({error})") from None
