"""Merges with slices on a device that does things when it has to, or has little memory: the CPU's bytes or an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cpift_kernels import Placement, lane_bytes, placement

from cpift.checkpoints import slices
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import sweep
from cpift.config.run import FusionConfig, RegionsConfig, RunConfig
from cpift.merging.base import FusionInputs, Materials, MergeMethod
from cpift.merging.engine import merge
from cpift.merging.gpu import choice
from cpift.merging.gpu.choice import AutoMerging
from cpift.merging.gpu.lanes import GpuMemoryError
from cpift.merging.gpu.room import merge_holds
from cpift.merging.on_device import DeviceMerging
from cpift.merging.registry import method_named
from cpift.method.regions import Streaming, write_regions
from tests.helpers.as_gpu import as_gpu
from tests.helpers.checkpoints import Models, make_moved
from tests.helpers.merges import regions_of
from tests.helpers.placements import CPU, Lazy, Limited, placing, queued_launches

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors have several slices, these several slots, and slots and buffers are used again."""
    monkeypatch.setattr(slices, "SLICE", 512)
    monkeypatch.setattr(placement, "SLOT", 1 << 10)
    monkeypatch.setattr(placement, "BUFFER", 1 << 11)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_moved(tmp_path_factory.mktemp("models"), steps=True)


@pytest.fixture(scope="module")
def regions(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return regions_of(models, 0.3, tmp_path_factory.mktemp("regions"))


def method_of(models: Models, regions: Path, fields: Mapping[str, Any]) -> MergeMethod:
    base, tuned = models
    inputs, config = FusionInputs(base, base, tuned, regions, list(tuned)), FusionConfig(**fields)
    return method_named(config.method).make(Materials(inputs, config, 0, lambda wanted: [regions]))


@contextmanager
def queued() -> Iterator[None]:
    with as_gpu(), queued_launches():
        yield


def written(method: MergeMethod, like: Checkpoint, out: Path, merging: Any = None, budget: int = 1 << 30) -> bytes:
    out.mkdir()
    by = merging.merge_shards if merging else None
    merge(method, like, out, "inputs", shard_size=10**9, budget=budget, shards_by=by)
    return (out / "model.safetensors").read_bytes()


def lazy(eager: Any = (), without: Any = None) -> tuple[DeviceMerging, Counter[str]]:
    counts: Counter[str] = Counter()
    return DeviceMerging(CPU, placing(lambda: Lazy(eager, without, counts))), counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "eager"),
    [
        ({"method": "slerp"}, ()),
        pytest.param({"method": "linear"}, ("in", "out"), marks=SLOW),
        pytest.param({"conflict": "magnitude"}, (), marks=SLOW),
        pytest.param({"conflict": "agree", "space": "delta"}, ("in",), marks=SLOW),
        pytest.param({"conflict": "mean", "granularity": "row"}, ("out",), marks=SLOW),
        pytest.param({"conflict": "last", "granularity": "model"}, ("compute", "in"), marks=SLOW),
    ],
    ids=str,
)
def test_a_file_does_not_depend_on_when_a_device_does_what(
    fields: Mapping[str, Any], eager: Any, models: Models, regions: Path, tmp_path: Path
) -> None:
    method = method_of(models, regions, fields)
    wanted = written(method, models[0], tmp_path / "cpu")
    merging, counts = lazy(eager)
    with queued():
        assert written(method_of(models, regions, fields), models[0], tmp_path / "gpu", merging) == wanted
    parts = sum(len(method.pieces(info)) for info in models[0].tensors.values() if method.merges(info))
    assert counts["copies out"] == parts
    assert counts["launches"] >= parts


