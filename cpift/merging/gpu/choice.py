"""`resources.device: auto` where there is a GPU: it or the processors, whichever is faster on what is to be done.

Both do the first elements of a pass as the pass does them, and nothing of that is kept: masks and models have the same
bytes wherever they are computed. What was taken is kept for the rest of this process.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cpift_kernels import stream_cores

from cpift.checkpoints.slices import sweep
from cpift.checkpoints.writing import Shard, ShardRecord
from cpift.devices import assigned_gpus
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import MergeMethod
from cpift.merging.checks import OnElements
from cpift.merging.engine import Merging, Place, Tell, merge_shards
from cpift.merging.gpu.lanes import GpuMemoryError
from cpift.method.measures import without_passing

if TYPE_CHECKING:
    import numpy as np
    from cpift_kernels import Mark, Marked, Masks, Range, Selection

SAMPLE = 1 << 26  # elements of every model that both are timed on, at most
LEAST = 1 << 20  # elements that take long enough to be timed

Work: TypeAlias = Callable[[], None]
Timer: TypeAlias = Callable[[Work], float]

_TAKEN: dict[tuple[str, int, int], bool] = {}  # by pass, models and threads: whether the GPU was faster


def seconds_of(work: Work) -> float:
    """What some work takes once its kernels are compiled and its inputs are in the page cache: it is done twice."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True)
class _Pass:
    """One pass over some models of `total` elements each; both do its first `elements`."""

    title: str
    models: int
    elements: int
    total: int
    on_cpu: Work
    on_gpu: Work

    def __str__(self) -> str:
        part = f"the first {self.elements:,} of {self.total:,}" if self.elements < self.total else f"all {self.total:,}"
        return f"{part} elements of {self.models} models"


class AutoMerging:
    """How a pipeline selects and merges where a GPU may be slower than the processors (`merging.engine.Merging`).

    gpu: how it does on the GPU. timer: seconds of some work. tells: who is told what was taken, and why. where: what
    they are told of the GPU's place.
    """

    in_passing = True

    def __init__(self, gpu: Merging, timer: Timer | None = None, tells: Sequence[Tell] = (), where: str = "on the GPU"):
        self._gpu, self._timer, self._tells, self._where = gpu, timer or seconds_of, tuple(tells), where

    def __getstate__(self) -> dict[str, Any]:
        """For another process, in which nobody is told."""
        return self.__dict__ | {"_tells": ()}

    def telling(self, tell: Tell) -> AutoMerging:
        """It tells this one too."""
        return AutoMerging(self._gpu, self._timer, (*self._tells, tell), self._where)

    def session(self) -> AbstractContextManager[None]:
        return self._gpu.session()

    def publish(self, folder: Path, fingerprint: str) -> None:
        self._gpu.publish(folder, fingerprint)

    def mark(self, selection: Selection, masks: Masks) -> Mark:
        """Marks ranges where the first of them took less time. On a GPU no changes are measured in passing."""

        def mark(ranges: Sequence[Range], brackets: np.ndarray) -> Iterable[Marked]:
            unmeasured = stream_cores(without_passing(selection.models), selection.counts)
            if self._takes_gpu(_marking(self._gpu, unmeasured, ranges, brackets)):
                return self._gpu.mark(unmeasured, masks)(ranges, brackets)
            return selection.marking(masks)(ranges, brackets)

        return mark

    def merge_shards(
        self, method: MergeMethod, shards: Sequence[Shard], out: Path, made_from: str, budget: int, progress: OnElements
    ) -> dict[str, ShardRecord]:
        """`merging.engine.merge_shards` where the first tensors took less time."""
        infos = [info for shard in shards for info in shard.tensors]
        merge = self._gpu.merge_shards if self._fuses_on_gpu(method, infos) else merge_shards
        return merge(method, shards, out, made_from, budget, progress)

    def placing(self, method: MergeMethod) -> Place:
        """It computes where its first tensors took less time, in the process that computes it; on the processors of one
        without a GPU."""
        return partial(_chosen, self)

    def _placed(self, method: MergeMethod) -> MergeMethod:
        on_gpu = self._fuses_on_gpu(method, list(method.models[0].tensors.values()))
        return self._gpu.placing(method)(method) if on_gpu else method

    def _fuses_on_gpu(self, method: MergeMethod, infos: Sequence[TensorInfo]) -> bool:
        merged = [info for info in infos if method.merges(info) and info.numel]
        return bool(method.leaves_host and merged) and self._takes_gpu(_fusion(self._gpu, method, merged))

    def _takes_gpu(self, one: _Pass) -> bool:
        import torch

        threads = torch.get_num_threads()
        key = one.title, one.models, threads
        if key not in _TAKEN:
            if one.elements < LEAST:
                self._say(f"{one.title} on the CPU: {one} are too few to be timed on the GPU")
                return False
            _TAKEN[key] = self._faster(one, threads)
        return _TAKEN[key]

    def _faster(self, one: _Pass, threads: int) -> bool:
        try:
            gpu = self._timer(one.on_gpu)
        except GpuMemoryError as error:
            why = str(error).partition(" → ")[0].removeprefix("resources.device: ")
            self._say(f"{one.title} on the CPU: {why}")
            return False
        cpu = self._timer(one.on_cpu)
        where = self._where if gpu < cpu else "on the CPU"
        times = f"{gpu:.2f} s on the GPU, {cpu:.2f} s on {threads} threads"
        self._say(f"{one.title} {where}: {times}, for {one}")
        return gpu < cpu

    def _say(self, text: str) -> None:
        for tell in self._tells:
            tell(f"resources.device auto: {text}")


