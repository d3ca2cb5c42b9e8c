"""Arcee Fusion: the elements of one fine-tune that matter far more than others, and θ0 elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpift.checkpoints.slices import Piece, sweep
from cpift.config.run import FusionConfig
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo
from cpift.merging.updates.measured import MeasuredMerge

if TYPE_CHECKING:
    import torch

_BITS = 16  # half of an fp32 number: order statistics are found in two passes
_QUARTERS = (0.25, 0.5, 0.75)


class ArceeFusion(MeasuredMerge):
    """A row's distributions are the softmax of its weights before and after, their divergence is taken in fp64: of
    small updates it is rounding in fp32. A tensor of one dimension is one row. Quartiles are elements: of n in order
    those at ⌊q·(n − 1)⌋. Two passes find the threshold, one merges."""

    formula = "θ1 where KL(softmax of θ1's row ‖ of θ0's)·|θ1 − θ0| ≥ median + 1.5·(Q3 − Q1) of the tensor, else θ0"
    source = "mergekit's documentation"
    fields = ()
    reads = 2

    @classmethod
    def problems(cls, config: FusionConfig, tasks: Sequence[str]) -> list[Problem]:
        if len(tasks) == 1:
            return []
        return [Problem("tasks", f"arcee_fusion is of one fine-tune, the config has {len(tasks)}", "name one")]

    @classmethod
    def described(cls, config: FusionConfig) -> str:
        return "elements beyond median + 1.5·IQR of their importance"

    @classmethod
    def row_width(cls, config: FusionConfig, info: TensorInfo) -> int:
        return info.shape[-1] if info.shape else 1

    def update(self, name: str, start: int, stop: int, updates: Sequence[torch.Tensor]) -> torch.Tensor:
        taken: torch.Tensor = self._importance(name, start, stop) >= self.known
        return updates[0] * taken

    def _importance(self, name: str, start: int, stop: int) -> torch.Tensor:
        """fp32 [stop - start], of whole rows; NaN where a model is not finite."""
        import torch

        width = self.row_width(self.config, self.pretrained.tensors[name])
        origin, (update,) = self.updates(name, start, stop)
        before, moved = origin.double().view(-1, width), update.double().view(-1, width)
        shares = torch.softmax(before, 1)
        # Σ p·log(p/q) with updates less their mean under q: what is left is of second order, and is not cancelled.
        moved = moved - (shares * moved).sum(1, keepdim=True)
        grown = torch.expm1(moved)
        norm = (shares * grown).sum(1, keepdim=True)
        divergence = (shares * (1 + grown) * moved).sum(1, keepdim=True) / (1 + norm) - torch.log1p(norm)
        return (update.double().view(-1, width).abs() * divergence.clamp(min=0)).float().view(-1)

    def measured(self, info: TensorInfo) -> float:
        """The threshold, from order statistics: by the upper half of their bits, then by the lower."""
        if not info.numel:
            return 0.0
        ranks = np.array([int(share * (info.numel - 1)) for share in _QUARTERS])
        upper = sum((np.bincount(bits >> _BITS, minlength=1 << _BITS) for bits in self._bits(info)), np.zeros(1, int))
        below = np.cumsum(upper)
        halves = np.searchsorted(below, ranks, side="right")
        lower = {half: np.zeros(1 << _BITS, int) for half in halves.tolist()}
        for bits in self._bits(info):
            for half, counts in lower.items():
                inside = bits[bits >> _BITS == half] & ((1 << _BITS) - 1)
                counts += np.bincount(inside, minlength=1 << _BITS)
        found = []
        for rank, half in zip(ranks.tolist(), halves.tolist(), strict=True):
            inside = np.cumsum(lower[half])
            rest = rank - int(below[half] - inside[-1])
            found.append(half << _BITS | int(np.searchsorted(inside, rest, side="right")))
        return _threshold(np.array(found, np.uint32).view(np.float32).astype(np.float64))

    def _bits(self, info: TensorInfo) -> Iterator[np.ndarray]:
        """The importance of all elements as whole numbers, which are ordered alike."""
        for start, stop in self._parts(info):
            yield self._importance(info.name, start, stop).numpy().view(np.uint32).astype(np.int64)

    def _parts(self, info: TensorInfo) -> Iterator[Piece]:
        for piece in sweep(self.models, info, self.pieces(info)):
            yield from self.runs(info, *piece)

    def defined(self, info: TensorInfo) -> float:
        every = [_defined_importance(origin, tuned) for origin, tuned in self._defined_rows(info, 0, info.numel)]
        ordered = np.sort(np.concatenate(every)) if every else np.zeros(1)
        return _threshold(ordered[[int(share * (len(ordered) - 1)) for share in _QUARTERS]])

    def defined_update(self, name: str, start: int, stop: int, updates: np.ndarray) -> np.ndarray:
        every = self._defined_rows(self.pretrained.tensors[name], start, stop)
        taken = np.concatenate([_defined_importance(origin, tuned) for origin, tuned in every]) >= self.known
        found: np.ndarray = updates[0] * taken
        return found

    def _defined_rows(self, info: TensorInfo, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some rows of θ0 and of θ1, fp64 [R, width]."""
        width = self.row_width(self.config, info)
        for first, last in self.runs(info, start, stop):
            values = [model.slice(info.name, first, last).double().numpy() for model in self.models]
            yield values[0].reshape(-1, width), values[1].reshape(-1, width)


def _defined_importance(origin: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """fp32 [R · width], by the definition of the divergence, in extended precision where there is one."""
    before, after = (_log_softmax(rows.astype(np.longdouble)) for rows in (origin, tuned))
    divergence = np.maximum((np.exp(after) * (after - before)).sum(1, keepdims=True), 0)
    moved = (tuned - origin).astype(np.float32).astype(np.float64)
    found: np.ndarray = (np.abs(moved) * divergence).astype(np.float32).astype(np.float64).reshape(-1)
    return found


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    largest = rows.max(1, keepdims=True, initial=-np.inf)
    found: np.ndarray = rows - largest - np.log(np.exp(rows - largest).sum(1, keepdims=True))
    return found


def _threshold(quarters: np.ndarray) -> float:
    first, median, third = quarters.tolist()
    return float(median + 1.5 * (third - first))
