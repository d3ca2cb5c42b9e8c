"""Regions and fusion in a process for each GPU, without one: Ray is told of two, kernels run as compiled for one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from cpift_kernels import Selection

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.cluster import cards as gpu_processes
from cpift.cluster.cards import Work, cards, on_cards
from cpift.cluster.merging import RayMerging
from cpift.config.run import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.errors import CpiftError, StageError
from cpift.formats.safetensors import TensorInfo
from cpift.merging.base import FusionInputs, Merged
from cpift.merging.engine import Merging, merge
from cpift.merging.methods.cpift import Fusion
from cpift.merging.on_device import DeviceMerging
from cpift.method.regions import Streaming, write_regions
from tests.helpers.as_gpu import as_gpu
from tests.helpers.checkpoints import make_moved, shards_of

pytestmark = pytest.mark.slow
CUDA = ResourcesConfig(device="cuda")
KERNELS = ExitStack()  # of a process with a GPU


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, namespace="cpift", log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


def stand_in(notes: Path) -> Merging:
    """What computes in a process that Ray gave a GPU; leaves the GPU's number and its launches in `notes`."""
    (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return Noting(KERNELS.enter_context(as_gpu()), notes / f"{gpu}-{os.getpid()}")


class Noting(DeviceMerging):
    def __init__(self, launches: Any, note: Path):
        super().__init__(torch.device("cpu"))
        self.launches, self.note = launches, note

    def mark(self, selection: Any, masks: Any) -> Any:
        mark = super().mark(selection, masks)
        return lambda ranges, brackets: self._noted(list(mark(ranges, brackets)))

    def merge_shards(self, *arguments: Any) -> Any:
        return self._noted(super().merge_shards(*arguments))

    def _noted(self, found: Any) -> Any:
        self.note.write_text(" ".join(sorted(self.launches)))
        return found


class DiesOnce(Fusion):
    """Kills the first process that comes to a tensor."""

    marker: Path

    def tensor(self, info: TensorInfo) -> Merged:
        if info.name == self.last and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().tensor(info)

    @property
    def last(self) -> str:
        return list(self.pretrained.tensors)[-1]


def test_bytes_are_the_cpus_whichever_gpu_computes_them_and_whoever_is_killed(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Selection, "ranges_within", lambda self, budget: self.ranges(1))  # a tensor each
    base, tuned = make_moved(tmp_path)
    merging = RayMerging(CUDA, partial(stand_in, noted(tmp_path / "notes")))
    folders = {name: tmp_path / name for name in ("here", "there", "whole", "killed")}
    for folder in folders.values():
        folder.mkdir()
    for name, mark in (("here", None), ("there", merging.mark)):
        write_regions(base, tuned, RegionsConfig(p=0.3), {0.3: folders[name]}, Streaming(mark=mark))
    assert shards_of(folders["here"]) == shards_of(folders["there"])
    assert used(tmp_path / "notes") == {"0": "collect_kernel mark_kernel", "1": "collect_kernel mark_kernel"}

    inputs = FusionInputs(base, base, tuned, folders["there"], list(tuned))
    fused(Fusion(inputs, FusionConfig()), base, folders["whole"])
    dies = DiesOnce(inputs, FusionConfig())
    dies.marker = tmp_path / "died"
    fused(dies, base, folders["killed"], RayMerging(CUDA, partial(stand_in, noted(tmp_path / "after"))))
    assert dies.marker.exists()
    assert len(shards_of(folders["whole"])) > 2  # one of them an empty tensor
    assert shards_of(folders["killed"]) == shards_of(folders["whole"])
    assert {"apply_kernel", "gram_kernel"} <= set(" ".join(used(tmp_path / "after").values()).split())


def noted(folder: Path) -> Path:
    folder.mkdir()
    return folder


def used(folder: Path) -> dict[str, str]:
    """By the number of a GPU what was launched there."""
    return {note.name.partition("-")[0]: note.read_text() for note in folder.iterdir()}


def fused(method: Fusion, base: Checkpoint, out: Path, merging: RayMerging | None = None) -> None:
    merge(method, base, out, "inputs", shard_size=1 << 10, shards_by=merging.merge_shards if merging else None)


@ray.remote(num_cpus=0, num_gpus=2)
class Holder:
    """Has all GPUs."""

    def there(self) -> None:
        """Once it has them."""


def test_what_waits_and_what_cannot_be_done_is_told(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_processes, "RETRIES", 0)
    monkeypatch.setattr(gpu_processes, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(gpu_processes, "_WAIT_SECONDS", 0.0)
    holder = Holder.remote()  # type: ignore[attr-defined]  # ray.remote makes it
    ray.get(holder.there.remote())
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        ray.kill(holder)

    works = [Work(at / 3, lambda made, number: (made, number), (at,)) for at in range(3)]
    found = dict(on_cards(works, cards(1), lambda: "made", tell))  # type: ignore[arg-type,return-value]  # any object
    assert [ray.get(found[at]) for at in range(3)] == [("made", 0), ("made", 1), ("made", 2)]
    assert said == ["resources.device cuda: waiting for one of 2 GPUs, which others hold"]

    def without() -> Merging:
        raise CpiftError("no driver")

    with pytest.raises(CpiftError, match=r"^no driver$"):
        list(on_cards(works[:1], cards(1), without, said.append))
    deadly = Work(0, lambda made: os.kill(os.getpid(), signal.SIGKILL), ())
    with pytest.raises(StageError, match="a process with a GPU was lost 1 times"):
        list(on_cards([deadly], cards(1), lambda: "made", said.append))  # type: ignore[arg-type,return-value]  # any object
