"""Merges of updates by numbers that a whole tensor has: a pass of its own finds them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.slices import sweep
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import Merged
from cpift.merging.definition import RUN, Definition, in_fp64
from cpift.merging.forms import UpdateMerge, rounded_updates

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class MeasuredMerge(UpdateMerge):
    """`update` finds the numbers of its tensor in `known`, `defined_update` those of the definition."""

    reads = 1
    known: Any = None

    @abstractmethod
    def measured(self, info: TensorInfo) -> Any:
        """The numbers of a tensor, read in slices."""

    @abstractmethod
    def defined(self, info: TensorInfo) -> Any:
        """The same in fp64, by code that shares nothing with `measured`."""

    def merged(self, info: TensorInfo) -> Merged:
        return super(MeasuredMerge, self._with(self.measured(info))).merged(info)

    def definition(self, info: TensorInfo) -> Definition:
        return super(MeasuredMerge, self._with(self.defined(info))).definition(info)

    def _with(self, known: Any) -> Self:
        other = copy.copy(self)
        other.known = known
        return other

    def updates_of(self, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
        """A pass over a tensor: where a run of elements begins, and its updates, fp32 [N, n]."""
        import torch

        for start, stop in sweep(self.models, info, self.pieces(info)):
            for first, last in self.runs(info, start, stop):
                yield first, torch.stack(self.updates(info.name, first, last)[1])

    def defined_updates_of(self, info: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """The same for a definition, fp64 [N, n]."""
        for start in range(0, info.numel, RUN):
            stop = min(start + RUN, info.numel)
            origin, *tuned = (in_fp64(model, info.name, start, stop) for model in self.models)
            yield start, rounded_updates(origin, tuned)
