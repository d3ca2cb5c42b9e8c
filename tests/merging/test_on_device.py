"""Regions and fusion with slices on a device: the kernels of a GPU, interpreted, beside the CPU's."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.cli.main import app
from cpift.cluster.merging import RayMerging
from cpift.config.loading import parse_config
from cpift.config.run import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.merging import on_device
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.engine import Merging, merge
from cpift.merging.gpu import choice
from cpift.merging.gpu.choice import AutoMerging
from cpift.merging.on_device import DeviceMerging, check_device, own_gpu
from cpift.merging.registry import METHODS, method_named
from cpift.method.regions import Streaming, write_regions
from tests.helpers.as_gpu import as_gpu
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.merges import config_file, make_models, regions_of

Models = tuple[Checkpoint, dict[str, Checkpoint]]  # θ0, and fine-tunes by task
SHAPES = {"a.weight": (30, 70), "b.norm": (33,), "c.weight": (3, 501), "one": (1,), "empty": (0, 4)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """θ0 and three fine-tunes, whose largest updates overlap."""
    root, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    shared = {name: torch.randn(shape, generator=generator).abs() ** 4 for name, shape in SHAPES.items()}
    found = {}
    for task in ("x", "y", "z"):
        moved = {n: v + 0.02 * shared[n] * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        tensors = {name: value.to(torch.bfloat16) for name, value in moved.items()} | {"step": torch.arange(3)}
        found[task] = Checkpoint(save_checkpoint(root / task, tensors))
    kept = {name: value.to(torch.bfloat16) for name, value in base.items()} | {
        "step": torch.zeros(3, dtype=torch.int64)
    }
    return Checkpoint(save_checkpoint(root / "base", kept)), found


@pytest.fixture(scope="module")
def regions(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return regions_of(models, 0.05, tmp_path_factory.mktemp("regions"))


@pytest.mark.slow
def test_regions_have_the_bytes_of_the_cpu(models: Models, regions: Path, tmp_path: Path) -> None:
    with as_gpu() as launches:
        streaming = Streaming(mark=DeviceMerging(CPU).mark)
        write_regions(*models, RegionsConfig(p=0.05), {0.05: tmp_path}, streaming)
    assert launches["mark_kernel"] >= len(SHAPES) - 1
    assert launches["collect_kernel"] > 0
    for path in sorted(regions.iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def fused(
    models: Models,
    regions: Path,
    out: Path,
    fields: Mapping[str, Any],
    shards_by: Any,
) -> dict[str, torch.Tensor]:
    base, tuned = models
    inputs, config = FusionInputs(base, base, tuned, regions, list(tuned)), FusionConfig(**fields)
    method = method_named(config.method).make(Materials(inputs, config, 0, lambda wanted: [regions]))
    out.mkdir()
    merge(method, base, out, "inputs", shard_size=10**9, shards_by=shards_by)
    written = Checkpoint(out)
    return {name: written.tensor(name) for name in written.names}


WITHOUT_ANGLES: list[dict[str, Any]] = [{"method": "linear"}, {"method": "task_arithmetic", "weight": 0.3}]
ANGLES: list[dict[str, Any]] = [
    {"conflict": "magnitude"},
    {"conflict": "agree", "space": "delta"},
    {"conflict": "mean", "granularity": "row"},
    {"conflict": "last", "granularity": "model"},
    {"transplant": False},
    {"method": "model_stock"},
    {"method": "karcher"},
]
MOST = [pytest.param(fields, marks=pytest.mark.slow) for fields in [*WITHOUT_ANGLES[1:], *ANGLES[1:]]]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [WITHOUT_ANGLES[0], ANGLES[0], *MOST], ids=str)
def test_a_merge_has_the_bits_of_the_cpu(fields: dict[str, Any], models: Models, regions: Path, tmp_path: Path) -> None:
    wanted = fused(models, regions, tmp_path / "cpu", fields, None)
    with as_gpu() as launches:
        found = fused(models, regions, tmp_path / "gpu", fields, DeviceMerging(CPU).merge_shards)
    assert launches["apply_kernel"] > 0
    if fields in ANGLES:
        assert launches["gram_kernel"] > 0
    if fields.get("conflict") in ("magnitude", "agree", "last"):
        assert launches["conflict_kernel"] > 0
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize(("assigned", "on_gpu"), [(None, True), (1, True), (0, False)])
@pytest.mark.parametrize("kind", ["cuda", "auto", "shared out"])
def test_a_merge_that_is_sent_elsewhere_is_computed_as_its_process_can(
    assigned: int | None, on_gpu: bool, kind: str, models: Models, regions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its GPU, or with processors alone; those whom the sender tells are not sent along."""
    monkeypatch.setattr(on_device, "visible_gpus", lambda: 1)
    monkeypatch.setattr(on_device, "current_gpu", lambda: CPU)
    monkeypatch.setattr(AutoMerging, "_takes_gpu", lambda self, one: True)
    base, tuned = models
    method = method_named("linear").make(
        Materials(FusionInputs(base, base, tuned, regions, list(tuned)), FusionConfig(method="linear"), 0, list)
    )
    tell = threading.Lock().acquire  # cannot be pickled
    merging: Merging = {
        "cuda": DeviceMerging(CPU),
        "auto": AutoMerging(DeviceMerging(CPU)),
        "shared out": RayMerging(ResourcesConfig(device="cuda"), own_gpu),
    }[kind].telling(tell)  # type: ignore[arg-type]  # any function
    place = pickle.loads(pickle.dumps(merging.placing(method)))
    for module in (on_device, choice):
        monkeypatch.setattr(module, "assigned_gpus", lambda: assigned)
    here = assigned is None and kind == "shared out"  # a driver that merges nothing itself
    assert (place(method) is method) == (here or not on_gpu)