def _chosen(choosing: AutoMerging, method: MergeMethod) -> MergeMethod:
    return method if assigned_gpus() == 0 else choosing._placed(method)


# ---- what both are timed on ------------------------------------------------------------------------------------------


def _marking(gpu: Merging, selection: Selection, ranges: Sequence[Range], brackets: np.ndarray) -> _Pass:
    sizes = [sum(stop - start for _, start, stop in selection.pieces(part)) for part in ranges]
    sample, elements = 0, 0
    while sample < len(sizes) and elements < SAMPLE:
        sample, elements = sample + 1, elements + sizes[sample]

    def through(mark: Mark) -> Work:
        return lambda: _exhaust(mark(ranges[:sample], brackets))

    on_cpu, on_gpu = selection.marking(_Unkept()), gpu.mark(selection, _Unkept())
    models = selection.models.tasks + 1
    return _Pass("core regions", models, elements, sum(sizes), through(on_cpu), through(on_gpu))


def _exhaust(marked: Iterable[Marked]) -> None:
    deque(marked, maxlen=0)


class _Unkept:
    """Masks that nobody reads."""

    def store(self, task: int, k: int, tensor: int, first: int, words: np.ndarray) -> None:
        """Of no use."""

    def words(self, task: int, k: int, tensor: int) -> np.ndarray:
        raise NotImplementedError("marking writes masks and reads none")


def _fusion(gpu: Merging, method: MergeMethod, infos: Sequence[TensorInfo]) -> _Pass:
    """Of whole tensors, for a tensor's factors may follow from all of it."""
    sample, left = list[TensorInfo](), SAMPLE
    for info in infos:
        if info.numel <= left:
            sample, left = [*sample, info], left - info.numel
    sample = sample or [min(infos, key=lambda info: info.numel)]
    fresh = copy.copy(method)
    fresh.statistics = None  # else the second would find what the first has read
    sizes = sum(info.numel for info in sample), sum(info.numel for info in infos)
    title = f"merging by {method.config.method_name}"
    return _Pass(
        title, len(method.models), *sizes, _merging(fresh, sample), _merging(gpu.placing(fresh)(fresh), sample)
    )


def _merging(method: MergeMethod, infos: Sequence[TensorInfo]) -> Work:
    import torch

    def work() -> None:
        for info in infos:
            _, fill = method.tensor(info)
            filled = []
            for start, stop in sweep(method.at(info.name).models, info, method.pieces(info)):
                filled.append(fill(start, stop, torch.empty(stop - start, dtype=info.dtype)))
            for ready in filled:
                if ready is not None:
                    ready()

    return work
