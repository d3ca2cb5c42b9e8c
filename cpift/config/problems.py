"""What pydantic finds wrong with the fields of a file, in our words: the field, the value, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cpift.errors import Problem
from cpift.text.redaction import holds_secret
from cpift.untrusted.values import kind_of

Details = Mapping[str, Any]


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Everything that an error of `model` holds; not that a list is short, where its elements are wrong."""
    faults = error.errors(include_url=False)
    meant = [fault for fault in faults if not (fault["type"] == "too_short" and _elements_fail(fault["loc"], faults))]
    return [_problem(details, model) for details in meant]


def _elements_fail(location: Sequence[Any], faults: Sequence[Any]) -> bool:
    return any(fault["loc"][: len(location)] == location and len(fault["loc"]) > len(location) for fault in faults)


def _problem(details: Details, model: type[BaseModel]) -> Problem:
    # A union adds the tried type's name to the path; such parts are no fields of the file.
    location = [str(part) for part in details["loc"] if not re.search(r"[\[(]|^(float|int|literal)$", str(part))]
    location = location or [str(part) for part in details["loc"][-1:]]
    where = ".".join(location)
    if details["type"] == "extra_forbidden":
        return Problem(where, "is not a field", _remedy(location[-1], _fields_at(location[:-1], model), model))
    if details["type"] == "missing":
        return Problem(where, "is required", "add it")
    if details.get("input", "") is None:
        return Problem(where, "is empty", "give it a value, or leave it out")
    say = _WORDS.get(details["type"])
    what, remedy = say(details, _fields_at(location, model)) if say else (_plain(details["msg"]), "")
    if not where:  # of the whole file: the message says which field
        where, _, rest = what.partition(": ") if re.match(r"[\w.-]+: ", what) else ("fields", "", what)
        return Problem(where, rest, remedy)
    return Problem(where, _value(details) + what, remedy)


def _value(details: Details) -> str:
    """What was given, as it is shown before what is wrong with it; nothing for whole sections."""
    value = details.get("input")
    shows = not isinstance(value, (dict, list, tuple, BaseModel)) and not holds_secret(str(value))
    return f"{value!r}: " if shows else ""


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _remedy(word: str, known: Sequence[str], model: type[BaseModel]) -> str:
    """For a name that is no field: one that is spelt alike, the sections that have it, or all fields there are."""
    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean '{close[0]}'?"
    homes = [name for name in model.model_fields if word in _fields_at([name], model) and name != word]
    return f"belongs under {', '.join(homes)}" if homes else f"known: {', '.join(known)}"


def _section(details: Details, fields: Sequence[str]) -> tuple[str, str]:
    example = f", for example {fields[0]}: …" if fields else ""
    known = f"known: {', '.join(fields)}" if fields else ""
    return f"is {kind_of(details.get('input'))} where fields belong{example}", known


def _list(details: Details, fields: Sequence[str]) -> tuple[str, str]:
    return f"is {kind_of(details.get('input'))} where a list belongs", "write [a, b], or `- a` on a line for each"


def _text(details: Details, fields: Sequence[str]) -> tuple[str, str]:
    return f"is {kind_of(details.get('input'))} where a text belongs", "put it in quotes"


def _number(kind: str) -> Callable[[Details, Sequence[str]], tuple[str, str]]:
    def say(details: Details, fields: Sequence[str]) -> tuple[str, str]:
        percent = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(details.get("input")))
        return f"is no {kind}", _fraction(float(percent[1])) if percent else ""

    return say


def _fraction(percent: float) -> str:
    return f"a fraction: {percent:g} % is {percent / 100:g}"


def _literal(details: Details, fields: Sequence[str]) -> tuple[str, str]:
    words = re.findall(r"'([^']*)'", str(details["ctx"]["expected"]))
    close = difflib.get_close_matches(str(details.get("input")), words, n=1)
    return f"is none of {', '.join(words)}", f"did you mean '{close[0]}'?" if close else ""


def _bound(words: str, name: str) -> Callable[[Details, Sequence[str]], tuple[str, str]]:
    def say(details: Details, fields: Sequence[str]) -> tuple[str, str]:
        value, limit = details.get("input"), details["ctx"][name]
        percent = name == "le" and limit == 1 and isinstance(value, (int, float)) and 1 < value <= 100
        fraction = percent and details["loc"][-1] in _FRACTIONS
        return f"{words} {limit:g}", _fraction(float(value)) if fraction and value else ""

    return say


def _length(words: str, name: str, unit: str) -> Callable[[Details, Sequence[str]], tuple[str, str]]:
    def say(details: Details, fields: Sequence[str]) -> tuple[str, str]:
        count = details["ctx"][name]
        return f"{words} {count} {unit}{'s' * (count != 1)}", ""

    return say


_FRACTIONS = ("p", "density", "warmup_ratio")  # what people give in percent
# What pydantic calls it: what is wrong and the remedy, from its details and the fields that belong there.
_WORDS: Mapping[str, Callable[[Details, Sequence[str]], tuple[str, str]]] = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type", "dataclass_type", "mapping_type"), _section),
    **dict.fromkeys(("tuple_type", "list_type"), _list),
    **dict.fromkeys(("string_type", "path_type"), _text),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), _number("whole number")),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), _number("number")),
    **dict.fromkeys(("bool_parsing", "bool_type"), lambda details, fields: ("is neither true nor false", "")),
    "literal_error": _literal,
    "less_than_equal": _bound("may be at most", "le"),
    "less_than": _bound("must be below", "lt"),
    "greater_than_equal": _bound("must be at least", "ge"),
    "greater_than": _bound("must be above", "gt"),
    "too_short": _length("needs at least", "min_length", "element"),
    "too_long": _length("may have at most", "max_length", "element"),
    "string_too_short": _length("needs at least", "min_length", "character"),
    "string_too_long": _length("may have at most", "max_length", "character"),
}


def _fields_at(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Names of the fields that the config allows at a dotted path."""
    model: Any = root
    for part in location:
        if part.isdigit() or part not in getattr(model, "model_fields", {}):
            continue
        model = _section_of(model.model_fields[part].annotation)
    return list(getattr(model, "model_fields", {}))


def _section_of(annotation: Any) -> Any:
    """The pydantic model inside an annotation such as `tuple[TaskConfig, ...]` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for arg in get_args(annotation) if (section := _section_of(arg)) is not None), None)
