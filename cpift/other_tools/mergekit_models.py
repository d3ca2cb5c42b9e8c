"""Models, slices and adapters that a mergekit file names, and what is noted while it is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.errors import Problem
from cpift.other_tools.mergekit_values import Place
from cpift.untrusted.values import Raw, is_list, is_word, kind_of, mapping

_LISTED = 8  # names that are told one by one
_MOST = 17  # models of a file: as many as a run has tasks, and base_model


@dataclass
class Merge:
    """What a file asks for. fields: keywords of `cpift.merge`; problems: what cannot be done; notes: what differs."""

    base: str = ""
    models: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None  # that θ0 has to have, where the file names a range
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, where: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(where, what, remedy))


def unknown(merge: Merge, given: Iterable[str], known: Iterable[str], where: str) -> None:
    names = sorted(known)
    lost = [name for name in given if name not in names]
    for name in lost[:_LISTED]:
        close = difflib.get_close_matches(name[:60], names, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        merge.refuse(f"{where}{name:.60}", "is no field of mergekit's that cpift knows", remedy)
    if len(lost) > _LISTED:
        remedy = f"known: {', '.join(names)}"
        merge.refuse(f"{where}{lost[_LISTED]:.60}", f"and {len(lost) - _LISTED - 1:,} more are no fields", remedy)


@dataclass(frozen=True)
class Source:
    """A model that is merged: where the file has it, its name and adapter, and its own parameters, nearest first."""

    where: str
    model: str
    adapter: str
    places: tuple[Place, ...]


def sources_of(merge: Merge, raw: Raw) -> list[Source]:
    if raw.get("modules") is not None:
        merge.refuse("modules", "name parts of models of several kinds", "cpift merges one language model at a time")
    slices, models = raw.get("slices"), raw.get("models")
    if slices is not None and models is not None:
        merge.refuse("slices", "stand beside `models`", "keep one of the two")
    if slices is None:
        return _listed(merge, models, "models", ())
    if not is_list(slices) or not all(isinstance(one, dict) for one in slices) or not slices:
        merge.refuse("slices", f"is {kind_of(slices)}, not slices", "give a list of {sources: [...]}")
        return []
    if len(slices) > 1:
        what = f"are {len(slices)}: cpift puts no layers of models one after another"
        merge.refuse("slices", what, "give one slice of all layers, or `models`")
    for number_, one in enumerate(slices):
        unknown(merge, one, {"sources", "parameters"}, f"slices.{number_}.")
    first = slices[0]
    places = (("slices.0.parameters", parameters_of(merge, first, "slices.0")),)
    found = _listed(merge, first.get("sources"), "slices.0.sources", places)
    if len(slices) == 1:
        _ranges(merge, first.get("sources"))
    return found


def _listed(merge: Merge, given: Any, where: str, places: tuple[Place, ...]) -> list[Source]:
    if not is_list(given) or not given:
        what = "is not there" if given is None else f"is {kind_of(given)}" if not is_list(given) else "is empty"
        merge.refuse(where, what, "give a list of {model: folder or hub id}")
        return []
    if len(given) > _MOST:
        merge.refuse(where, f"are {len(given):,}", f"give at most {_MOST}, base_model among them")
        return []
    allowed = {"model", "parameters"} | ({"layer_range"} if "sources" in where else set())
    found = []
    for number_, one in enumerate(given):
        at = f"{where}.{number_}"
        entry = {"model": one} if is_word(one) else one
        if not isinstance(entry, dict):
            merge.refuse(at, f"is {kind_of(one)}", "give {model: folder or hub id}")
            continue
        unknown(merge, entry, allowed, f"{at}.")
        name = reference(merge, entry.get("model"), f"{at}.model")
        model, _, adapter = name.partition("+")
        own = (f"{at}.parameters", parameters_of(merge, entry, at))
        found.append(Source(at, model, adapter, (own, *places)))
    return found


def parameters_of(merge: Merge, entry: Raw, where: str) -> Raw:
    given = entry.get("parameters")
    if given is not None and not isinstance(given, dict):
        merge.refuse(f"{where}.parameters", f"is {kind_of(given)}", "give fields, for example {weight: 0.5}")
    return mapping(given)


def _ranges(merge: Merge, sources: Any) -> None:
    """A range of all layers says nothing; another cannot be had. How many there are is known when θ0 is opened."""
    ranges = []
    for number_, one in enumerate(sources if is_list(sources) else []):
        given = mapping(one).get("layer_range")
        whole = is_list(given) and len(given) == 2 and all(type(end) is int for end in given) and given[0] < given[1]
        if given is not None and (not whole or given[0] < 0):
            remedy = "give [first, one after the last], for example [0, 32]"
            merge.refuse(f"slices.0.sources.{number_}.layer_range", f"is {given!r:.60}", remedy)
        elif given is not None:
            ranges.append(tuple(given))
    if len(set(ranges)) > 1 or any(first for first, _ in ranges):
        what = f"is {' and '.join(str(list(one)) for one in dict.fromkeys(ranges))}: cpift merges all layers"
        merge.refuse("slices.0.sources.layer_range", what, "give every source [0, number of layers], or `models`")
    elif ranges:
        merge.layers = ranges[0][1]


def reference(merge: Merge, value: Any, where: str) -> str:
    """A model as `cpift merge` takes it: `name@revision`, and `+adapter` behind it."""
    if isinstance(value, dict):
        inner, lora = value.get("model"), value.get("lora")
        parts = [inner if isinstance(inner, dict) else value, *([lora] if isinstance(lora, dict) else [])]
        if all(is_word(one.get("path")) for one in parts):
            return "+".join(
                f"{one['path']}{'@' + str(one['revision']) if one.get('revision') else ''}" for one in parts
            )
    if not is_word(value) or value.count("+") > 1 or value.startswith("+") or value.endswith("+"):
        what = "is not there" if value is None else f"is {value!r:.60}"
        merge.refuse(where, what, "give a folder or hub id, with @revision or +adapter behind it where one is meant")
        return ""
    return str(value)


def names_of(models: Sequence[str]) -> list[str]:
    """A task's name for each model: the last part of its path, with a number where two have the same."""
    found: list[str] = []
    for model in models:
        last = model.rstrip("/").rpartition("/")[2].partition("@")[0]  # of an address no name and no password
        name = re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII)
        name = name.strip("-.")[:50] or "tune"
        low = [one.lower() for one in found]
        found.append(f"{name}-{len(found) + 1}" if name.lower() in low else name)
    return found
