"""Tensors of models, and masks, in one buffer each on a shard's device: what walks all of them is launched once.

Tensors lie together that have one dtype in each of the models; a launch takes no others at once. Most models have one
such group, some a second one, of norms or states in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from cpift_kernels import Flat, FlatLayout

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.formats.safetensors import TensorInfo
from cpift.merging.resident.shard import ResidentCheckpoint, ResidentMasks
from cpift.method.masks import RegionMasks
from cpift.method.measures import Update

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Group:
    """Tensors that lie together, in name order."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def layout(self) -> FlatLayout:
        return _layout(self.sizes)

    def model(self, model: Checkpoint) -> torch.Tensor:
        """[total] on the device: these tensors of a model of a shard's."""
        return cast(ResidentCheckpoint, model).together(self.names, self.layout)

    def mask(self, masks: RegionMasks, task: str) -> torch.Tensor:
        """int32 [total / 32] on the device: a task's masks of these tensors, of a shard's."""
        return cast(ResidentMasks, masks).together(task, self.names, self.layout)


@lru_cache(maxsize=16)
def _layout(sizes: tuple[int, ...]) -> FlatLayout:
    """One object, for it keeps its tables on the devices."""
    return FlatLayout(sizes)


def groups_of(models: Sequence[Checkpoint], infos: Sequence[TensorInfo]) -> list[Group]:
    """The tensors by their dtypes in each of the models."""
    by_dtypes: dict[tuple[str, ...], list[TensorInfo]] = {}
    for info in infos:
        by_dtypes.setdefault(tuple(model.tensors[info.name].kind for model in models), []).append(info)
    groups = by_dtypes.values()
    return [Group(tuple(info.name for info in group), tuple(info.numel for info in group)) for group in groups]


def flats_of(update: Update) -> list[Flat]:
    """The models of a selection, all of a shard's."""
    numbers = {name: number for number, name in enumerate(update.names)}
    infos = [update.models[0].tensors[name] for name in update.names]
    return [
        Flat(group.layout, [numbers[name] for name in group.names], [group.model(model) for model in update.models])
        for group in groups_of(update.models, infos)
    ]
