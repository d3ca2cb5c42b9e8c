"""Tensors of models, and masks, in the memory of one device: copied there once, whole, and read there from then on.

On the processors nothing is copied that a file's pages already hold: what stays is what was computed, of adapters and
of models with another vocabulary. There the masks' files are read where they are mapped, too. A process that reads
files over a network has copies of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cpift_kernels import FlatLayout, Lane, Placement

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import pieces
from cpift.disk.mapped import file_version
from cpift.errors import ChangedInput, Problem
from cpift.merging.gpu.lanes import within_memory
from cpift.method.masks import RegionMasks

if TYPE_CHECKING:
    import torch

Read = Callable[[int, int], "torch.Tensor"]


class ResidentShard:
    """What one device holds (`merging.base.Destination`).

    place: makes queues of the device's own; None for this process's memory. `model` needs names of models that stay
    the same as long as these are (`residents.identity`). apart: what files hold is copied there too.
    """

    def __init__(
        self,
        place: Callable[[], Placement] | None = None,
        key: Callable[[Checkpoint], Hashable] = id,
        apart: bool = False,
    ):
        self.place, self._key, self._apart = place, key, apart
        self._held: dict[Hashable, dict[Hashable, torch.Tensor]] = {}
        self._lock = threading.Lock()

    def model(self, model: Checkpoint) -> Checkpoint:
        """The same model; its tensors lie here from when they are asked for first."""
        return ResidentCheckpoint(model, self, self._key(model))

    def masks(self, masks: RegionMasks) -> RegionMasks:
        return masks if self.place is None else ResidentMasks(masks, self)

    def forget(self, but: Iterable[Hashable]) -> None:
        """Free all models and masks but these."""
        kept = set(but)
        with self._lock:
            self._held = {key: tensors for key, tensors in self._held.items() if key in kept}

    @property
    def keys(self) -> set[Hashable]:
        """What models and masks are here."""
        return set(self._held)

    def tensor(self, key: Hashable, name: Hashable, numel: int, read: Read, check: Callable[[], None]) -> torch.Tensor:
        """A tensor, or a mask, flat; `read` gives elements start..stop-1 on the host, `check` raises if that is not
        what `key` names.

        Raises GpuMemoryError where the device has no room."""
        with self._lock:
            known = self._held.setdefault(key, {})
            if name not in known:
                values = _copied(self.place(), numel, read) if self.place else read(0, numel)
                values = values.clone() if self._apart and self.place is None else values
                check()
                known[name] = values
            return known[name]

    def together(
        self, key: Hashable, names: Sequence[Hashable], parts: Sequence[Part], total: int, check: Callable[[], None]
    ) -> torch.Tensor:
        """Tensors, or masks, in one buffer of `total` elements, which is 0 between them; each is a view of it from then
        on. parts: of each of `names` its place and what reads it; `check` as for `tensor`.

        Raises GpuMemoryError where the device has no room."""
        assert self.place is not None
        with self._lock:
            known, group = self._held.setdefault(key, {}), Together(frozenset(names))
            if group not in known:
                _drop(known, group.names)
                values = _joined(self.place(), parts, total)
                check()
                views = [values[part.start : part.start + part.numel] for part in parts]
                known |= {group: values, **dict(zip(names, views, strict=True))}
            return known[group]

    def require(self, key: Hashable, model: Checkpoint) -> None:
        """Raise ChangedInput unless the model's files are still those that `key` names."""
        model.require_unchanged()
        if self._key(model) != key:
            remedy = "put it back; the same command goes on with what it has finished"
            problem = Problem(str(model.folder), "was replaced or written to while it was read", remedy)
            raise ChangedInput("what is made of it", [problem], resumable=True)


@dataclass(frozen=True)
class Part:
    """Elements start..start+numel-1 of a buffer, and what reads them on the host, see `ResidentShard.tensor`."""

    start: int
    numel: int
    read: Read


@dataclass(frozen=True)
class Together:
    """What names a buffer of several tensors among what is held."""

    names: frozenset[Hashable]


def _drop(known: dict[Hashable, torch.Tensor], names: frozenset[Hashable]) -> None:
    """Free these tensors where they lie otherwise, and those that lie with them."""
    for other in [one for one in known if isinstance(one, Together) and one.names & names]:
        names |= other.names
        del known[other]
    for name in names:
        known.pop(name, None)


