"""Models that stay in memory: masks, thresholds and merged bytes beside those of models that are read anew."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cpift_kernels import Placement, placement_of
from cpift_kernels.triton import flat_selection
from safetensors.torch import save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import open_models
from cpift.config.inputs import ScratchModel
from cpift.config.run import FusionConfig, ModelConfig, RegionsConfig
from cpift.errors import ChangedInput
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.engine import Selects
from cpift.merging.in_memory import MergeInMemory
from cpift.merging.registry import METHODS, method_named
from cpift.merging.resident import engine
from cpift.merging.resident.engine import ResidentMerging, hold_at_most, staying
from cpift.merging.resident.residents import Residents, cut, identity
from cpift.merging.resident.shard import ResidentCheckpoint
from cpift.method.masks import MasksInMemory
from cpift.method.measures import Update
from cpift.method.regions import Streaming, write_regions
from cpift.models.sources import materialise
from tests.helpers.as_gpu import as_gpu
from tests.helpers.checkpoints import SMALL, Models, make_moved, make_sharded, save_checkpoint
from tests.helpers.flat import counted_launches
from tests.helpers.merges import regions_of
from tests.helpers.placements import Lazy, Limited, queued_launches
from tests.helpers.ways_to_merge import CASES, masks_of, moments_for

ROOM = 1 << 30
CPU = torch.device("cpu")
SHARDS = [3, *(pytest.param(width, marks=pytest.mark.slow) for width in (1, 2, 5, 8))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of odd sizes, in bf16, fp32 and fp16, with ties at every threshold and a tensor that is empty."""
    return make_sharded(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def regions(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folders = {p: tmp_path_factory.mktemp(f"regions-{p}") for p in (0.0, 0.05)}
    write_regions(*models, RegionsConfig(p=0.05), folders)
    return folders


def recipe(models: Models, regions: Path, known: dict[str, Any] | None = None, **fields: Any) -> MergeInMemory:
    """A merge in memory, to be made as `place` says."""
    base, tuned = models
    inputs, config = FusionInputs(base, base, tuned, regions, list(tuned)), FusionConfig(**fields)
    method = method_named(config.method).make(Materials(inputs, config, 0, lambda wanted: []))
    method.statistics = known
    return MergeInMemory(method, None, base, 1 << 20, checked=True)


def files(made: MergeInMemory, merging: ResidentMerging | None = None) -> Any:
    """What the merged files would be, with the records of their tensors."""
    _, record = replace(made, place=merging.placing(made.method) if merging else None).make()
    assert all(check["passed"] for check in record.checks)
    return dict(record.files), list(record.tensors)


def on_shards(width: int) -> ResidentMerging:
    return ResidentMerging(None, partial(lambda residents, on_gpu: residents, Residents([None] * width, ROOM)))


@pytest.mark.parametrize("width", SHARDS)
def test_regions_have_the_same_bytes_on_any_number_of_shards(
    width: int, models: Models, tmp_path: Path, regions: dict[float, Path]
) -> None:
    merging = on_shards(width)
    assert isinstance(merging, Selects)
    folders = {p: tmp_path / str(p) for p in regions}
    for folder in folders.values():
        folder.mkdir()
    streaming = Streaming(budget=1 << 24, select=merging.select, mark=refused)
    write_regions(*models, RegionsConfig(p=0.05), folders, streaming)
    for p, folder in regions.items():
        for path in folder.iterdir():
            assert (folders[p] / path.name).read_bytes() == path.read_bytes(), (p, path.name)


def refused(*arguments: Any) -> Any:
    raise AssertionError("marked elsewhere")


@pytest.mark.parametrize("width", SHARDS)
def test_merges_have_the_same_bytes_on_any_number_of_shards(
    width: int, models: Models, regions: dict[float, Path]
) -> None:
    merging, known = on_shards(width), dict[str, Any]()
    for p, fields in ((0.05, {"omega": 0.3}), (0.05, {"omega": 0.6}), (0.0, {})):
        known = {} if p == 0.0 else known
        wanted = files(recipe(models, regions[p], **fields))
        assert files(recipe(models, regions[p], known, **fields), merging) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"conflict": "agree", "space": "delta"},
        pytest.param({"conflict": "last", "granularity": "row"}, marks=pytest.mark.slow),
        pytest.param({"conflict": "mean", "granularity": "model"}, marks=pytest.mark.slow),
        pytest.param({"transplant": False}, marks=pytest.mark.slow),
        {"method": "linear"},
    ],
    ids=str,
)
def test_whatever_is_merged(fields: dict[str, Any], models: Models, regions: dict[float, Path]) -> None:
    wanted = files(recipe(models, regions[0.05], **fields))
    assert files(recipe(models, regions[0.05], {}, **fields), on_shards(3)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CASES, *METHODS} - {"cpift", "linear"}))
