"""A merge in memory beside the same merge as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.disk.files import file_sha256
from cpift.errors import StageError
from cpift.merging.base import FusionInputs
from cpift.merging.engine import merge
from cpift.merging.in_memory import MergeInMemory
from cpift.merging.methods.cpift import Fusion
from cpift.merging.on_device import DeviceMerging
from cpift.method.regions import write_regions
from tests.helpers.as_gpu import as_gpu
from tests.helpers.checkpoints import save_checkpoint

SHAPES = {"a.weight": (30, 70), "b.norm": (33,), "empty": (0, 4), "one": (1,)}
SHARD = 4200  # bytes: a file for the first tensor, one for the others


@pytest.fixture
def recipe(tmp_path: Path) -> MergeInMemory:
    """θ0 in float32 and two fine-tunes, with a tensor of whole numbers that no merge touches."""
    generator = torch.Generator().manual_seed(0)
    models = {}
    for name in ("base", "x", "y"):
        tensors = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in SHAPES.items()}
        models[name] = Checkpoint(save_checkpoint(tmp_path / name, tensors | {"step": torch.arange(3)}))
    base, tuned = models.pop("base"), models
    write_regions(base, tuned, RegionsConfig(p=0.1), {0.1: tmp_path})
    fusion = Fusion(FusionInputs(base, base, tuned, tmp_path, list(tuned)), FusionConfig())
    return MergeInMemory(fusion, None, base, SHARD, checked=True)


def test_tensors_and_hashes_are_those_of_the_files(recipe: MergeInMemory, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    records = merge(recipe.method, recipe.like, folder, "inputs", shard_size=SHARD)
    tensors, record = recipe.make()
    files = {path.name: path for path in folder.glob("*.safetensors")}
    assert len(files) == 2
    assert record.files == {name: (path.stat().st_size, file_sha256(path)) for name, path in files.items()}
    assert record.tensors == records
    written = Checkpoint(folder)
    assert set(tensors) == set(written.names)
    for name, values in tensors.items():
        assert torch.equal(values.view(torch.uint8), written.mapped(name).view(torch.uint8)), name
    assert [check["passed"] for check in record.checks] == [True, True, True]


@pytest.mark.slow
def test_on_a_device_it_is_what_a_merge_there_writes(recipe: MergeInMemory, tmp_path: Path) -> None:
    """With one angle for the whole model, which is found before anything is placed."""
    assert isinstance(recipe.method, Fusion)
    one, other = (Fusion(recipe.method.inputs, FusionConfig(granularity="model")) for _ in range(2))
    merging, folder = DeviceMerging(torch.device("cpu")), tmp_path / "written"
    folder.mkdir()
    with as_gpu() as launches:
        merge(one, recipe.like, folder, "inputs", shard_size=SHARD, shards_by=merging.merge_shards)
        _, record = replace(recipe, method=other, place=merging.placing(other)).make()
    assert launches["apply_kernel"] > 0
    written = {path.name: file_sha256(path) for path in folder.glob("*.safetensors")}
    assert {name: sha256 for name, (_, sha256) in record.files.items()} == written


def test_a_result_that_is_not_its_definition_is_no_result(
    recipe: MergeInMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = Fusion.merged

    def wrong(self: Fusion, info: object) -> object:
        record, fill = merged(self, info)  # type: ignore[arg-type]
        return record, lambda start, stop, out: (fill(start, stop, out), out.mul_(1.5))

    monkeypatch.setattr(Fusion, "merged", wrong)
    with pytest.raises(StageError, match=r"was not scored:\n  - sampled elements in no core .* beyond rounding"):
        recipe.make()