def _joined(place: Placement, parts: Sequence[Part], total: int) -> torch.Tensor:
    first = next(part.read(0, 1) for part in parts if part.numel)
    with within_memory():
        target = place.room(total * first.itemsize, "compute").view(first.dtype)
        with place.computing():
            target.zero_()
        runs = [(part, *run) for part in parts for run in pieces(part.numel)]
        Lane(place).keep(
            (part.read(start, stop), target[part.start + start : part.start + stop]) for part, start, stop in runs
        )
    return target


def _copied(place: Placement, numel: int, read: Read) -> torch.Tensor:
    first = read(0, min(1, numel))
    with within_memory():
        target = place.room(numel * first.itemsize, "compute").view(first.dtype)
        Lane(place).keep((read(start, stop), target[start:stop]) for start, stop in pieces(numel))
    return target


class ResidentCheckpoint(Checkpoint):
    """A model whose tensors are in a shard's memory."""

    def __init__(self, inner: Checkpoint, shard: ResidentShard, key: Hashable):
        self.folder, self.config, self.tensors = inner.folder, inner.config, inner.tensors
        self.ties, self.is_apart, self._maps = inner.ties, inner.is_apart, {}
        self._inner, self._shard, self._key = inner, shard, key

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._inner,)  # another process has a memory of its own

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """On the shard's device; only to read."""
        numel = self.tensors[name].numel
        whole = self._shard.tensor(self._key, name, numel, partial(self._inner.slice, name), self.require_unchanged)
        return whole[start:stop]

    def together(self, names: Sequence[str], layout: FlatLayout) -> torch.Tensor:
        """Whole tensors in one buffer on the shard's device; only to read."""
        parts = [
            Part(start, size, partial(self._inner.slice, name))
            for name, start, size in zip(names, layout.starts.tolist(), layout.sizes, strict=True)
        ]
        return self._shard.together(self._key, names, parts, layout.total, self.require_unchanged)

    def gather(self, name: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """float32 [R, length] on the host."""
        import torch

        numel = self.tensors[name].numel
        values = self.slice(name, 0, numel)
        places = np.minimum(starts[:, None] + np.arange(length), numel - 1)
        with self._shard.place().computing() if self._shard.place else nullcontext():
            return values[torch.from_numpy(places).to(values.device)].float().cpu()

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """It is here."""

    def release(self, name: str, start: int, stop: int) -> None:
        """It stays."""

    def require_unchanged(self) -> None:
        self._shard.require(self._key, self._inner)

    def unequal_copies(self) -> Iterator[Problem]:
        return self._inner.unequal_copies()


def _itself(model: Checkpoint) -> Checkpoint:
    return model


class ResidentMasks(RegionMasks):
    """Masks whose words are in a device's memory."""

    def __init__(self, inner: RegionMasks, shard: ResidentShard):
        self._inner, self._shard = inner, shard
        self._keys = {task: mask_key(file) for task, file in inner.files.items()}
        self.files, self.infos = inner.files, inner.infos

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._inner,)

    def has(self, name: str) -> bool:
        return self._inner.has(name)

    def words(self, task: str, name: str, start: int, stop: int) -> torch.Tensor:
        count, read = self.infos[task][name].numel, partial(self._read, task, name)
        words = self._shard.tensor(self._keys[task], (name, type(self._inner)), count, read, lambda: None)
        return words[start // 32 : (stop + 31) // 32]

    def together(self, task: str, names: Sequence[str], layout: FlatLayout) -> torch.Tensor:
        """The masks of whole tensors in one buffer on the shard's device; only to read."""
        parts = [
            Part(start // 32, self.infos[task][name].numel, partial(self._read, task, name))
            for name, start in zip(names, layout.starts.tolist(), strict=True)
        ]
        held = [(name, type(self._inner)) for name in names]
        return self._shard.together(self._keys[task], held, parts, layout.total // 32, lambda: None)

    def _read(self, task: str, name: str, first: int, last: int) -> torch.Tensor:
        return self._inner.words(task, name, 32 * first, 32 * last)


def mask_key(file: Path) -> Hashable:
    """What tells a file of masks from every other."""
    return str(file), file_version(file)
