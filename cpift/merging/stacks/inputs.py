"""The models of `fusion.slices`: of each slice the layers of its sources, under the numbers that they get."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint, require_same_layout
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.stacked import Layers, Place, Stack, layers_in
from cpift.config.fusion import THETA0, FusionConfig, SliceConfig, SourceConfig
from cpift.config.settings import met, unmet
from cpift.errors import CheckpointError, Problem, ProblemsError
from cpift.merging.base import FusionInputs
from cpift.merging.registry import method_named
from cpift.merging.settings import SINGLE, settings_of
from cpift.pretrained.stacking import apart_beside_layers, require_uniform, stacked_config

OF_SOURCE = ("weight", "density")  # settings that a source has for itself


@dataclass(frozen=True)
class Part:
    """One slice: the fusion of its sources, under the names that its layers get."""

    config: FusionConfig
    inputs: FusionInputs
    number: int | None = None  # None: all layers

    @property
    def folder(self) -> str:
        """Where masks of it lie, beside those of the others."""
        return "trimmed" if self.number is None else f"trimmed-{self.number}"


@dataclass(frozen=True)
class StackInputs(FusionInputs):
    """Models whose layers are put one after another; `backbone` is the model that comes out, without values."""

    parts: Sequence[Part] = ()

    def check(self) -> None:
        for part in self.parts:
            require_same_layout(part.inputs.pretrained, part.inputs.tuned)


def onto_base(config: FusionConfig) -> bool:
    """Whether a slice is merged onto θ0's layers, which are then no model to merge."""
    method = method_named(config.method)
    return method.needs_base and not ("space" in method.fields and config.space == "weights")


def tasks_of(config: FusionConfig, one: SliceConfig) -> list[str]:
    """The models that a slice merges, in order."""
    return [source.model for source in one.sources if source.model != THETA0 or not onto_base(config)]


def config_of(config: FusionConfig, one: SliceConfig, names: Sequence[str] = ()) -> FusionConfig:
    """How a slice is merged: its sources' settings, else its own, else those of all. names: of its tensors; cases whose
    filter is in none of them are for other slices."""

    def setting(source: SourceConfig, name: str, by_task: str) -> Any:
        shared = getattr(config, by_task).get(source.model, getattr(config, name))
        return next(v for v in (getattr(source, name), getattr(one, name), shared) if v is not None)

    merged = [source for source in one.sources if source.model in tasks_of(config, one)]
    single = {name: getattr(one, name) for name in ("t", "normalize", "scale") if getattr(one, name) is not None}
    found = {"slices": (), "t": met(single.pop("t", config.t), names), **single}
    for name, by_task in (("weight", "weights"), ("density", "densities")):
        found[by_task] = {source.model: met(setting(source, name, by_task), names) for source in merged}
        found[name] = next(iter(found[by_task].values()), 1.0)
    return config.model_copy(update=found)


def slice_problems(config: FusionConfig) -> list[Problem]:
    """What is wrong with slices before any model is opened."""
    found = []
    for number, one in enumerate(config.slices):
        where = f"fusion.slices.{number}"
        if onto_base(config) and THETA0 not in (source.model for source in one.sources):
            what = f"have no layers of {THETA0}, and {config.method_name} merges onto them"
            found.append(Problem(f"{where}.sources", what, f"add {{model: {THETA0}, layer_range: [first, end]}}"))
            continue
        asked = method_named(config.method).asked(config_of(config, one), tasks_of(config, one))
        found += [Problem(f"{where}: {p.where}", p.what, p.remedy) for p in asked if not _varied(config, one)]
    return found


def _varied(config: FusionConfig, one: SliceConfig) -> bool:
    """Whether a setting differs from tensor to tensor: it is asked for once the tensors are known."""
    return any(isinstance(value, (list, tuple)) for value in settings_of(config_of(config, one)).values())


def stack_inputs(config: FusionConfig, base: Checkpoint, tuned: Mapping[str, Checkpoint]) -> StackInputs:
    """The parts of a stack and the model that they make. Raises CheckpointError with what keeps them apart."""
    models = {THETA0: base, **tuned}
    folders = {name: base.folder if _is_adapter(model) else model.folder for name, model in models.items()}
    used = {source.model: None for one in config.slices for source in one.sources}
    for name in used:
        require_uniform(folders[name])
    problems = [
        Problem(f"{name}: {problem.where}", problem.what, problem.remedy)
        for name in used
        for problem in (apart_beside_layers(base.folder, folders[name]) if folders[name] != base.folder else [])
    ]
    if problems := problems or list(_outside(config, {name: layers_in(models[name]) for name in used})):
        raise CheckpointError("layers of models", problems)
    ends = list(itertools.accumulate(one.layers for one in config.slices))
    made = [_part(config, number, models, ends) for number in range(len(ends))]
    layers = [
        [(folders[source.model], source.layer_range[0] + number) for source in one.sources]
        for one in config.slices
        for number in range(one.layers)
    ]
    stack = Stack(base, [part.inputs.pretrained for part in made], stacked_config(base.config, layers))
    _require_filters(config, stack.names)
    return StackInputs(base, stack, tuned, Path(), (), parts=made)


def _is_adapter(model: Checkpoint) -> bool:
    return (model.folder / ADAPTER_CONFIG).is_file()


def _outside(config: FusionConfig, counts: Mapping[str, int]) -> Iterator[Problem]:
    for number, one in enumerate(config.slices):
        for at, source in enumerate(one.sources):
            if source.layer_range[1] > counts[source.model]:
                what = f"is {list(source.layer_range)}, and {source.model} has {counts[source.model]} layers"
                where = f"fusion.slices.{number}.sources.{at}.layer_range"
                yield Problem(where, what, f"end at {counts[source.model]} at most")


def _part(config: FusionConfig, number: int, models: Mapping[str, Checkpoint], ends: Sequence[int]) -> Part:
    one = config.slices[number]
    at = ends[number] - one.layers
    views = {
        source.model: Layers(models[source.model], Place(source.layer_range[0], one.layers, at, ends[-1]))
        for source in one.sources
    }
    origin = views.get(THETA0, next(iter(views.values())))
    tuned = {name: views[name] for name in tasks_of(config, one)}
    return Part(config_of(config, one, origin.names), FusionInputs(origin, origin, tuned, Path(), (), at), number)


def _settings(config: FusionConfig) -> Iterator[tuple[str, Any]]:
    """Every setting by field, of all slices, of one, of a source."""
    yield from settings_of(config).items()
    for number, one in enumerate(config.slices):
        yield from ((f"slices.{number}.{name}", getattr(one, name)) for name in SINGLE)
        for at, source in enumerate(one.sources):
            yield from ((f"slices.{number}.sources.{at}.{name}", getattr(source, name)) for name in OF_SOURCE)


def _require_filters(config: FusionConfig, names: Sequence[str]) -> None:
    """Raise ProblemsError where a filter is in no tensor's name of any slice."""
    found = [
        Problem(f"fusion.{field}", what, remedy)
        for field, value in _settings(config)
        if value is not None
        for what, remedy in unmet(value, names)
        if what.startswith("the filter")
    ]
    if found:
        raise ProblemsError(f"merge by {config.method_name}", found)
