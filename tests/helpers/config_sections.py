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

    reached, open_ones = set(), {root}
    while open_ones:
        section = open_ones.pop()
        reached.add(section)
        open_ones |= {part for field in section.model_fields.values() for part in inside(field.annotation)} - reached
    return reached
