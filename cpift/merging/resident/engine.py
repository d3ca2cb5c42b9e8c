"""How the trials of a sweep select and merge where the models of all points stay in memory.

A worker makes point after point from the same θ0..θN: regions for any p, Gram matrices once for every ω, merged
tensors of any point. What lies in its memory, in that of its GPUs, or in other processes that all workers ask, is
neither copied there nor computed again. Everything has the bits that it has without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cpift_kernels import Placement, placement_of

from cpift.checkpoints.writing import Shard, ShardRecord
from cpift.devices import assigned_gpus, free_on, own_gpus
from cpift.merging.base import MergeMethod
from cpift.merging.checks import OnElements
from cpift.merging.engine import Merging, Place, Tell, merge_shards
from cpift.merging.gpu.lanes import GpuMemoryError, within_memory
from cpift.merging.resident.holders import Holders
from cpift.merging.resident.residents import Residents

if TYPE_CHECKING:
    from cpift_kernels import Core, Mark, Masks, Models, Selection

GPU_SHARE = 0.85  # of a GPU's free memory, less what scoring takes
_most = 0  # bytes that this process may hold in its own memory; 0: models are read anew
_holders: Holders | None = None  # that this process asks
_held: dict[bool, Residents] = {}  # of this process, by whether on GPUs


def hold_at_most(nbytes: int) -> None:
    """From now on this process may keep models between merges, in so many bytes of its own memory (views of mapped
    files do not count), and on GPUs that are its own; 0: it keeps none."""
    global _most
    if nbytes != _most:
        _most = nbytes
        _held.clear()


def hold_or_ask(where: int | Holders) -> None:
    """`hold_at_most`, or from now on this process asks others that hold models."""
    global _holders
    _holders = where if isinstance(where, Holders) else None
    hold_at_most(0 if isinstance(where, Holders) else where)


def staying(inner: Merging | None) -> Merging | None:
    """How this process merges: with models that stay, if it may keep any. inner: how it does otherwise."""
    if _holders is not None:
        return asking(inner, _holders)
    return ResidentMerging(inner) if _most else inner


def asking(inner: Merging | None, holders: Holders) -> ResidentMerging:
    """With models that other processes hold."""
    return ResidentMerging(inner, partial(_these, holders), elsewhere=True)


def _these(holders: Holders, on_gpu: bool) -> Holders:
    return holders


class ResidentMerging:
    """Selects and merges with models that stay (`merging.engine.Merging`); what is written is written as without."""

    def __init__(
        self,
        inner: Merging | None,
        make: Callable[[bool], Residents | Holders] | None = None,
        elsewhere: bool = False,
    ):
        """make: what models stay in, told whether GPUs may be used; this process's own if not given."""
        self._inner, self._make, self._elsewhere = inner, make or _residents, elsewhere

    @property
    def in_passing(self) -> bool:
        return not self._elsewhere and (self._inner is None or self._inner.in_passing)

    def telling(self, tell: Tell) -> ResidentMerging:
        return ResidentMerging(self._inner.telling(tell) if self._inner else None, self._make, self._elsewhere)

    def session(self) -> AbstractContextManager[None]:
        return self._inner.session() if self._inner else nullcontext()

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        return self._inner.mark(selection, masks) if self._inner else selection.marking(masks)

    def select(self, models: Models, counts: Sequence[int], masks: Masks, budget: int) -> list[list[Core]] | None:
        residents = self._make(self._inner is not None)
        try:
            with within_memory():
                return residents.select(models, counts, masks, budget)
        except GpuMemoryError:
            return None

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        merge = self._inner.merge_shards if self._inner else merge_shards
        return merge(method, shards, out, made_from, budget, progress)

    def placing(self, method: MergeMethod) -> Place:
        return partial(
            _placed, self._inner is not None, self._inner.placing(method) if self._inner else None, self._make
        )

    def publish(self, folder: Path, fingerprint: str) -> None:
        if self._inner:
            self._inner.publish(folder, fingerprint)


def _placed(
    on_gpu: bool, otherwise: Place | None, make: Callable[[bool], Residents | Holders], method: MergeMethod
) -> MergeMethod:
    """The method over models that stay in the process that this is called in, or in those that it asks."""
    placed = None
    if _most or make is not _residents:
        try:
            placed = make(on_gpu).placed(method)
        except GpuMemoryError:
            _held.clear()
    if placed is not None:
        return placed
    return otherwise(method) if otherwise else method


def _residents(on_gpu: bool) -> Residents:
    on_gpu = on_gpu and assigned_gpus() != 0
    if on_gpu not in _held:
        _held[on_gpu] = _on_gpus() if on_gpu else Residents([None], _most)
    return _held[on_gpu]


def _on_gpus() -> Residents:
    """A shard on every GPU of a worker of Ray, and on one of a process that is none."""
    devices = own_gpus()
    free = min(map(free_on, devices))
    places: list[Callable[[], Placement]] = [partial(placement_of, device) for device in devices]
    return Residents(places, int(GPU_SHARE * free * len(devices)))
