"""Values of a file as it was read, before anything is known of them: what they are called, and as a command's words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Raw = Mapping[str, Any]
TO_FILL = ("DATA", "DATA...", "MODEL")  # stand in a command for what a file does not say
_POWER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


def kind_of(value: Any) -> str:
    """What a value of a file is called."""
    kinds = {dict: "fields", list: "a list", tuple: "a list", str: "a text", bool: "true or false", type(None): "empty"}
    return next((word for kind, word in kinds.items() if isinstance(value, kind)), "a number")


def number_meant(value: Any) -> Any:
    """The number that a text like 1e-3 is meant as, which YAML 1.1 takes for a text; all else as it is."""
    return float(value) if isinstance(value, str) and _POWER.fullmatch(value) else value


def numbers_meant(value: Any) -> Any:
    """`number_meant` of a number, a gradient, or cases with a `value`: their filters stay texts."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(numbers_meant, value))
    if isinstance(value, Mapping) and "value" in value:
        return {**value, "value": numbers_meant(value["value"])}
    return number_meant(value)


def is_word(value: Any) -> TypeGuard[str]:
    """Whether a value may stand in a command: a half-written file has nothing, a list or fields in its place."""
    return isinstance(value, str) and bool(value.strip())


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def mapping(value: Any) -> Raw:
    """A mapping, or an empty one for what is none."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> list[Raw]:
    """The mappings in a list; nothing of what is no list."""
    return [mapping(element) for element in value] if is_list(value) else []


def command(words: Sequence[str]) -> str:
    """Words as a shell takes them."""
    return " ".join(word if word in TO_FILL else shlex.quote(word) for word in words)
