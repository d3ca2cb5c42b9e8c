"""Models larger than the memory: selection in ranges, merges in slices, shards that survive a crash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cpift_kernels import select_cores, unpack_mask

from cpift.checkpoints import slices as streaming
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import pieces, sweep
from cpift.checkpoints.writing import plan_shards
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.errors import CpiftError, StageError
from cpift.formats.safetensors import FormatError, read_header
from cpift.merging.base import FusionInputs
from cpift.merging.checks import failures
from cpift.merging.engine import merge
from cpift.merging.methods.cpift import Fusion
from cpift.merging.verify import verify
from cpift.method.masks import RegionMasks, read_summary
from cpift.method.regions import Streaming, core_size, select_regions_many, write_regions
from tests.helpers.checkpoints import Models, large, save_checkpoint, shards_of


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_regions_in_ranges_are_those_of_one_call(tmp_path: Path, sharded_models: Models, scope: str) -> None:
    base, tuned = sharded_models
    ps = [0.01, 0.3]
    folders = {p: tmp_path / str(p) for p in ps}
    for folder in folders.values():
        folder.mkdir()
    config = RegionsConfig(scope=scope)  # type: ignore[arg-type]
    write_regions(base, tuned, config, folders, Streaming(budget=1))
    in_memory = select_regions_many(base, tuned, config, ps)
    for p, folder in folders.items():
        masks = RegionMasks(folder, list(tuned))
        summary = read_summary(folder)["regions"]
        for task, region in in_memory[p].items():
            assert summary[task]["count"] == region.summary.count
            assert summary[task]["threshold"] == region.summary.threshold
            for name, words in region.words.items():
                assert torch.equal(masks.words(task, name, 0, base.tensors[name].numel), words), (p, task, name)
    if scope == "global":
        tensors = [[model.tensor(name) for name in base.names] for model in (base, *tuned.values())]
        whole = select_cores(tensors[0], tensors[1:], [core_size(p, base.numel) for p in ps])
        for task, cores in zip(tuned, whole, strict=True):
            for p, core in zip(ps, cores, strict=True):
                mine = list(in_memory[p][task].words.values())
                assert all(torch.equal(a, b) for a, b in zip(mine, core.words, strict=True))


def fusion_of(tmp_path: Path, models: Models, config: FusionConfig) -> Fusion:
    base, tuned = models
    regions = tmp_path / "regions"
    if not regions.is_dir():
        regions.mkdir()
        write_regions(base, tuned, RegionsConfig(p=0.05), {0.05: regions})
    return Fusion(FusionInputs(base, base, tuned, regions, list(tuned)), config)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "row", "model"])
def test_the_budget_changes_nothing(
    tmp_path: Path, sharded_models: Models, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SLICE", 1 << 18)  # a tensor has several slices
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig(granularity=granularity))  # type: ignore[arg-type]
    found = []
    for budget in (1 << 24, 1 << 33):
        out = tmp_path / str(budget)
        out.mkdir()
        merge(fusion, fusion.inputs.backbone, out, "inputs", shard_size=10**6, budget=budget)
        assert not failures(verify(fusion, fusion.inputs.backbone, out))
        found.append(shards_of(out))
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_too_small_a_budget_says_what_is_needed(tmp_path: Path, sharded_models: Models) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CpiftError, match=r"resources\.memory_budget: 1 MiB is too little .* give at least \d+ MiB"):
        merge(fusion, fusion.inputs.backbone, out, "inputs", shard_size=10**9, budget=1 << 20)
    assert list(out.iterdir()) == []


def test_an_interrupted_merge_goes_on_with_what_is_missing(
    tmp_path: Path, sharded_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig())
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    wanted = merge(fusion, fusion.inputs.backbone, whole, "inputs", shard_size=10**6)

    def stop(elements: int, name: str) -> None:
        if name == "c.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(fusion, fusion.inputs.backbone, resumed, "inputs", shard_size=10**6, progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in resumed.glob("*.safetensors")}
    assert list(kept) == ["model-00001-of-00002.safetensors"]
    assert not list(resumed.glob(".*.partial"))
    assert merge(fusion, fusion.inputs.backbone, resumed, "inputs", shard_size=10**6) == wanted
    assert shards_of(resumed) == shards_of(whole)
    assert all((resumed / name).stat().st_mtime_ns == time for name, time in kept.items())
    merge(fusion, fusion.inputs.backbone, resumed, "other inputs", shard_size=10**6)
    assert all((resumed / name).stat().st_mtime_ns > time for name, time in kept.items())  # a stale shard is not taken


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, sharded_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig())
    out = tmp_path / "out"
    out.mkdir()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cpift.formats.safetensors.os.pwrite", full)
    with pytest.raises(StageError, match="No space left on device → mend that"):
        merge(fusion, fusion.inputs.backbone, out, "inputs", shard_size=10**6)
    assert list(out.iterdir()) == []


def test_an_input_that_goes_away_is_not_told_as_a_full_disk(
    tmp_path: Path, sharded_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = sharded_models
    gone = Checkpoint(save_checkpoint(tmp_path / "gone", large(9)))
    fusion = fusion_of(tmp_path, (base, tuned), FusionConfig())
    fusion = Fusion(replace(fusion.inputs, backbone=gone), FusionConfig())
    (gone.folder / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"gone/model\.safetensors could not be read: No such file"):
        merge(fusion, base, tmp_path / "out", "inputs", shard_size=10**6)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_without_room_is_met_before_the_work(
    tmp_path: Path, sharded_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig())
    monkeypatch.setattr("cpift.checkpoints.writing.shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(StageError, match=r"10 kB free, the merged model takes 1\.24 MB"):
        merge(fusion, fusion.inputs.backbone, tmp_path, "inputs", shard_size=10**6)


def test_shards_hold_every_tensor_once_and_agree_with_the_index(tmp_path: Path, sharded_models: Models) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig())
    out = tmp_path / "out"
    out.mkdir()
    merge(fusion, fusion.inputs.backbone, out, "inputs", shard_size=10**6)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    places = {info.name: file.name for file in out.glob("*.safetensors") for info in read_header(file)}
    assert places == index["weight_map"]
    assert sorted(places) == list(fusion.inputs.backbone.names) == list(Checkpoint(out).names)
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in fusion.inputs.backbone.tensors.values())
    one = plan_shards(fusion.inputs.backbone.tensors.values(), 10**9)
    assert [shard.name for shard in one] == ["model.safetensors"]


def test_slices_cover_a_tensor_in_order() -> None:
    assert pieces(0) == []
    assert pieces(streaming.SLICE + 1) == [(0, streaming.SLICE), (streaming.SLICE, streaming.SLICE + 1)]
    rows = pieces(100 * 70_001, 70_001)
    assert rows[0][0] == 0
    assert rows[-1][1] == 100 * 70_001
    assert all(start % (32 * 70_001) == 0 for start, _ in rows)


def test_what_is_read_ahead_is_each_piece_once(sharded_models: Models) -> None:
    base, _ = sharded_models
    info, asked, released = base.tensors["a.weight"], [], []

    class Watched:
        def prefetch(self, name: str, start: int, stop: int) -> None:
            asked.append((start, stop))

        def release(self, name: str, start: int, stop: int) -> None:
            released.append((start, stop))

    parts = [(start, start + 10) for start in range(0, 60, 10)]
    assert list(sweep([Watched()], info, parts)) == parts == asked == released  # type: ignore[list-item]


def flip(file: Path, place: int, bits: int) -> None:
    """Change some of the lowest bits of the bf16 element that begins at byte `place`."""
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte[0] ^ bits]))


def test_verification_finds_a_changed_core_element(tmp_path: Path, sharded_models: Models) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig())
    out = tmp_path / "out"
    out.mkdir()
    merge(fusion, fusion.inputs.backbone, out, "inputs", shard_size=10**9)
    info = Checkpoint(out).tensors["a.weight"]
    place = int(unpack_mask(fusion.union("a.weight", 0, info.numel), info.numel).nonzero()[0])
    flip(out / "model.safetensors", info.start + 2 * place, 1)
    (said,) = failures(verify(fusion, fusion.inputs.backbone, out))
    assert re.fullmatch(r"every core element .* 1 differ", said)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "model"])
def test_verification_finds_a_changed_element_in_no_core(
    tmp_path: Path, sharded_models: Models, granularity: str, space: str
) -> None:
    fusion = fusion_of(tmp_path, sharded_models, FusionConfig(granularity=granularity, space=space))  # type: ignore[arg-type]
    out = tmp_path / "out"
    out.mkdir()
    merge(fusion, fusion.inputs.backbone, out, "inputs", shard_size=10**9)
    assert not failures(verify(fusion, fusion.inputs.backbone, out))
    info = Checkpoint(out).tensors["a.weight"]
    place = int((~unpack_mask(fusion.union("a.weight", 0, info.numel), info.numel)).nonzero()[3])
    flip(out / "model.safetensors", info.start + 2 * place, 4)  # four steps of bf16; rounding explains less than two
    (said,) = failures(verify(fusion, fusion.inputs.backbone, out))
    assert re.search(r"equal the definition of cpift .* 1 beyond rounding", said)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:4], "no header"),
        (lambda raw: raw[:-1], "its header describes"),
        (lambda raw: raw + b"x", "its header describes"),
        (lambda raw: raw.replace(b'"BF16"', b'"F8_9"'), "dtype .F8_9"),
        (lambda raw: raw.replace(b'"b.norm"', b'"empty"  '[:8]), "twice|its header"),
        (lambda raw: raw[:8] + b"{" * 40 + raw[48:], "no JSON"),
    ],
)
def test_a_damaged_file_is_told_in_words(
    tmp_path: Path, sharded_models: Models, damage: Callable[[bytes], bytes], said: str
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage((sharded_models[0].folder / "model.safetensors").read_bytes()))
    with pytest.raises(FormatError, match=said):
        read_header(file)