def test_only_methods_that_say_so_leave_the_host(models: Models, regions: Path, tmp_path: Path) -> None:
    """A baseline beside a run on a GPU is what it is without one."""
    fields = {"method": "dare", "density": 0.5}
    wanted = fused(models, regions, tmp_path / "cpu", fields, None)
    found = fused(models, regions, tmp_path / "gpu", fields, DeviceMerging(torch.device("meta")).merge_shards)
    assert all(torch.equal(found[name], values) for name, values in wanted.items())
    assert {name for name, method in METHODS.items() if method.on_gpu} >= {"cpift", "linear", "slerp"}


@pytest.mark.parametrize(
    ("fields", "gpus", "told"),
    [
        ({}, 0, "torch sees no GPU here"),
        ({}, 1, None),
        (
            {"fusion": {"method": "dare"}},
            1,
            "fusion.method dare is computed on CPUs alone → use `cpu`, or one of cpift",
        ),
        (
            {"fusion": {"method": "linear", "into": {"x": "language"}}},
            1,
            "text models of a part of θ0 are merged on CPUs alone → use `cpu`, or leave fusion.into out",
        ),
        ({"resources": {"distributed": True}}, 1, None),
        ({"resources": {"distributed": True}}, 0, "torch sees no GPU here"),
        ({"resources": {"address": "head:6379"}}, 0, None),  # its nodes may have some
    ],
)
def test_what_a_gpu_cannot_do_is_refused_before_anything_runs(
    fields: dict[str, Any], gpus: int, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tasks = [{"name": name, "checkpoint": {"path": str(tmp_path)}} for name in ("x", "y")]
    raw = {"name": "r", "model": {"path": str(tmp_path)}, "tasks": tasks, **fields}
    raw["resources"] = {"device": "cuda", **raw.get("resources", {})}
    config = parse_config(raw, tmp_path, "run")
    with mock.patch.object(on_device, "visible_gpus", return_value=gpus):
        found = check_device(config)
    assert [told in str(problem) for problem in found] == ([True] if told else [])


@pytest.mark.slow
def test_commands_reach_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpift regions`, `cpift fuse` and `cpift merge` with `resources.device: cuda`: the files of the CPU."""
    make_models(tmp_path)
    file, written = config_file(tmp_path, tmp_path), {}
    for device, needed in (("cpu", set()), ("cuda", {"mark_kernel", "collect_kernel", "gram_kernel", "apply_kernel"})):
        options = ["--set", f"resources.device={device}", "--set", "regions.p=0.2"]
        output = tmp_path / device
        monkeypatch.setattr(on_device, "visible_gpus", lambda: 1)
        monkeypatch.setattr(on_device, "current_gpu", lambda: CPU)
        with as_gpu() if device == "cuda" else nullcontext(Counter()) as launches:
            for command in (["regions", str(file)], ["fuse", str(file), "--no-verify"]):
                done = CliRunner().invoke(app, [*command, "--output", str(output), *options])
                assert done.exit_code == 0, (done.output, done.exception)
            models = [str(tmp_path / name) for name in ("base", "one", "two")]
            done = CliRunner().invoke(
                app, ["merge", *models, "--out", str(output / "merged"), "--method", "slerp", *options[:2]]
            )
            assert done.exit_code == 0, (done.output, done.exception)
        assert needed <= set(launches), launches
        written[device] = {path.relative_to(output): path.read_bytes() for path in output.rglob("*.safetensors")}
    assert written["cpu"] == written["cuda"]
    assert {path.parts[0] for path in written["cpu"]} == {"regions", "fuse", "merged"}
