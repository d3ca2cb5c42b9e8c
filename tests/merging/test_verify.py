"""Faults planted in a merge whose slices are looked at while they are merged: each is found, and by which check."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints import slices
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.disk.files import link_or_copy
from cpift.errors import CheckpointError, CpiftError
from cpift.merging import verify as verifying
from cpift.merging.base import FusionInputs, MergeMethod
from cpift.merging.checks import CheckedFile, failures
from cpift.merging.engine import merge
from cpift.merging.methods import cpift as fusing
from cpift.merging.methods.cpift import Fusion
from cpift.merging.methods.linear import Linear
from cpift.merging.registry import method_named
from cpift.merging.verify import verify
from cpift.method.regions import write_regions
from tests.helpers.checkpoints import save_checkpoint

Faulty = Callable[..., Any]
AS_WRITTEN = "every file of the fused model is on the disk as it was written"


def merged(folder: Path, method: MergeMethod, like: Checkpoint, shard_size: int = 10**9) -> dict[str, CheckedFile]:
    folder.mkdir()
    checked: dict[str, CheckedFile] = {}
    merge(method, like, folder, "inputs", shard_size=shard_size, checked=checked)
    return checked


@pytest.fixture
def fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fusion:
    monkeypatch.setattr(slices, "SLICE", 64)  # a tensor has several slices
    shapes = {"one": (9, 31), "two": (9, 31), "norm": (13,), "empty": (0, 4)}
    generator = torch.Generator().manual_seed(0)
    models = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"buffer": torch.arange(4)}
        for _ in range(4)
    ]
    base, backbone, *tuned = (
        Checkpoint(save_checkpoint(tmp_path / f"m{number}", tensors)) for number, tensors in enumerate(models)
    )
    tasks = dict(zip("ab", tuned, strict=True))
    (tmp_path / "regions").mkdir()
    write_regions(base, tasks, RegionsConfig(p=0.3), {0.3: tmp_path / "regions"})
    return Fusion(FusionInputs(base, backbone, tasks, tmp_path / "regions", list(tasks)), FusionConfig())


def test_of_what_was_looked_at_only_samples_are_read_again(
    fusion: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like, out, other = fusion.inputs.backbone, tmp_path / "out", tmp_path / "other"
    checked = merged(out, fusion, like, shard_size=400)
    assert len(checked) == len(Checkpoint(out).files) > 1
    whole = verify(fusion, like, out)
    other.mkdir()
    for path in out.iterdir():
        if not path.name.startswith("."):
            link_or_copy(path, other / path.name)
    monkeypatch.setattr(verifying, "_read", lambda *_: pytest.fail("a tensor was read whole"))
    seen: list[int] = []
    checks = verify(fusion, like, other, lambda elements, name: seen.append(elements), checked)
    assert not failures(checks)
    assert [check for check in checks if check["name"] != AS_WRITTEN] == whole, "both find the same"
    assert sum(seen) == like.numel


def spoiled(values: torch.Tensor, places: torch.Tensor) -> None:
    values.view(torch.int32)[places] ^= 1


def test_a_core_element_that_is_not_its_donors_is_found_in_passing(
    fusion: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fusing.fused_apply

    def wrong(out: torch.Tensor, sources: Any, coefficients: Any, masks: Any) -> None:
        right(out, sources, coefficients, masks)
        owned = [mask for mask in masks if mask is not None]
        for number, mask in enumerate(owned):
            others = owned[:number] + owned[number + 1 :]
            sole = fusing.unpack_mask(mask & ~fusing.union_mask(others), out.numel())
            if sole.any():
                spoiled(out, sole.nonzero()[:1, 0])
                return

    monkeypatch.setattr(fusing, "fused_apply", wrong)
    checked = merged(tmp_path / "out", fusion, fusion.inputs.backbone)
    said = failures(verify(fusion, fusion.inputs.backbone, tmp_path / "out", checked=checked))
    assert any(one.startswith("every core element of the fused model equals its donor bit for bit") for one in said)
    assert said == failures(verify(fusion, fusion.inputs.backbone, tmp_path / "out")), (
        "reading everything says the same"
    )


def test_wrong_arithmetic_is_found_by_the_definition(
    fusion: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fusing.fused_apply
    monkeypatch.setattr(
        fusing, "fused_apply", lambda out, sources, factors, masks: right(out, sources, factors * 1.001, masks)
    )
    checked = merged(tmp_path / "out", fusion, fusion.inputs.backbone)
    (said,) = failures(verify(fusion, fusion.inputs.backbone, tmp_path / "out", checked=checked))
    assert "equal the definition of cpift in fp64" in said


def inputs_of_two(tmp_path: Path, value: float) -> FusionInputs:
    counts = torch.arange(7)
    made = [
        Checkpoint(save_checkpoint(tmp_path / str(n), {"n": counts, "w": torch.tensor([1.0, one])}))
        for n, one in enumerate((1.0, value, 2.0))
    ]
    return FusionInputs(made[0], made[0], {"a": made[1], "b": made[2]}, Path(), ())


def two_models(tmp_path: Path, value: float) -> Linear:
    return Linear(inputs_of_two(tmp_path, value), FusionConfig(method="linear"))


@pytest.mark.parametrize("verified", [True, False])
def test_what_is_not_finite_is_refused_in_passing_by_its_models_name(tmp_path: Path, verified: bool) -> None:
    """With checks and without: a mean has NaN where one model has it, and nothing else in it says so."""
    (tmp_path / "out").mkdir()
    checked: dict[str, CheckedFile] | None = {} if verified else None

    def made(value: float, named: str = "linear") -> None:
        inputs = inputs_of_two(tmp_path, value)
        method = method_named(named)(inputs, FusionConfig(method=named, weight=5.0))
        merge(method, inputs.backbone, tmp_path / "out", f"{value} {named}", shard_size=10**9, checked=checked)

    for bad in ("nan", "inf"):
        with pytest.raises(CheckpointError, match=r"a \(.*1\): 1 problem\n  - w: holds NaN or Inf"):
            made(float(bad))
    with pytest.raises(CpiftError, match="tensor w: gives NaN or Inf of finite models → give smaller weights"):
        made(3e38, "task_arithmetic")
    made(3.0)


def test_what_is_not_finite_later_is_found_by_reading_everything(tmp_path: Path) -> None:
    method = two_models(tmp_path, 3.0)
    checked = merged(tmp_path / "out", method, method.pretrained)
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<f", float("nan")))
    said = failures(verify(method, method.pretrained, tmp_path / "out", checked=checked))
    assert "every element of the fused model is finite: 1 tensors, wrong: w" in said


@pytest.mark.parametrize("in_passing", [True, False])
def test_a_copy_of_another_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_passing: bool) -> None:
    from cpift.merging import base

    method, right = two_models(tmp_path, 3.0), base.copy_of

    def wrong(label: str, model: Checkpoint, info: Any) -> Faulty:
        fill = right(label, model, info)

        def faulty(start: int, stop: int, out: torch.Tensor) -> Any:
            waits = fill(start, stop, out)
            out.view(-1)[2:3].add_(1)
            return waits

        return faulty

    monkeypatch.setattr(base, "copy_of", wrong)
    checked = merged(tmp_path / "out", method, method.pretrained)
    (said,) = failures(verify(method, method.pretrained, tmp_path / "out", checked=checked if in_passing else {}))
    assert said == (
        "every tensor that is not merged equals the one that it is copied from bit for bit: "
        "1 tensors compared, 1 differ, wrong: n"
    )


def flip_last(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-4, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))


def swap_tensors(file: Path) -> None:
    """Exchange the places that the header says of two tensors of one size."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    one, two = header["one"], header["two"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    changed = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(raw[:8] + changed.ljust(length) + raw[8 + length :])