def filled(method: MergeMethod, infos: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors by one thread: nothing is waited for before a tensor was launched, but what lanes wait for."""
    tensors = {}
    for info in (info for info in infos.values() if method.merges(info)):
        tensors[info.name] = torch.zeros(info.numel, dtype=info.dtype)
        _, fill = placed_tensor(method, info)
        parts = sweep(method.at(info.name).models, info, method.pieces(info))
        readies = [fill(start, stop, tensors[info.name][start:stop]) for start, stop in parts]
        for ready in readies:
            if ready is not None:
                ready()
    return tensors


def placed_tensor(method: Any, info: Any) -> Any:
    return method.tensor(info)


@pytest.mark.parametrize(
    ("without", "eager"),
    [
        (None, ("in",)),
        (("compute", "in"), ()),
        pytest.param(("in", "compute"), ("in",), marks=SLOW),
        pytest.param(("out", "compute"), ("out",), marks=SLOW),
        pytest.param(("host", "in"), (), marks=SLOW),
        pytest.param(("host", "out"), (), marks=SLOW),
    ],
    ids=str,
)
def test_without_a_wait_bytes_are_wrong(without: Any, eager: Any, models: Models, regions: Path) -> None:
    method, infos = method_of(models, regions, {"method": "linear"}), models[0].tensors
    merging, _ = lazy(eager, without)
    wanted = filled(method, infos)
    with queued():
        placed = merging.placing(method)(method)
        placed.merges = method.merges  # type: ignore[method-assign]  # what a merge asks of the host's
        found = filled(placed, infos)
    same = all(torch.equal(found[name], values) for name, values in wanted.items())
    assert same == (without is None)


# ---- memory ----------------------------------------------------------------------------------------------------------


def limited(limit: int) -> tuple[DeviceMerging, list[Limited]]:
    made: list[Limited] = []

    def make() -> Placement:
        made.append(Limited(limit))
        return made[-1]

    return DeviceMerging(CPU, placing(make)), made


def test_what_a_lane_holds_is_bounded(models: Models, regions: Path, tmp_path: Path) -> None:
    """Two slices of each model and the results on their way, whatever the tensor; bytes are the CPU's."""
    method = method_of(models, regions, {"method": "slerp"})
    wanted = written(method, models[0], tmp_path / "cpu")
    bound = lane_bytes(2 * len(method.models))
    assert bound == 2 * 2 * placement.BUFFER + (placement.LEAVING + 1) * 512 * 4
    merging, made = limited(bound)
    assert written(method, models[0], tmp_path / "gpu", merging) == wanted
    assert max(place.most for place in made) <= bound


def test_a_plan_counts_what_two_lanes_hold_of_all_models() -> None:
    tasks = [{"name": name, "checkpoint": {"path": name}} for name in ("a", "b")]
    for source, models in (("pretrained", 3), ("c", 4)):
        fields: dict[str, Any] = {"model": {"path": "base"}, "tasks": tasks, "backbone": {"source": source}}
        assert merge_holds(RunConfig(name="m", **fields)) == 2 * lane_bytes(2 * models)


def select(models: Models, regions: Path, out: Path, merging: Any) -> None:
    out.mkdir()
    write_regions(*models, RegionsConfig(p=0.3), {0.3: out}, Streaming(mark=merging.mark))


def fuse(models: Models, regions: Path, out: Path, merging: Any) -> None:
    written(method_of(models, regions, {"method": "slerp"}), models[0], out, merging)


@pytest.mark.slow
@pytest.mark.parametrize("work", [select, fuse])
def test_too_little_memory_names_the_field_and_what_to_do(
    work: Callable[..., None], models: Models, regions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging, _ = limited(3 * placement.BUFFER)
    told = "resources.device: the GPU has no room for the slices of all models .CUDA out of memory. Tried to allocate"
    with as_gpu(), pytest.raises(GpuMemoryError, match=f"{told} .* → use `cpu`, or end what else holds its memory"):
        work(models, regions, tmp_path / "gpu", merging)
    monkeypatch.setattr(choice, "LEAST", 1)
    monkeypatch.setattr(choice, "_TAKEN", {})
    said: list[str] = []
    with as_gpu():
        auto = AutoMerging(merging, lambda done: done() or 1.0).telling(said.append)  # type: ignore[func-returns-value]  # a time
        work(models, regions, tmp_path / "auto", auto)
    assert ["on the CPU: the GPU has no room for the slices of all models" in line for line in said] == [True]


def test_pinned_memory_is_part_of_the_budget(models: Models, regions: Path, tmp_path: Path) -> None:
    method, slice_bytes = method_of(models, regions, {"method": "slerp"}), 512 * 4
    enough = (2 * 2 + 1 + 2) * slice_bytes  # as engine.buffers_within has it, without what is pinned
    merging, _ = limited(1 << 30)
    written(method, models[0], tmp_path / "cpu", None, enough)
    with pytest.raises(Exception, match=r"resources\.memory_budget: 0 MiB is too little .* give at least 33 MiB"):
        written(method, models[0], tmp_path / "gpu", merging, enough)