def test_every_way_to_merge(name: str, three: Models, tmp_path: Path) -> None:
    """In this process's memory; on a GPU those that have a form for it."""
    base, tuned = three
    tasks, fields = CASES.get(name, ({"slerp": 2, "passthrough": 1}.get(name, 3), {}))
    config = FusionConfig(method=name, **fields)
    chosen = {task: tuned[task] for task in list(tuned)[:tasks]}
    inputs = FusionInputs(base, base, chosen, tmp_path, list(chosen), moments=moments_for(base, chosen, tmp_path))
    method = method_named(name).make(Materials(inputs, config, 3, partial(masks_of, config, tmp_path / "masks")))
    made = MergeInMemory(method, None, base, 1 << 20, checked=True)
    assert files(made, on_shards(1)) == files(made)
    residents = Residents([None], ROOM)
    placed = residents.placed(method)
    assert (placed is None) == METHODS[name].needs_moments, "these are not read twice"
    if placed is not None:
        assert all(type(model) is ResidentCheckpoint for model in placed.models)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root, generator = tmp_path_factory.mktemp("three"), torch.Generator().manual_seed(4)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SMALL.items()}
    tuned = {}
    for task in ("t0", "t1", "t2"):
        moved = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        tuned[task] = Checkpoint(save_checkpoint(root / task, moved))
    return Checkpoint(save_checkpoint(root / "base", base)), tuned


def test_a_tensor_is_on_one_shard() -> None:
    for width in (1, 2, 3, 5, 8):
        for sizes in ([0, 7, 0], [5], [1, 1, 1, 100], [3] * 9):
            runs = cut(sizes, width)
            assert len(runs) == width
            assert (runs[0][0], runs[-1][1]) == (0, len(sizes))
            assert all(one[1] == other[0] for one, other in pairwise(runs))
    assert cut([3] * 9, 3) == [(0, 3), (3, 6), (6, 9)]


