"""PCB-Merging: elements compete, within their task by size and between tasks by agreement; the weak are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.finite import all_finite, require_finite
from cpift.checkpoints.slices import sweep
from cpift.config.run import FusionConfig
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.definition import Definition, in_fp64
from cpift.merging.forms import rounded_updates, row_runs
from cpift.merging.selected.scores import Origin, Scores
from cpift.merging.selected.trimmed import TrimmedMerge
from cpift.merging.settings import Largest

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


_LARGEST = 1 << 20  # elements that compete, of which a definition is evaluated


@dataclass(frozen=True)
class Field:
    """Of the products δi·δj of some elements, [N, N]: the least, and how far the largest is above it. Of them the mean
    of exp(Norm), `inter` [N, N], and of squares that of exp(N·Norm), `intra` [N]: softmax is exp over it, but for the
    number of elements, which is the same for all."""

    least: np.ndarray
    span: np.ndarray
    inter: np.ndarray
    intra: np.ndarray


class Pcb(TrimmedMerge):
    """Norm takes the least to 0 and the largest to 1. Norm and softmax go over each tensor or, as in the paper, over
    the model: `trim: global`. Two passes find what they need, one finds which are kept, one merges. A task's pass reads
    all models."""

    formula = (
        "θ0 + λ·Σ m_i·β_i·δ_i / Σ m_i·β_i, δ = θ − θ0, β_i = softmax(N·Norm(δ_i²))·Σ_j softmax(Norm(δ_i·δ_j)), "
        "m_i where β_i is among the largest density"
    )
    source = "arXiv 2410.02396"
    fields = ("density", "densities", "trim", "scale")
    reads = 3

    def __init__(
        self, inputs: FusionInputs, config: FusionConfig, trimmed: Sequence[Path], fields_of: Mapping[str, Field]
    ):
        super().__init__(inputs, config, trimmed)
        self._fields_of = fields_of
        self._defined: dict[str, Field] = {}

    @classmethod
    def make(cls, materials: Materials) -> Self:
        inputs, config = materials.inputs, materials.config
        models = [inputs.pretrained, *inputs.tuned.values()]
        fields_of = _measured(cls(inputs, config, [], {}))
        scores = {
            task: Scores(models, partial(_of_task, number, fields_of)) for number, task in enumerate(inputs.tuned)
        }
        folders = materials.trimmed(Largest(Origin(inputs.pretrained), scores, cls.shares))
        return cls(inputs, config, folders, fields_of)

    @property
    def blocks(self) -> list[list[TensorInfo]]:
        """Tensors whose elements compete with each other."""
        infos = [info for info in self.pretrained.tensors.values() if self.merges(info)]
        return [infos] if self.config.trim == "global" else [[info] for info in infos]

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        stacked = torch.stack(list(updates))
        won = torch.stack([_competition(number, self._fields_of[name], stacked) for number in range(len(stacked))])
        won = won * self.kept(name, start, stop)
        total = won.sum(0)
        found: torch.Tensor = self.config.scale * (won * stacked.double()).sum(0) / torch.where(total > 0, total, 1.0)
        return found.float()

    def definition(self, info: TensorInfo) -> Definition:
        if info.name not in self._defined:
            block = self._block(info)
            self._defined |= dict.fromkeys((one.name for one in block), self._defined_field(block))
        return super().definition(info)

    def compares(self, info: TensorInfo) -> bool:
        return super().compares(info) and sum(one.numel for one in self._block(info)) <= _LARGEST

    def _block(self, info: TensorInfo) -> list[TensorInfo]:
        return next(infos for infos in self.blocks if info.name in [one.name for one in infos])

    def _defined_field(self, infos: Sequence[TensorInfo]) -> Field:
        """By the formula, of all elements at once."""
        moves = []
        for info in infos:
            origin, *tuned = (in_fp64(model, info.name, 0, info.numel) for model in self.models)
            moves.append(rounded_updates(origin, tuned))
        every = np.concatenate(moves, 1)
        products = np.einsum("in,jn->ijn", every, every)
        least, own = products.min(2), np.arange(len(every))
        span = products.max(2) - least
        norms = (products - least[..., None]) / np.where(span > 0, span, 1)[..., None]
        return Field(least, span, np.exp(norms).mean(2), np.exp(len(every) * norms[own, own]).mean(1))

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        field, own = self._defined[name], np.arange(len(updates))
        norms = np.einsum("in,jn->ijn", updates, updates) - field.least[..., None]
        norms = norms / np.where(field.span > 0, field.span, 1)[..., None]
        inter = (np.exp(norms) / field.inter[..., None]).sum(1)
        won = np.exp(len(updates) * norms[own, own]) / field.intra[:, None] * inter
        won = won * self.kept(name, start, stop).numpy()
        found: np.ndarray = self.config.scale * (won * updates).sum(0) / np.where(won.sum(0) > 0, won.sum(0), 1)
        return found


def _measured(method: Pcb) -> dict[str, Field]:
    """The field of every tensor, in two passes over its block, read in slices."""
    found: dict[str, Field] = {}
    for infos in method.blocks:
        if any(info.numel for info in infos):
            field = _field_of(method, infos)
            found |= {info.name: field for info in infos}
    return found


def _field_of(method: Pcb, infos: Sequence[TensorInfo]) -> Field:
    size = len(method.tuned)
    least, most = np.full((size, size), np.inf), np.full((size, size), -np.inf)
    for row, updates in _rows(method, infos):
        products = updates[row] * updates
        least[row] = np.minimum(least[row], products.amin(1).numpy())
        most[row] = np.maximum(most[row], products.amax(1).numpy())
    field = Field(least, most - least, np.zeros((size, size)), np.zeros(size))
    for row, updates in _rows(method, infos):
        norms = _norms(row, field, updates)
        field.inter[row] += norms.exp().sum(1).numpy()
        field.intra[row] += float((size * norms[row]).exp().sum())
    number = sum(info.numel for info in infos)
    return Field(least, field.span, field.inter / number, field.intra / number)


def _rows(method: Pcb, infos: Sequence[TensorInfo]) -> Iterator[tuple[int, torch.Tensor]]:
    """A pass over tensors: for each run of elements the updates, fp64 [N, n], once for every task."""
    import torch

    for info in infos:
        for piece in sweep(method.models, info, method.pieces(info)):
            for start, stop in row_runs(0, *piece):
                updates = torch.stack(method.updates(info.name, start, stop)[1]).double()
                if not all_finite(updates):
                    for label, model in {"θ0": method.pretrained, **method.tuned}.items():
                        require_finite(label, model, [info.name])
                yield from ((task, updates) for task in range(len(updates)))


def _norms(task: int, field: Field, updates: torch.Tensor) -> torch.Tensor:
    """fp64 [N, n]: Norm of a task's products with all, 0 where all are alike."""
    import torch

    span = torch.from_numpy(np.where(field.span[task] > 0, field.span[task], 1))[:, None]
    return (updates[task] * updates - torch.from_numpy(field.least[task])[:, None]) / span


def _competition(task: int, field: Field, updates: torch.Tensor) -> torch.Tensor:
    """fp64 [n]: β of a task, times the square of the number of elements; updates [N, n]."""
    import torch

    norms = _norms(task, field, updates.double())
    inter = (norms.exp() / torch.from_numpy(field.inter[task])[:, None]).sum(0)
    found: torch.Tensor = (len(updates) * norms[task]).exp() / field.intra[task] * inter
    return found


def _of_task(task: int, fields_of: Mapping[str, Field], name: str, updates: torch.Tensor) -> torch.Tensor:
    """β as elements are chosen by it."""
    return _competition(task, fields_of[name], updates).float()
