"""A fine-tune whose file has another layout than θ0's, read under θ0's names.

Experts in one stack or each for itself, a prefix more or less, buffers of an earlier release: one model, written by
another program. Both files are brought to the parameters of θ0's class (`layout`), and there they meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout, is_buffer, layout_of
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import TensorInfo, dtype_name
from cpift.pretrained.architecture import CONFIG, skeleton
from cpift.pretrained.conversion import RESAVE, Block, Shape, wrapping_prefix

if TYPE_CHECKING:
    import torch

_MOST_RUNS = 1 << 20  # of one tensor; more than that is a transposition, which no slice of a file gives


def in_layout_of(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`other` under the names of `base`: itself where these are its own, or where it is another model.

    What `base` has and its class does not load comes from `base` where `other` lacks it; buffers that `other` has and
    the class does not load are left out.
    """
    if set(base.tensors) == set(other.tensors) or not (base.folder / CONFIG).is_file():
        return other
    try:
        network = skeleton(base.folder)
        prefix = wrapping_prefix(network, _sizes(other))
        mine, theirs = layout_of(network, _sizes(base)), layout_of(network, _sizes(other, prefix))
    except CheckpointError:
        return other
    return RelaidCheckpoint(other, base, mine, theirs, prefix) if _shares(mine, theirs) else other


def _sizes(model: Checkpoint, prefix: str = "") -> dict[str, Shape]:
    return {name.removeprefix(prefix): info.shape for name, info in model.tensors.items()}


def _shares(mine: Layout, theirs: Layout) -> bool:
    return bool(set(mine.blocks) & set(theirs.blocks))