# ---- what is read, and what stays ------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Models, Counter[str]]:
    """θ0 and an adapter of it, and how often the adapter's values are computed, by tensor."""
    materialise(ModelConfig(scratch=ScratchModel(), dtype="bfloat16"), tmp_path / "base")
    generator, tensors = torch.Generator().manual_seed(2), dict[str, torch.Tensor]()
    for name, info in Checkpoint(tmp_path / "base").tensors.items():
        if name.endswith("q_proj.weight"):
            place = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(2, info.shape[1], generator=generator)
            tensors[f"{place}.lora_B.weight"] = torch.randn(info.shape[0], 2, generator=generator)
    (tmp_path / "x").mkdir()
    save_file(tensors, tmp_path / "x" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    return opened(tmp_path), Counter()


def opened(root: Path) -> Models:
    """As every point of a sweep opens them."""
    return open_models(root / "base", {"x": root / "x"})


@pytest.fixture
def read(adapted: tuple[Models, Counter[str]], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    (_, tuned), counts = adapted
    kind = type(tuned["x"])
    slices = kind.slice

    def counted(self: Any, name: str, start: int, stop: int) -> torch.Tensor:
        counts[name] += 1
        return slices(self, name, start, stop)

    monkeypatch.setattr(kind, "slice", counted)
    monkeypatch.setattr(kind, "gather", lambda *arguments: refused())
    return counts


@pytest.fixture
def at_most() -> Iterator[Any]:
    yield hold_at_most
    hold_at_most(0)


def test_points_compute_an_adapter_once(
    adapted: tuple[Models, Counter[str]], read: Counter[str], tmp_path: Path, at_most: Any
) -> None:
    """Selection for any p too; each point opens the models anew."""
    root = adapted[0][0].folder.parent
    at_most(ROOM)
    merging = staying(None)
    assert isinstance(merging, ResidentMerging)
    found = []
    for number, (p, omega) in enumerate([(0.1, 0.3), (0.1, 0.7), (0.02, 0.3)]):
        folder = tmp_path / f"regions-{number}"
        folder.mkdir()
        write_regions(*opened(root), RegionsConfig(p=p), {p: folder}, Streaming(select=merging.select))
        found.append(files(recipe(opened(root), folder, {}, omega=omega), merging))
    assert len(read) > 10
    assert set(read.values()) == {1}
    at_most(0)
    assert staying(None) is None
    assert files(recipe(opened(root), tmp_path / "regions-2", omega=0.3)) == found[-1]


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    base, tuned = make_moved(tmp_path)
    folder, merging = tmp_path / "regions", on_shards(2)
    folder.mkdir()
    write_regions(base, tuned, RegionsConfig(p=0.1), {0.1: folder})
    before = files(recipe((base, tuned), folder), merging)
    names, name = base.names, identity(tuned["x"])
    values = {n: tuned["x"].tensor(n) * 2 for n in names}
    save_checkpoint(tmp_path / "x", values)
    assert identity(tuned["x"]) != name
    with pytest.raises(ChangedInput):
        files(recipe((base, tuned), folder), merging)
    again = Checkpoint(tmp_path / "base"), {task: Checkpoint(tmp_path / task) for task in tuned}
    after = files(recipe(again, folder), merging)
    assert after == files(recipe(again, folder)) != before


def test_without_room_models_are_read_anew(adapted: tuple[Models, Counter[str]], tmp_path: Path) -> None:
    base, tuned = adapted[0]
    write_regions(base, tuned, RegionsConfig(p=0.1), {0.1: tmp_path})
    made = recipe((base, tuned), tmp_path)
    need = Residents([None], 0).needs(made.method.models, 1)
    assert Residents([None], need - 1).placed(made.method) is None
    residents = Residents([None], need)
    assert residents.placed(made.method) is not None
    small = ResidentMerging(None, lambda on_gpu: Residents([None], 1))
    masks = MasksInMemory(1, 1, [base.numel])
    assert small.select(Update([base, *tuned.values()], base.names), [1], masks, 1 << 24) is None
    assert files(made, small) == files(made)


def test_what_no_merge_needs_makes_room(models: Models, regions: dict[float, Path]) -> None:
    """On devices, where every model takes its bytes."""
    base, tuned = models
    residents = Residents([partial(placement_of, CPU)], 0)
    pair = {"t0": tuned["t0"]}, {"t1": tuned["t1"]}
    residents.limit = residents.needs([base, tuned["t1"]], 1)
    for one in (*pair, pair[0]):
        (held,) = one.values()
        assert residents.placed(recipe((base, one), regions[0.05]).method) is not None
        shard = residents._shards[0]
        masks = {key for key in shard.keys if isinstance(key, tuple) and len(key) == 2}
        assert shard.keys - masks == {identity(base), identity(held)}


# ---- in a GPU's memory -----------------------------------------------------------------------------------------------


def on_device(places: list[Placement]) -> ResidentMerging:
    residents = Residents([partial(lambda place: place, place) for place in places], ROOM)
    return ResidentMerging(None, lambda on_gpu: residents)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_moved(tmp_path_factory.mktemp("small"), steps=True)


@pytest.fixture(scope="module")
def of_small(small: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return regions_of(small, 0.1, tmp_path_factory.mktemp("regions"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2])
def test_on_devices_it_is_the_cpus(width: int, small: Models, of_small: Path, tmp_path: Path) -> None:
    wanted = [files(recipe(small, of_small, omega=omega)) for omega in (0.3, 0.6)]
    merging, known = on_device([placement_of(CPU)] * width), dict[str, Any]()
    with as_gpu() as launches:
        folders = {0.1: tmp_path}
        write_regions(*small, RegionsConfig(p=0.1), folders, Streaming(select=merging.select, mark=refused))
        assert launches["mark_kernel"] == launches["collect_all_kernel"] == width, "in one pass a shard"
        for path in of_small.iterdir():
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
        found, counts = [], []
        for omega in (0.3, 0.6):
            launches.clear()
            found.append(files(recipe(small, of_small, known, omega=omega), merging))
            counts.append(Counter(launches))
    assert found == wanted
    at_once = ("conflict", "gram", "sum_blocks", "overlap", "apply")
    assert counts[0] == {f"{kernel}_kernel": width for kernel in at_once}, "all tensors of a shard at one pass"
    assert counts[1] == {"apply_kernel": width}, "all else was there"


@pytest.mark.slow
def test_what_is_computed_waits_for_what_it_reads(small: Models, of_small: Path) -> None:
    """On a device that does everything as late as it may; the second point copies nothing to it."""
    counts, known = Counter[str](), dict[str, Any]()
    merging = ResidentMerging(None, lambda on_gpu: residents)
    residents = Residents([lambda: Lazy(counts=counts)], ROOM)
    with as_gpu(), queued_launches():
        for omega in (0.3, 0.6):
            counts.clear()
            assert files(recipe(small, of_small, known, omega=omega), merging) == files(
                recipe(small, of_small, omega=omega)
            )
    assert counts["copies in"] == 0
    assert counts["copies compute"] == 1, "the coefficients of all tensors"
    assert counts["copies out"] == 3, "of each tensor that is not empty, and once"


@pytest.mark.parametrize("tensors", [2, 200])
def test_a_fusion_is_five_launches_and_a_wait_whatever_the_number_of_tensors(tensors: int, tmp_path: Path) -> None:
    base, *tuned = (
        Checkpoint(save_checkpoint(tmp_path / name, {f"t{n:03}": torch.full((7,), n + 0.5) for n in range(tensors)}))
        for name in ("base", "x", "y")
    )
    models = base, dict(zip(("x", "y"), tuned, strict=True))
    (tmp_path / "regions").mkdir()
    made, counts = recipe(models, regions_of(models, 0.1, tmp_path / "regions")), Counter[str]()
    residents = Residents([lambda: Lazy(("in", "compute", "out"), counts=counts)], ROOM)
    with as_gpu(), counted_launches() as launches:
        placed = residents.placed(made.method)
        assert placed is not None
        counts.clear()
        for info in base.tensors.values():
            placed.tensor(info)
    assert set(launches.values()) == {1}
    assert set(launches) == {"conflict_kernel", "overlap_kernel", "gram_kernel", "sum_blocks_kernel", "apply_kernel"}
    assert {what: count for what, count in counts.items() if what.startswith("waits")} == {"waits out": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"space": "delta", "conflict": "last"},
        {"granularity": "model", "conflict": "mean"},
        {"granularity": "row"},
        {"conflict": "agree"},
        {"transplant": False},
    ],
    ids=str,
)
def test_whatever_is_fused_on_devices(fields: dict[str, Any], small: Models, of_small: Path) -> None:
    """At one pass, or tensor by tensor where that cannot be."""
    wanted = files(recipe(small, of_small, **fields))
    with as_gpu() as launches:
        assert files(recipe(small, of_small, {}, **fields), on_device([placement_of(CPU)])) == wanted
    assert (launches["apply_kernel"] == 1) == ({"row", "agree"}.isdisjoint(fields.values()))


@pytest.mark.slow
def test_tensors_of_several_dtypes_are_fused_a_launch_for_each(tmp_path: Path) -> None:
    """One model in another dtype than the others, and tensors of two dtypes in all of these."""
    generator, found = torch.Generator().manual_seed(3), list[Checkpoint]()
    for name in ("base", "x", "y"):
        values = {one: torch.randn(shape, generator=generator) for one, shape in SMALL.items()}
        stored = {one: value if one == "b" or name == "y" else value.bfloat16() for one, value in values.items()}
        found.append(Checkpoint(save_checkpoint(tmp_path / name, stored)))
    models = found[0], dict(zip(("x", "y"), found[1:], strict=True))
    (tmp_path / "regions").mkdir()
    made = recipe(models, regions_of(models, 0.2, tmp_path / "regions"))
    wanted = files(made)
    with as_gpu() as launches:
        assert files(made, on_device([placement_of(CPU)])) == wanted
    assert launches["apply_kernel"] == launches["gram_kernel"] == 2


def test_a_selection_that_a_device_has_no_room_for_is_left_to_others(
    small: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass writes is asked for when it is launched."""

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 bytes.\nMore is said here.")

    monkeypatch.setattr(flat_selection, "launch_mark", full)
    base, tuned = small
    update = Update([base, *tuned.values()], [name for name in base.names if base.tensors[name].floating])
    with as_gpu():
        found = on_device([placement_of(CPU)]).select(update, [5], MasksInMemory(2, 1, update.sizes), 1 << 24)
    assert found is None


def test_a_device_that_is_full_leaves_it_to_others(small: Models, of_small: Path) -> None:
    merging, made = on_device([Limited(1 << 14)]), recipe(small, of_small)
    assert files(made, merging) == files(made)
    assert not engine._held
