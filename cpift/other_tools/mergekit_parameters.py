"""Parameters of a mergekit file as fields of `cpift merge`: of whole models, or of each slice of layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from cpift.other_tools.mergekit_models import THETA0, Merge, Method, Source, unknown
from cpift.other_tools.mergekit_values import Place, flag, number, setting

IDLE = {"int8_mask": "cpift's masks take one bit an element"}  # decides nothing but memory
_LERP_BELOW = 0.0316  # radians, where mergekit's slerp takes the straight line: cos > 0.9995
_OURS = {"weight": ("weight", "weights"), "density": ("density", "densities"), "scale": ("weight", "weights")}
_SINGLE = {"t": "t", "normalize": "normalize", "lambda": "scale"}


def told(
    merge: Merge, method: Method, slices: Sequence[Sequence[Source]], shared: Place, of_others: Collection[str]
) -> None:
    """Parameters that are of no use, those of other methods among them, and what the method alone decides."""
    known = dict.fromkeys(
        (*method.by_model, *method.single, *method.numbers, *(one[0] for one in method.others), *IDLE)
    )
    places = [place for sources in slices for one in sources for place in one.places]
    for where, given in [shared, *{id(place): place for place in places}.values()]:
        _unused(merge, method, (where, given), known, of_others)
    merge.fields |= method.begins
    for name, ours in method.numbers.items():
        own = [place for place in {id(place): place for place in places}.values() if name in place[1]]
        merge.fields |= {} if (value := _one(merge, name, own, [shared], number)) is None else {ours: value}
    if method.ours == "slerp":
        merge.fields["epsilon"] = _LERP_BELOW
    merge.fields["method"] = method.ours
    merge.notes += [method.told] if method.told else []


def by_models(merge: Merge, method: Method, sources: Sequence[Source], shared: Place) -> None:
    """What whole models are merged by."""
    for name in method.by_model:
        values = [_setting(merge, name, one, shared) for one in sources]
        _by_model(merge, name, list(merge.models), values)
    merge.fields |= _single(merge, method, sources, shared)


def slice_of(
    merge: Merge, method: Method, sources: Sequence[Source], kept: Sequence[Source], shared: Place
) -> dict[str, Any]:
    """A slice as `fusion.slices` has it; base_model's layers are THETA0's, where it is no model to merge."""
    names = {path: name for name, path in merge.models.items()}
    found = []
    for one in kept:
        values = {_OURS[name][0]: _setting(merge, name, one, shared) for name in method.by_model}
        given = {name: value for name, value in values.items() if value is not None}
        found.append({"model": names[one.path], "layer_range": list(one.layers or ()), **given})
    for one in sources:
        if one not in kept and one.model == merge.base:
            found.insert(0, {"model": THETA0, "layer_range": list(one.layers or ())})
    return {"sources": found, **_single(merge, method, kept, shared)}


def _setting(merge: Merge, name: str, one: Source, shared: Place) -> Any:
    value = setting(merge.problems, name, [*one.places, shared])
    cases = isinstance(value, list) and isinstance(value[-1], dict)
    return [*value, {"value": 1.0}] if name == "scale" and cases and value[-1].get("filter") is not None else value


def _single(merge: Merge, method: Method, sources: Sequence[Source], shared: Place) -> dict[str, Any]:
    """Parameters that are no model's own."""
    common = [*(sources[0].places[1:] if sources else ()), shared]
    found = {}
    for name in method.single:
        own = [place for one in sources for place in one.places[:1] if name in place[1]]
        if name == "t":
            value = setting(merge.problems, name, [*own[:1], *common])
            if value is None and not any("t" in given for _, given in [*own, *common]):
                merge.refuse("parameters.t", "is not there", "give a number from 0 to 1, a list, or cases")
        else:
            value = _one(merge, name, own, common, flag if name == "normalize" else number)
            value = method.normalize if name == "normalize" and value is None else value
        if value is not None:
            found[_SINGLE[name]] = value
    return found


def _one(merge: Merge, name: str, own: Sequence[Place], common: Sequence[Place], kind: Callable[..., Any]) -> Any:
    """What the nearest place has; own: places that have to agree."""
    if len({repr(given[name]) for _, given in own}) > 1:
        merge.refuse(f"{own[0][0]}.{name}", "differs between models", "give one number for the whole merge")
    return kind(merge.problems, name, [*own[:1], *common])


def _unused(merge: Merge, method: Method, place: Place, known: Collection[str], of_others: Collection[str]) -> None:
    """Parameters that the method has no use for: mergekit's own are told, others refused."""
    where, parameters = place
    for name, value in parameters.items():
        inert = {one[0]: one for one in method.others}
        if name in inert:
            _, default, does = inert[name]
            if default is not None and value != default:
                merge.refuse(f"{where}.{name}", f"is {value!r:.40}, and {does}", f"leave it out, or give {default}")
        elif name in IDLE:
            merge.notes.append(f"{where}.{name}: {IDLE[name]}")
        elif name not in known and name in of_others:
            merge.notes.append(f"{where}.{name}: is not used by {method.ours}")
        elif name not in known:
            unknown(merge, [name], [*known, *of_others], f"{where}.")


def _by_model(merge: Merge, name: str, tasks: Sequence[str], values: Sequence[Any]) -> None:
    """`weight` and `density`: one for all where they are alike, else by task."""
    given = {task: 1.0 if value is None else value for task, value in zip(tasks, values, strict=True)}
    if len({repr(value) for value in given.values()}) == 1:
        merge.fields[_OURS[name][0]] = next(iter(given.values()))
    elif given:
        merge.fields[_OURS[name][1]] = given
