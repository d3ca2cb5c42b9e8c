"""The models of a merge that becomes an adapter: read in float32, and what they change of θ0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from cpift.checkpoints.adapters.parts import AdapterParts, Parameter, beside_adapted
from cpift.checkpoints.adapters.widened import WidenedCheckpoint, in_float32
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora import LoraCheckpoint
from cpift.checkpoints.slices import pieces
from cpift.errors import Problem
from cpift.merging.base import FusionInputs

_EXTRACT = "extract an adapter of it first (`cpift extract-lora`), or give a rank: fusion.rank, --rank"
# Of a decomposition by singular values: the matrix, its copy, U and V, in float32, and room to work.
_HELD = 4 * 5


@dataclass(frozen=True)
class Changed:
    """Tensors that some model changes: those that get factors, and those that are kept whole."""

    products: Sequence[Parameter]
    whole: Sequence[Parameter]


def widened_inputs(inputs: FusionInputs) -> FusionInputs:
    """The same models in float32, adapters over θ0 in float32."""
    base = WidenedCheckpoint(inputs.pretrained)
    known: dict[int, Checkpoint] = {id(inputs.pretrained): base}

    def wide(model: Checkpoint) -> Checkpoint:
        return known.setdefault(id(model), in_float32(model, base))

    tuned = {task: wide(model) for task, model in inputs.tuned.items()}
    return replace(inputs, pretrained=base, backbone=wide(inputs.backbone), tuned=tuned)


def stored(base: Checkpoint) -> Checkpoint:
    """θ0 as its files have it, of θ0 widened."""
    return base.inner if isinstance(base, WidenedCheckpoint) else base


def changed_names(base: Checkpoint, models: Mapping[str, Checkpoint], every: bool = False) -> list[str]:
    """Tensors that one of the models has otherwise than θ0, in name order; reads those of whole models.

    every: all floating tensors, where a merge may change what no model did.
    """
    if every:
        return [name for name, info in base.tensors.items() if info.floating]
    adapters = [model for model in models.values() if isinstance(model, LoraCheckpoint)]
    found = {name for model in adapters for name in (*model.adapted, *model.replaced)}
    others = [model for model in models.values() if model is not base and not isinstance(model, LoraCheckpoint)]
    return [
        name
        for name, info in base.tensors.items()
        if name in found or (info.floating and any(_differs(base, model, name) for model in others))
    ]


def _differs(base: Checkpoint, model: Checkpoint, name: str) -> bool:
    import torch

    parts = pieces(base.tensors[name].numel)
    return not all(torch.equal(base.slice(name, *part), model.slice(name, *part)) for part in parts)


def changed_in(
    parts: AdapterParts,
    names: Sequence[str],
    models: Mapping[str, Checkpoint],
    rank: int | None,
    problems: list[Problem],
) -> Changed:
    """How an adapter holds these tensors; what it cannot hold goes to `problems`.

    What an adapter holds whole stays whole. rank None: factors are those of adapters, so that no whole fine-tune may
    have changed their tensors.
    """
    places = [parts.parameter(name) for name in names]
    problems += [place for place in places if isinstance(place, Problem)]
    kept = {name for model in models.values() if isinstance(model, LoraCheckpoint) for name in model.replaced}
    found = [place for place in places if isinstance(place, Parameter)]
    products = [place for place in found if parts.is_product(place) and place.tensor not in kept]
    whole = [place for place in found if place not in products]
    problems += beside_adapted(whole, products)
    if rank is None:
        problems += _of_whole_models(models)
    return Changed(products, whole)


def _of_whole_models(models: Mapping[str, Checkpoint]) -> Iterator[Problem]:
    for task, model in models.items():
        if not isinstance(model, LoraCheckpoint):
            what = "is a whole fine-tune, and adapters alone are concatenated"
            yield Problem(f"tasks.{task}.checkpoint", what, _EXTRACT)


def room_problems(changed: Changed, base: Checkpoint, budget: int, by_factors: bool) -> list[Problem]:
    """Why singular values of the largest matrix cannot be taken within the memory budget, in bytes."""
    held = {place.tensor: _HELD * base.tensors[place.tensor].numel for place in changed.products}
    largest = max(held, key=lambda name: held[name], default=None)
    if by_factors or largest is None or held[largest] <= budget:
        return []
    what = (
        f"{budget >> 20} MiB is too little for the singular values of {largest}, which take {held[largest] >> 20} MiB"
    )
    return [Problem("resources.memory_budget", what, f"give at least {(held[largest] >> 20) + 1} MiB")]


def adapters_of(models: Mapping[str, Checkpoint]) -> dict[str, LoraCheckpoint] | None:
    """The models, if all are adapters."""
    if not all(isinstance(model, LoraCheckpoint) for model in models.values()):
        return None
    return cast("dict[str, LoraCheckpoint]", dict(models))
