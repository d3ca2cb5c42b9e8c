"""Numbers of a merge that may differ from tensor to tensor.

Each is one number, a gradient over layers, or cases by filter:

weight: 0.4                                                    # everywhere
weight: [0.2, 0.8]                                             # from the first layer to the last, in a line
weight: [{filter: self_attn, value: [0.2, 0.8]}, {value: 0.4}]  # the first case whose filter a name holds
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from cpift.untrusted.values import kind_of, numbers_meant

_Case = dict[str, str | float | tuple[float, ...]]
Plain = float | tuple[float | _Case, ...]
MOST = 1000  # numbers of a gradient, and cases
_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.")
# Of tensors outside of layers those before them; `embed_out` is an output layer.
BEFORE_LAYERS = re.compile(r"embed(?!_out)|wte|wpe|project_in", re.IGNORECASE)
_EXAMPLE = "give a number, a list of numbers, or a list of {filter: text, value: number or list}"


def setting(above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Any:
    """The type of such a field, whose numbers all lie within the bounds."""

    def checked(value: Any) -> Any:
        value = numbers_meant(value)
        for number in _numbers(value):
            if not above < number or not least <= number <= most:
                bounds = [f"above {above:g}"] if above > -math.inf else []
                bounds += [f"at least {least:g}"] if least > -math.inf else []
                bounds += [f"at most {most:g}"] if most < math.inf else []
                percent = f"; a fraction: {number:g} % is {number / 100:g}" if most == 1 < number <= 100 else ""
                which = f"{number:g} " if isinstance(value, (list, tuple)) else ""
                raise ValueError(f"{which}has to be {' and '.join(bounds)}{percent}")
        return value

    return BeforeValidator(checked, json_schema_input_type=Plain)


if TYPE_CHECKING:  # what a method reads of them: at each tensor they are numbers
    Setting = float
    Share = float
    Blend = float
else:
    Setting = Annotated[Plain, setting()]
    Share = Annotated[Plain, setting(above=0, most=1)]
    Blend = Annotated[Plain, setting(least=0, most=1)]


def _numbers(value: Any) -> Iterator[float]:
    """Every number of a value that is well formed. Raises ValueError."""
    if not isinstance(value, (list, tuple)):
        yield _number(value)
        return
    if not 0 < len(value) <= MOST:
        raise ValueError(f"has {len(value):,} entries, and 1 to {MOST:,} are taken; {_EXAMPLE}")
    if not any(isinstance(one, Mapping) for one in value):
        yield from map(_number, value)
        return
    for one in value:
        yield from _of_case(one)
    if any(one.get("filter") is None for one in value[:-1]):
        raise ValueError("has a case without `filter` before its end: those after it are never met; put it last")


def _of_case(case: Any) -> Iterator[float]:
    if not isinstance(case, Mapping):
        raise ValueError(f"has {kind_of(case)} among cases; {_EXAMPLE}")
    if unknown := set(case) - {"filter", "value"}:
        raise ValueError(f"has a case with {', '.join(map(repr, sorted(unknown)))}; a case has `filter` and `value`")
    if "value" not in case:
        raise ValueError("has a case without `value`; give a number, or a list of numbers")
    pattern = case.get("filter", "*")
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"has a filter that is {kind_of(pattern)}; give a part of tensor names, for example self_attn")
    if isinstance(case["value"], (list, tuple)) and any(isinstance(one, Mapping) for one in case["value"]):
        raise ValueError("has cases inside a case; give a number, or a list of numbers")
    yield from _numbers(case["value"])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        shown = f"{value!r} " if isinstance(value, (str, float)) else ""
        raise ValueError(f"{shown}is {kind_of(value)} where a number belongs; {_EXAMPLE}")
    return float(value)


def varies(value: object) -> bool:
    """Whether it is more than one number for everything."""
    return isinstance(value, (list, tuple))


def value_at(value: Any, name: str, place: float) -> float | None:
    """The number at a tensor that lies at `place`, 0 for the first layer and 1 for the last; None if no case fits."""
    if not isinstance(value, (list, tuple)):
        return float(value)
    if not any(isinstance(one, Mapping) for one in value):
        return _between([float(one) for one in value], place)
    for case in value:
        if isinstance(case, Mapping) and fits(str(case.get("filter", "*")), name):
            return value_at(case["value"], name, place)
    return None


def fits(pattern: str, name: str) -> bool:
    """Whether a filter means a tensor: it stands in its name; `*` means all."""
    return pattern == "*" or pattern in name


def met(value: Any, names: Sequence[str]) -> Any:
    """A setting without the cases whose filter is in none of these names; as it is where there are no names."""
    if not names or not filters_of(value):
        return value
    return tuple(case for case in value if any(fits(str(case.get("filter", "*")), name) for name in names))


def filters_of(value: Any) -> list[str]:
    """The filters of its cases."""
    cases = value if isinstance(value, (list, tuple)) else ()
    return [str(case["filter"]) for case in cases if isinstance(case, Mapping) and "filter" in case]


def shown_setting(value: Any) -> str:
    """As people read it."""
    if not isinstance(value, (list, tuple)):
        return f"{value:g}"
    if not any(isinstance(one, Mapping) for one in value):
        return " … ".join(f"{one:g}" for one in value)
    cases = [case for case in value if isinstance(case, Mapping)]
    parts = [f"{case.get('filter', 'else')} {shown_setting(case['value'])}" for case in cases]
    return f"({'; '.join(parts)})"


def _between(points: Sequence[float], place: float) -> float:
    at = place * (len(points) - 1)
    low = min(int(at), len(points) - 1)
    high = min(low + 1, len(points) - 1)
    return points[low] + (at - low) * (points[high] - points[low])


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers that a tensor belongs to, and its layer there; None outside of layers."""
    found = _LAYER.match(name)
    return (name[: found.start(1)], int(found[1])) if found else None


def places_of(names: Iterable[str], first: int = 0) -> dict[str, float]:
    """Where each tensor lies, from 0 for its stack's layer `first` to 1 for the last. Outside of layers embeddings are
    at 0, all else (the last norm, the output layer) at 1."""
    layers = {name: layer_of(name) for name in names}
    last: dict[str, int] = {}
    for found in filter(None, layers.values()):
        last[found[0]] = max(last.get(found[0], 0), found[1])
    return {
        name: (found[1] - first) / max(last[found[0]] - first, 1)
        if found
        else 0.0
        if BEFORE_LAYERS.search(name)
        else 1.0
        for name, found in layers.items()
    }


def unmet(value: object, names: Sequence[str]) -> list[tuple[str, str]]:
    """What is wrong with a setting for a model of these tensors, and the remedy."""
    if not names:
        return []
    idle = [one for one in filters_of(value) if not any(fits(one, name) for name in names)]
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    shown = ", ".join(itertools.islice(parts, 12))
    found = [(f"the filter {one!r} is in no tensor's name", f"names are made of {shown}, …") for one in idle]
    if not found and (open_ones := [name for name in names if value_at(value, name, 0.0) is None]):
        what = f"says nothing of {len(open_ones)} tensors ({', '.join(open_ones[:2])}, …)"
        found.append((what, "add a last case without `filter`: {value: …}"))
    return found
