from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cpift_kernels import unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.errors import CheckpointError
from cpift.merging.base import FusionInputs
from cpift.merging.checks import failures
from cpift.merging.engine import merge
from cpift.merging.methods.cpift import Fusion, omegas
from cpift.merging.verify import verify
from cpift.method.masks import read_mask
from cpift.method.regions import save_regions, select_regions
from tests.helpers.checkpoints import random_tensors, save_checkpoint


def shifted(base: dict[str, torch.Tensor], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    moved = random_tensors(seed, torch.float32, scale=0.3)
    return {
        name: (tensor.float() + moved[name]).to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def fusion_inputs(
    tmp_path: Path, p: float, dtype: torch.dtype = torch.float32, exclude: tuple[str, ...] = (), tasks: int = 3
) -> FusionInputs:
    base = random_tensors(0, dtype)
    pretrained = Checkpoint(save_checkpoint(tmp_path / "base", base))
    backbone = Checkpoint(save_checkpoint(tmp_path / "backbone", shifted(base, 50, dtype), shards=2))
    tuned = {
        f"t{i}": Checkpoint(save_checkpoint(tmp_path / f"t{i}", shifted(base, i + 1, dtype))) for i in range(tasks)
    }
    regions = tmp_path / "regions"
    regions.mkdir()
    save_regions(select_regions(pretrained, tuned, RegionsConfig(p=p, exclude=exclude)), regions)
    return FusionInputs(pretrained, backbone, tuned, regions, priority=list(reversed(tuned)))


def fuse(
    tmp_path: Path, inputs: FusionInputs, config: FusionConfig, shard_size: int = 10**9
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    out = tmp_path / "fused"
    out.mkdir()
    fusion = Fusion(inputs, config)
    records = merge(fusion, inputs.backbone, out, "inputs", shard_size=shard_size)
    assert not failures(verify(fusion, fusion.inputs.backbone, out))
    return Checkpoint(out), records


def slerp(a: torch.Tensor, b: torch.Tensor, omega: float, epsilon: float) -> torch.Tensor:
    """The definition, in float64."""
    norms = a.norm() * b.norm()
    angle = torch.arccos((a @ b / norms).clamp(-1, 1)) if norms > 0 else torch.tensor(0.0)
    if angle < epsilon or torch.pi - angle < 0.01:  # parallel, or antiparallel: no great circle is singled out
        return (1 - omega) * a + omega * b
    return (torch.sin((1 - omega) * angle) * a + torch.sin(omega * angle) * b) / torch.sin(angle)


def vectors_of(tensor: torch.Tensor, granularity: str) -> list[torch.Tensor]:
    """Boolean selections of the vectors that a tensor falls into."""
    if granularity == "row" and tensor.dim() >= 2:
        masks = torch.zeros(tensor.shape[0], *tensor.shape, dtype=torch.bool)
        for row in range(tensor.shape[0]):
            masks[row, row] = True
        return [mask.flatten() for mask in masks]
    return [torch.ones(tensor.numel(), dtype=torch.bool)]


def expected_non_core(inputs: FusionInputs, config: FusionConfig) -> dict[str, torch.Tensor]:
    """Sequential SLERP by its definition, in float64; NaN at core positions."""
    names = [n for n in inputs.backbone.names if read_mask(inputs.regions, "t0", n) is not None]
    flat = {
        n: [m.tensor(n).double().flatten() for m in (inputs.pretrained, inputs.backbone, *inputs.tuned.values())]
        for n in names
    }
    core = {}
    for n in names:
        parts = [unpack_mask(read_mask(inputs.regions, t, n), flat[n][0].numel()) for t in inputs.tuned]  # type: ignore[arg-type]
        core[n] = torch.stack(parts).any(0)
    if config.granularity == "model":
        groups = [[(n, ~core[n]) for n in names]]
    else:
        shape = {n: inputs.backbone.tensor(n) for n in names}
        groups = [[(n, part & ~core[n])] for n in names for part in vectors_of(shape[n], config.granularity)]
    out = {n: torch.full_like(flat[n][0], float("nan")) for n in names}
    for group in groups:
        origin, start, *others = (torch.cat([flat[n][i][m] for n, m in group]) for i in range(2 + len(inputs.tuned)))
        shift = origin if config.space == "delta" else torch.zeros_like(origin)
        current = start - shift
        for omega, other in zip(omegas(config, len(others)), others, strict=True):
            current = slerp(current, other - shift, omega, config.epsilon)
        parts = (current + shift).split([int(m.sum()) for _, m in group])
        for (n, m), part in zip(group, parts, strict=True):
            out[n][m] = part
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "granularity", "omega"),
    list(itertools.product(["weights", "delta"], ["tensor", "row", "model"], ["uniform", 0.3])),
)
@pytest.mark.parametrize("p", [0.0001, 0.2])
def test_non_core_elements_are_the_sequential_slerp(
    tmp_path: Path, space: str, granularity: str, omega: object, p: float
) -> None:
    config = FusionConfig(space=space, granularity=granularity, omega=omega)  # type: ignore[arg-type]
    inputs = fusion_inputs(tmp_path, p)
    fused, _ = fuse(tmp_path, inputs, config)
    for name, wanted in expected_non_core(inputs, config).items():
        free = ~wanted.isnan()
        got = fused.tensor(name).double().flatten()
        torch.testing.assert_close(got[free], wanted[free], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("omega", ["uniform", 0.3])
def test_a_model_that_exists_keeps_its_cores_and_is_the_next_fold(
    tmp_path: Path, dtype: torch.dtype, space: str, omega: object
) -> None:
    whole = fusion_inputs(tmp_path, 0.3, dtype)
    new = {"t2": whole.tuned["t2"]}
    inputs = replace(whole, tuned=new, protected=["t0", "t1"], priority=["t2"])
    config = FusionConfig(space=space, omega=omega)  # type: ignore[arg-type]
    fused, records = fuse(tmp_path, inputs, config)
    share = 1 / 4 if omega == "uniform" else 0.3  # of θ_base and t0 to t2, the last of four
    looked_at = 0
    for record in records:
        name = record["tensor"]
        base, model, probe, got = (
            one.tensor(name).flatten() for one in (inputs.pretrained, inputs.backbone, new["t2"], fused)
        )
        cores = [unpack_mask(read_mask(inputs.regions, f"t{i}", name), got.numel()) for i in range(3)]  # type: ignore[arg-type]
        kept = cores[0] | cores[1]
        own, free = cores[2] & ~kept, ~(kept | cores[2])
        assert torch.equal(got[kept], model[kept])
        assert torch.equal(got[own], probe[own])
        assert record["core"] == int((kept | own).sum())
        shift = base.double()[free] if space == "delta" else torch.zeros(int(free.sum()), dtype=torch.float64)
        wanted = slerp(model.double()[free] - shift, probe.double()[free] - shift, share, config.epsilon) + shift
        loose = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
        torch.testing.assert_close(got.double()[free], wanted, **loose)
        looked_at += int((cores[2] & kept).sum())
    assert looked_at > 0, "some elements are core of the new task and of an earlier one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conflict", ["magnitude", "last", "mean"])
def test_core_elements_come_from_their_donor(tmp_path: Path, dtype: torch.dtype, conflict: str) -> None:
    inputs = fusion_inputs(tmp_path, 0.4, dtype)
    fused, _ = fuse(tmp_path, inputs, FusionConfig(conflict=conflict))  # type: ignore[arg-type]
    compared = 0
    for name in inputs.backbone.names:
        if read_mask(inputs.regions, "t0", name) is None:
            continue
        origin = inputs.pretrained.tensor(name).float().flatten()
        donors = torch.stack([model.tensor(name).flatten() for model in inputs.tuned.values()])
        inside = torch.stack([unpack_mask(read_mask(inputs.regions, t, name), origin.numel()) for t in inputs.tuned])  # type: ignore[arg-type]
        got = fused.tensor(name).flatten()
        for j in inside.any(0).nonzero().flatten().tolist():
            tasks = inside[:, j].nonzero().flatten().tolist()
            if conflict == "mean":
                wanted = donors[tasks, j].float().mean().to(dtype)
            elif conflict == "last":  # the priority is the reverse of the task order: the first task is last
                wanted = donors[min(tasks), j]
            else:
                distance = [(donors[t, j].float() - origin[j]).abs().item() for t in tasks]
                wanted = donors[tasks[distance.index(max(distance))], j]
            assert got[j].item() == wanted.item()
            compared += len(tasks) == 1 or conflict != "mean"
    assert compared > 50


def test_what_tasks_pull_apart_is_in_no_core(tmp_path: Path) -> None:
    """Conflict `agree` with ω = 0: the backbone's value where shared elements went both ways, else the donor's."""
    inputs = fusion_inputs(tmp_path, 0.4)
    fused, records = fuse(tmp_path, inputs, FusionConfig(conflict="agree", omega=0.0))
    left = kept = 0
    for name in (entry["tensor"] for entry in records):
        origin = inputs.pretrained.tensor(name).flatten()
        donors = torch.stack([model.tensor(name).flatten() for model in inputs.tuned.values()])
        inside = torch.stack([unpack_mask(read_mask(inputs.regions, t, name), origin.numel()) for t in inputs.tuned])  # type: ignore[arg-type]
        updates = torch.where(inside, donors - origin, 0)
        apart = (updates > 0).any(0) & (updates < 0).any(0)
        largest = donors.gather(0, updates.abs().argmax(0)[None])[0]
        wanted = torch.where(inside.any(0) & ~apart, largest, inputs.backbone.tensor(name).flatten())
        assert torch.equal(fused.tensor(name).flatten(), wanted)
        left, kept = left + int(apart.sum()), kept + int((inside.any(0) & ~apart).sum())
    assert min(left, kept) > 20


def test_tensors_outside_the_space_equal_the_backbone(tmp_path: Path) -> None:
    inputs = fusion_inputs(tmp_path, 0.2, exclude=("embed*", "cube"))
    fused, records = fuse(tmp_path, inputs, FusionConfig())
    for name in ("embed.weight", "cube", "buffer"):
        assert torch.equal(fused.tensor(name), inputs.backbone.tensor(name))
    assert fused.names == inputs.backbone.names
    assert [entry["tensor"] for entry in records] == ["bias", "layers.0.norm", "layers.0.q.weight"]


def test_angles_and_lerp_share_are_recorded(tmp_path: Path) -> None:
    inputs = fusion_inputs(tmp_path, 0.01)
    _, records = fuse(tmp_path, inputs, FusionConfig(epsilon=10.0))
    assert all(share == 1.0 for entry in records for share in entry["lerp"])
    entry = next(entry for entry in records if entry["tensor"] == "embed.weight")
    assert len(entry["angles"]) == 3
    assert all(0 < angle < 3.2 for angle in entry["angles"])


def test_a_backbone_that_is_not_finite_is_refused_before_writing(tmp_path: Path) -> None:
    inputs = fusion_inputs(tmp_path, 0.1)
    tensors = random_tensors(50)
    tensors["layers.0.norm"][3] = float("inf")
    bad = Checkpoint(save_checkpoint(tmp_path / "bad", tensors))
    broken = FusionInputs(inputs.pretrained, bad, inputs.tuned, inputs.regions, inputs.priority)
    with pytest.raises(CheckpointError, match=r"layers\.0\.norm: holds NaN or Inf"):
        fuse(tmp_path, broken, FusionConfig())
    assert list((tmp_path / "fused").iterdir()) == []


def test_without_transplant_everything_is_slerped(tmp_path: Path) -> None:
    """The same fusion as with cores of no element; what lies outside the parameter space is still the backbone's."""
    inputs, config = fusion_inputs(tmp_path, p=0.3, exclude=("bias",)), FusionConfig(transplant=False)
    fused, records = fuse(tmp_path, inputs, config)
    bare = tmp_path / "bare"
    bare.mkdir()
    save_regions(select_regions(inputs.pretrained, inputs.tuned, RegionsConfig(p=1e-9, exclude=("bias",))), bare)
    expected = expected_non_core(FusionInputs(inputs.pretrained, inputs.backbone, inputs.tuned, bare, []), config)
    assert all(record["core"] == 0 for record in records)
    for name, values in expected.items():
        torch.testing.assert_close(fused.tensor(name).double().flatten(), values.flatten(), rtol=0, atol=1e-6)
    assert torch.equal(fused.tensor("bias"), inputs.backbone.tensor("bias"))
