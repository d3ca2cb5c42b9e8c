"""The classes that a config is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel


def sections(root: type[BaseModel]) -> set[type[BaseModel]]:
    """A section and all inside it."""

    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for part in get_args(annotation):
            yield from inside(part)

    found, open_ones = set(), {root}
    while open_ones:
        one = open_ones.pop()
        found.add(one)
        open_ones |= {part for field in one.model_fields.values() for part in inside(field.annotation)} - found
    return found
