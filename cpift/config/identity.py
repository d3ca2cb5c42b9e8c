"""Which fields of a config name which outputs. Every field says it beside itself, with `identity`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

# What a field may be part of the identity of. `merge` is the fused model of another method than cpift's; `sweep` the
# record of which points a sweep tried; all others are stages.
NAMED = ("model", "probe", "regions", "group", "backbone", "fuse", "merge", "integrate", "evaluate", "sweep")
FITS = ("probe", "backbone", "integrate")
ROWS = (*FITS, "evaluate")
GIVEN = ("regions", "fuse", "merge")
_ALWAYS = object()


def identity(*named: str, by: str = "", absent: Any = _ALWAYS, swept: bool = False) -> dict[str, Any]:
    """Beside every field, in its `Field(...)`: what it is part of the identity of, that is which outputs get
    another name when it changes. Nothing: none of them.

    A field that is newer than artifacts that people keep has `absent`, the value that stands for what was done before
    there was the field (its default on that day): with this value it is left out of the fingerprint, so that what was
    finished keeps its name. A later change of the default leaves `absent` as it is.

    Args:
        by: through what it counts, where not as itself: what it points at, or what is computed from it.
        absent: see above.
        swept: records of sweeps had the field before it had `absent`.
    """
    if unknown := set(named) - set(NAMED):
        raise TypeError(f"identity: {', '.join(sorted(unknown))} is none of {', '.join(NAMED)}")
    later = {} if absent is _ALWAYS else {"absent": json.loads(json.dumps(absent))}
    return {"json_schema_extra": {"identity": {"named": named, "by": by, "swept": swept, **later}}}


def identity_of(section: BaseModel, named: str) -> dict[str, Any]:
    """The fields of a section, and of those inside it, that are part of the identity of one of `NAMED` as themselves.

    Raises TypeError for a field that does not say what it is part of.
    """
    return _kept(section, lambda mark: named in mark["named"] and not mark["by"])


def recorded(section: BaseModel) -> dict[str, Any]:
    """All fields, whatever they are part of, less those with the value that stands for a time before them: what the
    record of a sweep is named by."""
    return _kept(section, lambda mark: True, of_sweeps=True)


def marks_of(section: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """What every field of a section says with `identity`. Raises TypeError for one that says nothing."""
    marks = {}
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "identity" not in extra:
            raise TypeError(f"{section.__name__}.{name}: say with **identity(...) what it is part of")
        marks[name] = extra["identity"]
    return marks  # type: ignore[return-value]  # pydantic: a dict of any JSON


def _kept(section: BaseModel, wanted: Callable[[dict[str, Any]], bool], of_sweeps: bool = False) -> dict[str, Any]:
    dumped, fields = section.model_dump(mode="json"), {}
    for name, mark in marks_of(type(section)).items():
        older = dumped[name] == mark.get("absent", _ALWAYS) and not (of_sweeps and mark["swept"])
        if wanted(mark) and not older:
            fields[name] = _plain(getattr(section, name), dumped[name], wanted, of_sweeps)
    return fields


def _plain(value: Any, dumped: Any, wanted: Callable[[dict[str, Any]], bool], of_sweeps: bool) -> Any:
    """A field's value as JSON has it (`dumped`), of sections inside it what is wanted."""
    if isinstance(value, BaseModel):
        return _kept(value, wanted, of_sweeps)
    if isinstance(value, tuple):
        return [_plain(element, plain, wanted, of_sweeps) for element, plain in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {name: _plain(element, dumped[name], wanted, of_sweeps) for name, element in value.items()}
    return dumped
