"""Models, slices and adapters that a mergekit file names, and what is noted while it is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.errors import Problem
from cpift.other_tools.mergekit_values import Place
from cpift.untrusted.values import Raw, is_list, is_word, kind_of, mapping

_LISTED = 8  # names that are told one by one
OF_SLICES = ("weight", "weights", "density", "densities", "t", "normalize", "scale")  # what each slice has for itself
THETA0 = "pretrained"  # base_model in `fusion.slices`
_MOST_SLICES = 1000
_MOST = 17  # models of a file: as many as a run has tasks, and base_model


@dataclass
class Merge:
    """What a file asks for. fields: keywords of `cpift.merge`; problems: what cannot be done; notes: what differs.

    Where slices say something, they have the place of OF_SLICES among the fields."""

    base: str = ""
    models: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None  # of θ0 with which `slices` say nothing: one slice of all layers
    slices: list[dict[str, Any]] = field(default_factory=list)  # `fusion.slices`, where the file names ranges
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, where: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(where, what, remedy))


@dataclass(frozen=True)
class Method:
    """One of mergekit's `merge_method`s. ours: `--method`; others: what it has no form for, by parameter: the value
    that changes nothing, and what cpift does."""

    ours: str
    of_updates: bool | None = True  # merges onto base_model, which is no model to merge; None: where there is one
    by_model: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    numbers: Mapping[str, str] = field(default_factory=dict)  # one for the whole merge: its name here, and there
    normalize: bool | None = None  # its default, where it differs from cpift's
    others: tuple[tuple[str, Any, str], ...] = ()
    least: int = 1
    most: int = 1 << 30
    told: str = ""
    begins: Mapping[str, Any] = field(default_factory=dict)  # fields of cpift with mergekit's defaults


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
    """A model that is merged: where the file has it, its name and adapter, its own parameters, nearest first, and its
    layers, where they are named: the first, and the one after the last."""

    where: str
    model: str
    adapter: str
    places: tuple[Place, ...]
    layers: tuple[int, int] | None = None

    @property
    def path(self) -> str:
        return self.adapter or self.model


def sources_of(merge: Merge, raw: Raw) -> list[list[Source]]:
    """The sources of every slice; of `models`, those of the one slice that they stand for."""
    slices, models = raw.get("slices"), raw.get("models")
    if slices is not None and models is not None:
        merge.refuse("slices", "stand beside `models`", "keep one of the two")
    if slices is None:
        return [_listed(merge, models, "models", ())]
    if not is_list(slices) or not all(isinstance(one, dict) for one in slices) or not slices:
        merge.refuse("slices", f"is {kind_of(slices)}, not slices", "give a list of {sources: [...]}")
        return []
    if len(slices) > _MOST_SLICES:
        merge.refuse("slices", f"are {len(slices):,}", f"give at most {_MOST_SLICES:,}")
        return []
    found = []
    for number_, one in enumerate(slices):
        at = f"slices.{number_}"
        unknown(merge, one, {"sources", "parameters"}, f"{at}.")
        places = ((f"{at}.parameters", parameters_of(merge, one, at)),)
        found.append(_listed(merge, one.get("sources"), f"{at}.sources", places))
        _ranges(merge, found[-1], at, alone=len(slices) == 1)
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
        found.append(Source(at, model, adapter, (own, *places), _layers(merge, entry.get("layer_range"), at)))
    return found


def parameters_of(merge: Merge, entry: Raw, where: str) -> Raw:
    given = entry.get("parameters")
    if given is not None and not isinstance(given, dict):
        merge.refuse(f"{where}.parameters", f"is {kind_of(given)}", "give fields, for example {weight: 0.5}")
    return mapping(given)


def _layers(merge: Merge, value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if is_list(value) and len(value) == 2 and all(type(end) is int for end in value) and 0 <= value[0] < value[1]:
        return value[0], value[1]
    merge.refuse(f"{where}.layer_range", f"is {value!r:.60}", "give [first, one after the last], for example [0, 32]")
    return None


def _ranges(merge: Merge, sources: Sequence[Source], where: str, alone: bool) -> None:
    """One slice of all layers says nothing. How many there are is known when θ0 is opened."""
    ranges = {one.layers for one in sources}
    if alone and (None in ranges or (len(ranges) == 1 and all(one[0] == 0 for one in ranges if one))):
        merge.layers = next((one[1] for one in ranges if one), None)
    elif None in ranges and not merge.problems:
        remedy = "give [first, one after the last] to each source"
        merge.refuse(f"{where}.sources", "have no layer_range, and there are several slices", remedy)


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