@pytest.mark.parametrize(("damage", "where"), [(flip_last, "model.safetensors"), (swap_tensors, " (its header)")])
def test_a_file_that_changed_afterwards_is_named_and_read_whole(
    fusion: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], where: str
) -> None:
    checked = merged(tmp_path / "out", fusion, fusion.inputs.backbone)
    damage(tmp_path / "out" / "model.safetensors")
    read: list[str] = []
    monkeypatch.setattr(verifying, "_read", _noting(read, verifying._read))
    first, *_ = failures(verify(fusion, fusion.inputs.backbone, tmp_path / "out", checked=checked))
    assert first.startswith(f"{AS_WRITTEN}: 1 of 1 files compared, wrong: model.safetensors")
    assert first.endswith(where)
    assert sorted(read) == ["buffer", "norm", "one", "two"]


def _noting(read: list[str], right: Faulty) -> Faulty:
    def noted(method: MergeMethod, written: Checkpoint, info: Any, progress: Any) -> Any:
        read.append(info.name)
        return right(method, written, info, progress)

    return noted


def test_files_of_an_earlier_attempt_are_read_whole(
    fusion: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, like = tmp_path / "out", fusion.inputs.backbone
    merged(out, fusion, like, shard_size=400)
    files = Checkpoint(out).files
    files[0].unlink()
    checked: dict[str, CheckedFile] = {}
    merge(fusion, like, out, "inputs", shard_size=400, checked=checked)
    assert list(checked) == [files[0].name]
    read: list[str] = []
    monkeypatch.setattr(verifying, "_read", _noting(read, verifying._read))
    checks = verify(fusion, like, out, checked=checked)
    assert not failures(checks)
    assert f"1 of {len(files)} files compared" in [check["detail"] for check in checks]
    assert set(read) == {name for name in like.names if name != "empty"} - checked[files[0].name].tallies.keys()


def test_a_base_that_no_element_comes_from_is_not_read(tmp_path: Path) -> None:
    """Its hash is then not among those of what was read."""
    models = [Checkpoint(save_checkpoint(tmp_path / str(n), {"w": torch.ones(2)})) for n in range(3)]
    inputs = FusionInputs(models[0], models[0], {"a": models[1], "b": models[2]}, Path(), ())
    assert not method_named("slerp")(inputs, FusionConfig(method="slerp")).reads_base
    assert method_named("task_arithmetic")(inputs, FusionConfig(method="task_arithmetic")).reads_base
    assert two_models(tmp_path / "with integers", 3.0).reads_base, "integers are copied from it"
