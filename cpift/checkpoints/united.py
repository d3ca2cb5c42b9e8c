"""Models with one vocabulary: the rows of embeddings and output layers in the order of one tokenizer's tokens.

A token that a model has keeps its row. One that it lacks has θ0's, else the only model's that has it, else the mean of
those that have it, unless `fusion.tokens` says whose. Rows of no token are the mean of all that are of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import Problem
from cpift.formats.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

MISSING, PADDING = -1, -2  # of rows that a model has not itself
_ROWS = 1 << 12  # that are summed together


@dataclass(frozen=True)
class Rows:
    """Where a model's rows are from. own [R]: a row of the model, or MISSING or PADDING; given: of rows that are
    MISSING, models by number and their rows, whose mean it is (none: zeros). tensors: that have such rows."""

    own: np.ndarray
    given: Mapping[int, Sequence[tuple[int, int]]] = field(repr=False)
    tensors: tuple[str, ...]


class UnitedCheckpoint(Checkpoint):
    """A model with the rows of another vocabulary; `models` are those that rows are given by."""

    def __init__(
        self,
        inner: Checkpoint,
        rows: Rows,
        models: Sequence[Checkpoint],
        rewritten: Mapping[str, Any] | None = None,
        tokens: Mapping[str, int] | None = None,
    ):
        """rewritten, tokens: of the model whose small files are written, those files and the numbers of its tokens."""
        self.folder, self.ties, self.is_apart = inner.folder, inner.ties, inner.is_apart
        self.rewritten, self.tokens = dict(rewritten or {}), dict(tokens or {})
        self.config = self.rewritten.get("config.json", inner.config)
        self._inner, self._rows, self._models, self._maps = inner, rows, list(models), {}
        self.tensors = {name: self._info(info) for name, info in inner.tensors.items()}
        self._padding = lru_cache(maxsize=4)(self._mean)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, self._rows, self._models, self.rewritten, self.tokens)

    def _info(self, info: TensorInfo) -> TensorInfo:
        shape = (len(self._rows.own), *info.shape[1:]) if info.name in self._rows.tensors else info.shape
        return TensorInfo(info.name, shape, info.kind, info.file, info.start)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._inner.files

    def require_unchanged(self) -> None:
        for model in (self._inner, *self._models):
            model.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A view where all of it is the model's own, in its order; else a copy."""
        import torch

        if name not in self._rows.tensors:
            return self._inner.slice(name, start, stop)
        width = self._width(name)
        first, last = start // width, -(-stop // width)
        found = [self._run(name, *run) for run in _runs(self._rows.own, first, last)]
        whole = found[0] if len(found) == 1 else torch.cat(found) if found else self._inner.slice(name, 0, 0)
        return whole[start - first * width : stop - first * width]

    def _run(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows first..last-1, flat, which follow one another in the model, or are of one kind."""
        width, at = self._width(name), int(self._rows.own[first])
        if at >= 0:
            return self._inner.slice(name, at * width, (at + last - first) * width)
        if at == PADDING:
            return self._padding(name).repeat(last - first)
        import torch

        return torch.cat([self._given(name, row) for row in range(first, last)])

    def _given(self, name: str, row: int) -> torch.Tensor:
        """A row that the model lacks, in its dtype."""
        import torch

        width, dtype = self._width(name), self.tensors[name].dtype
        parts = [
            self._models[model].slice(name, at * width, (at + 1) * width) for model, at in self._rows.given.get(row, ())
        ]
        if len(parts) <= 1:
            return parts[0].to(dtype) if parts else torch.zeros(width, dtype=dtype)
        return (torch.stack([part.double() for part in parts]).sum(0) / len(parts)).to(dtype)

    def _mean(self, name: str) -> torch.Tensor:
        """The mean of all rows of tokens, summed in fp64."""
        import torch

        width, total, count = self._width(name), torch.zeros(self._width(name), dtype=torch.float64), 0
        of_tokens = np.flatnonzero(self._rows.own != PADDING)
        for first, last in _stretches(of_tokens):
            for start in range(first, last, _ROWS):
                stop = min(start + _ROWS, last)
                total += self.slice(name, start * width, stop * width).view(-1, width).double().sum(0)
                count += stop - start
        return (total / max(count, 1)).to(self.tensors[name].dtype)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        import torch

        if name not in self._rows.tensors:
            return self._inner.gather(name, starts, length)
        width = self._width(name)
        places = np.minimum(starts[:, None] + np.arange(length), self.tensors[name].numel - 1)
        rows, columns = np.divmod(places, width)
        there = self._rows.own[rows]
        found = self._inner.gather(name, (np.maximum(there, 0) * width + columns).reshape(-1), 1).view(places.shape)
        for row in np.unique(rows[there < 0]):
            values = self._run(name, int(row), int(row) + 1).float()
            here = rows == row
            found[torch.from_numpy(here)] = values[torch.from_numpy(columns[here])]
        return found

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for first, last in self._stretch(name, start, stop):
            self._inner.prefetch(name, first, last)

    def release(self, name: str, start: int, stop: int) -> None:
        for first, last in self._stretch(name, start, stop):
            self._inner.release(name, first, last)

    def _stretch(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Elements of the model that a slice is made of, where they lie together."""
        if name not in self._rows.tensors:
            yield start, stop
            return
        width = self._width(name)
        own = self._rows.own[start // width : -(-stop // width)]
        own = own[own >= 0]
        if len(own) and own.max() - own.min() < 2 * len(own):
            yield int(own.min()) * width, (int(own.max()) + 1) * width

    def _width(self, name: str) -> int:
        info = self._inner.tensors[name]
        return info.numel // info.shape[0]


def _runs(own: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Rows first..last-1 in runs: rows of the model in its order, or rows of one kind that it has not."""
    part = own[first:last]
    follows = np.where(part[:-1] >= 0, part[1:] == part[:-1] + 1, part[1:] == part[:-1])
    ends = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(part)]
    yield from ((first + start, first + stop) for start, stop in pairwise(ends) if stop > start)


def _stretches(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [first, last)."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for part in np.split(numbers, breaks):
        if len(part):
            yield int(part[0]), int(part[-1]) + 1
