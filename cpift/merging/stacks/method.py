"""`fusion.slices`: the method over each slice's own sources, for the tensors of that slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import Piece
from cpift.checkpoints.writing import TensorRecord
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Materials, Merged, MergeMethod
from cpift.merging.checks import Tally
from cpift.merging.definition import Definition
from cpift.merging.registry import method_named
from cpift.merging.settings import Largest
from cpift.merging.stacks.inputs import Part, StackInputs
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class StackMerge(MergeMethod):
    """The method of each slice where its tensors are written."""

    formula, source, fields = "each slice by its own", "mergekit's documentation", ()

    def __init__(self, inputs: StackInputs, parts: Sequence[MergeMethod]):
        self.stack, self.parts, self.config = inputs.backbone, list(parts), parts[0].config
        self._of = _by_tensor(self.parts)

    @classmethod
    def of(cls, inputs: StackInputs, seed: int, trimmed: Callable[[Part, Largest], list[Path]]) -> Self:
        """trimmed: of a part, as `Materials.trimmed`."""
        materials = [Materials(part.inputs, part.config, seed, partial(trimmed, part)) for part in inputs.parts]
        return cls(inputs, [method_named(one.config.method).make(one) for one in materials])

    def at(self, name: str) -> Any:
        return self._of[name].at(name)

    @property
    def models(self) -> list[Checkpoint]:
        """What comes out, for its names; and as many as are read together at most."""
        return [self.stack, *max((part.models for part in self.parts), key=len)]

    def with_masks(self, read: Callable[[RegionMasks], RegionMasks]) -> Self:
        other = super().with_masks(read)
        other.parts = [part.with_masks(read) for part in self.parts]
        other._of = _by_tensor(other.parts)
        return other

    def named(self, where: str) -> AbstractContextManager[None]:
        return self.parts[0].named(where)

    def prepare(self) -> list[TensorRecord]:
        return [record for part in self.parts for record in part.prepare()]

    def merges(self, info: TensorInfo) -> bool:
        return self._of[info.name].merges(info)

    def pieces(self, info: TensorInfo) -> list[Piece]:
        return self._of[info.name].pieces(info)

    def beside(self, info: TensorInfo) -> int:
        return self._of[info.name].beside(info)

    def tensor(self, info: TensorInfo) -> Merged:
        return self._of[info.name].tensor(info)

    def merged(self, info: TensorInfo) -> Merged:
        return self._of[info.name].merged(info)

    def definition(self, info: TensorInfo) -> Definition:
        return self._of[info.name].definition(info)

    def compares(self, info: TensorInfo) -> bool:
        return self._of[info.name].compares(info)

    def tally(self, info: TensorInfo, start: int, values: torch.Tensor) -> Tally:
        return self._of[info.name].tally(info, start, values)

    def differing(self, info: TensorInfo, start: int, stop: int, out: torch.Tensor) -> tuple[int, int]:
        return self._of[info.name].differing(info, start, stop, out)

    def compared_with(self, info: TensorInfo) -> list[Checkpoint]:
        return self._of[info.name].compared_with(info)


def _by_tensor(parts: Sequence[MergeMethod]) -> dict[str, MergeMethod]:
    return {name: part for part in parts for name in part.pretrained.tensors}
