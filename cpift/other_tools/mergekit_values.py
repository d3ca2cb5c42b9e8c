"""Values of mergekit's parameters: of the nearest place that has them, cases by filter falling through to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cpift.errors import Problem
from cpift.untrusted.values import Raw, is_list, kind_of, number_meant, numbers_meant

Place = tuple[str, Raw]  # where parameters stand in the file, and they themselves
_CASES = "give a number, a list of numbers over the layers, or cases {filter: …, value: …}"


def setting(problems: list[Problem], name: str, places: Sequence[Place]) -> Any:
    """A number, a gradient, or cases, the nearest first; None where no place has it. What is wrong goes to problems."""
    cases: list[Any] = []
    for where, given in places:
        value = numbers_meant(given.get(name))
        if value is None:
            continue
        if wrong := _wrong(value):
            problems.append(Problem(f"{where}.{name}", wrong, _CASES))
            return None
        if not (is_list(value) and isinstance(value[0], dict)):
            return [*cases, {"value": value}] if cases else value
        for one in value:
            cases.append({key: one[key] for key in ("filter", "value") if one.get(key) is not None})
            if one.get("filter") in (None, "*"):
                return cases
    return cases or None


def _wrong(value: Any) -> str:
    """What is wrong with a value; nothing if it is well formed."""
    if not is_list(value):
        return "" if _is_number(value) else f"is {kind_of(value)}"
    if not value:
        return "is an empty list"
    if not any(isinstance(one, dict) for one in value):
        return "" if all(map(_is_number, value)) else "is a list with more than numbers in it"
    for one in value:
        if not isinstance(one, dict) or "value" not in one or set(one) - {"filter", "value"}:
            return f"has {one!r:.60} among its cases"
        if not isinstance(one.get("filter"), (str, type(None))) or _wrong(one["value"]) or _has_cases(one["value"]):
            return f"has a case that cannot be read, {one!r:.60}"
    return ""


def _has_cases(value: Any) -> bool:
    return is_list(value) and any(isinstance(one, dict) for one in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flag(problems: list[Problem], name: str, places: Sequence[Place]) -> bool | None:
    """True or false, as such or as 1 and 0."""
    where, value = _nearest(name, places)
    if value is None or value in (True, False, 0, 1):
        return None if value is None else bool(value)
    problems.append(Problem(f"{where}.{name}", f"is {value!r:.40}", "give true or false, for the whole merge"))
    return None


def number(problems: list[Problem], name: str, places: Sequence[Place]) -> float | None:
    """One number for the whole merge."""
    where, value = _nearest(name, places)
    value = number_meant(value)
    if value is None or _is_number(value):
        return None if value is None else float(value)
    problems.append(Problem(f"{where}.{name}", f"is {value!r:.40}", "give one number for the whole merge"))
    return None


def _nearest(name: str, places: Sequence[Place]) -> tuple[str, Any]:
    return next(((where, given[name]) for where, given in places if given.get(name) is not None), ("", None))