@dataclass(frozen=True)
class _Runs:
    """A tensor as stretches of elements of another file's: at `here` begin those of tensors[of] at `there`."""

    tensors: tuple[str, ...]
    here: np.ndarray  # int64 [R], ascending from 0
    of: np.ndarray
    there: np.ndarray
    whole: bool = False  # it is a tensor of the other file, whatever shape that has

    def prefixed(self, prefix: str) -> _Runs:
        return replace(self, tensors=tuple(prefix + name for name in self.tensors))

    def between(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """(tensor, first element there, first and last+1 here), in order, for elements start..stop-1."""
        first = int(np.searchsorted(self.here, start, side="right")) - 1
        last = int(np.searchsorted(self.here, stop, side="left"))
        for run in range(first, last):
            begin = max(int(self.here[run]), start)
            end = min(int(self.here[run + 1]) if run + 1 < len(self.here) else stop, stop)
            yield self.tensors[self.of[run]], int(self.there[run]) + begin - int(self.here[run]), begin, end


class RelaidCheckpoint(Checkpoint):
    """`inner` under the names of `base`.

    What the class loads and `inner` lacks is not among its tensors; what `inner` has too much is, under its own name,
    buffers apart: then it is another model.
    """

    def __init__(self, inner: Checkpoint, base: Checkpoint, mine: Layout, theirs: Layout, prefix: str):
        self.folder, self.config = inner.folder, inner.config
        self.ties, self.is_apart = inner.ties, inner.is_apart
        self._made_of = inner, base, mine, theirs, prefix
        self._inner, self._base, self._maps = inner, base, {}
        stretches = {name: _stretches(name, mine, theirs) for name in base.tensors}
        self._runs = {name: runs.prefixed(prefix) for name, runs in stretches.items() if runs is not None}
        taken = {tensor for runs in self._runs.values() for tensor in runs.tensors}
        spare = {prefix + name for name in theirs.unloaded if is_buffer(skeleton(base.folder), name)}
        self.tensors = {name: self._info(base.tensors[name], runs) for name, runs in self._runs.items()}
        self.tensors |= {name: info for name, info in inner.tensors.items() if name not in taken | spare}
        self.tensors = dict(sorted(self.tensors.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    @property
    def files(self) -> tuple[Path, ...]:
        return self._inner.files

    def apart(self) -> Checkpoint:
        return in_layout_of(self._base.apart(), self._inner.apart())

    def require_unchanged(self) -> None:
        self._inner.require_unchanged()
        self._base.require_unchanged()

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()

    def _info(self, mine: TensorInfo, runs: _Runs) -> TensorInfo:
        parts = [self._inner.tensors[name] for name in runs.tensors]
        if not parts:
            return mine
        shape = parts[0].shape if runs.whole else mine.shape
        return TensorInfo(mine.name, shape, _promoted(parts), parts[0].file, parts[0].start)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A view where the elements lie together in the file, else a copy."""
        import torch

        runs = self._runs[name]
        if not runs.tensors:
            return self._base.slice(name, start, stop)
        parts = [
            self._inner.slice(tensor, there, there + end - begin)
            for tensor, there, begin, end in runs.between(start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        dtype = self.tensors[name].dtype
        return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        import torch

        runs = self._runs[name]
        if not runs.tensors:
            return self._base.gather(name, starts, length)
        places = np.minimum(starts[:, None] + np.arange(length), self.tensors[name].numel - 1)
        run = np.searchsorted(runs.here, places, side="right") - 1
        there = torch.from_numpy(runs.there[run] + places - runs.here[run])
        out = torch.empty(places.shape)
        for number, tensor in enumerate(runs.tensors):
            mask = torch.from_numpy(runs.of[run] == number)
            out[mask] = self._inner.mapped(tensor).reshape(-1)[there[mask]].float()
        return out

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for model, tensor, first, last in self._lying(name, start, stop):
            model.prefetch(tensor, first, last)

    def release(self, name: str, start: int, stop: int) -> None:
        for model, tensor, first, last in self._lying(name, start, stop):
            model.release(tensor, first, last)

    def _lying(self, name: str, start: int, stop: int) -> Iterator[tuple[Checkpoint, str, int, int]]:
        """Where elements start..stop-1 lie: the model, its tensor, and the part of that which holds them."""
        runs, parts = self._runs[name], dict[str, tuple[int, int]]()
        if not runs.tensors:
            yield self._base, name, start, stop
        for tensor, there, begin, end in runs.between(start, stop) if runs.tensors else ():
            first, last = parts.get(tensor, (there, there))
            parts[tensor] = min(first, there), max(last, there + end - begin)
        yield from ((self._inner, tensor, first, last) for tensor, (first, last) in parts.items())


def _stretches(name: str, mine: Layout, theirs: Layout) -> _Runs | None:
    """Where the elements of a tensor lie in the other file; nowhere in it (no tensors) for what the class does not load
    and the file does not have; None where the file lacks what the class loads."""
    zero = np.zeros(1, np.int64)
    if name not in mine.places:
        return _Runs((name,) if name in theirs.unloaded else (), zero, zero, zero, whole=True)
    holders = [holder for holder, _ in mine.places[name]]
    if not all(holder in theirs.blocks for holder in holders):
        return None
    alone = theirs.same(holders[0]) if mine.same(holders[0]) == name else None
    if alone is not None:
        return _Runs((alone,), zero, zero, zero, whole=True)
    meeting = [both for holder, block in mine.places[name] for both in _meetings(block, theirs.blocks[holder])]
    tensors = tuple(dict.fromkeys(tensor for tensor, *_ in meeting))
    parts = [(*_lines(size, here, there), tensors.index(tensor)) for tensor, size, here, there in meeting]
    here = np.concatenate([part[0] for part in parts] or [zero])
    if not parts or sum(math.prod(size) for _, size, *_ in meeting) != math.prod(mine.sizes[name]):
        return None
    order = np.argsort(here)
    of = np.concatenate([np.full(len(part[0]), part[2]) for part in parts])
    return _Runs(tensors, here[order], of[order], np.concatenate([part[1] for part in parts])[order])


_Lattice = tuple[int, Shape]  # offset and strides


def _meetings(block: Block, others: Sequence[Block]) -> Iterator[tuple[str, Shape, _Lattice, _Lattice]]:
    """What a block of θ0's file and those of the other have in common: its shape, and where it lies in the two."""
    for other in others:
        start = tuple(map(max, block.start, other.start))
        ends = (min(a + n, b + m) for a, n, b, m in zip(block.start, block.size, other.start, other.size, strict=True))
        size = tuple(end - first for end, first in zip(ends, start, strict=True))
        if min(size, default=1) > 0:
            yield other.tensor, size, _lattice(block, start), _lattice(other, start)


def _lattice(block: Block, start: Shape) -> _Lattice:
    steps = zip(start, block.start, block.strides, strict=True)
    return block.offset + sum((at - first) * stride for at, first, stride in steps), block.strides


def _lines(size: Shape, here: _Lattice, there: _Lattice) -> tuple[np.ndarray, np.ndarray]:
    """Where the stretches begin that lie together in both files.

    Raises CheckpointError where these are single elements: one file has the tensor transposed.
    """
    length, dims = 1, sorted(range(len(size)), key=lambda dim: (here[1][dim], size[dim]))
    while dims and (size[dims[0]] == 1 or here[1][dims[0]] == there[1][dims[0]] == length):
        length *= size[dims.pop(0)]
    if math.prod(size[dim] for dim in dims) > max(_MOST_RUNS, 1):
        raise CheckpointError("checkpoint", [Problem("tensors", "are stored transposed", RESAVE)])
    starts = [np.array([side[0]], np.int64) for side in (here, there)]
    for dim in dims:
        steps = np.arange(size[dim], dtype=np.int64)
        starts = [
            (first[:, None] + side[1][dim] * steps).reshape(-1)
            for first, side in zip(starts, (here, there), strict=True)
        ]
    return starts[0], starts[1]


def _promoted(parts: Sequence[TensorInfo]) -> str:
    """The kind that holds the values of all parts."""
    if len({part.kind for part in parts}) == 1:
        return parts[0].kind
    import torch

    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return dtype_name(dtype)
