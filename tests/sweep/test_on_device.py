"""Sweeps and comparisons with `resources.device: cuda`: what they launch, and that masks and models are the CPU's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cpift.cli.compare import _engine
from cpift.cluster.merging import RayMerging
from cpift.cluster.tasks import TaskEngine
from cpift.compare.config import load_comparison
from cpift.compare.work import ComparisonWork
from cpift.console.view import quiet
from cpift.disk.files import read_json
from cpift.errors import ConfigError
from cpift.merging import on_device
from cpift.merging.on_device import own_gpu
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.shared import SharedWork
from cpift.pipeline.stages import handover
from cpift.sweep import search
from cpift.sweep.config import Sweep, load_sweep
from cpift.sweep.points import check_points, choose_points
from cpift.sweep.trial import engine_for, rungs
from tests.helpers.as_gpu import as_gpu
from tests.helpers.sweeps import ByWeights, load, run_fields, sweep_file

RUN = run_fields() | {"backbone": {"source": "pretrained"}, "fusion": {"conflict": "magnitude"}}
RUN["tasks"] = RUN["tasks"][:2]
FUSES = {"gram_kernel", "apply_kernel", "conflict_kernel"}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tunes and scores of no engine take time, and the CPU stands for a GPU."""
    fake = ByWeights()
    for engine in (InProcessEngine, TaskEngine):
        for name in ("expect", "fit", "evaluate"):
            done = getattr(fake, name)
            monkeypatch.setattr(engine, name, lambda self, *arguments, done=done: done(*arguments))
    monkeypatch.setattr(on_device, "visible_gpus", lambda: 1)
    monkeypatch.setattr(on_device, "current_gpu", lambda: torch.device("cpu"))


def swept(file: Path, device: str, output: Path) -> None:
    """Every trial of a sweep, in this process."""
    sweep = load_sweep(file, [f"resources.device={device}", "resources.gpus_per_worker=0.5"], output)
    check_points(sweep, "sweep fused")
    points = choose_points(sweep.config)
    runs = [search.pipeline(sweep.run(point, seed)) for point in points for seed in sweep.seeds]
    shared = SharedWork(runs, TaskEngine(sweep.base.resources), quiet())
    shared.prepare()
    shared.complete(runs)
    for point in points:
        list(rungs(sweep, point, quiet()))


def hashes(output: Path) -> Mapping[str, str]:
    """By output of fusion that of its weights."""
    manifests = sorted((output / "fuse").rglob("manifest.json"))
    return {path.parent.name: read_json(path)["outputs"]["model.safetensors"] for path in manifests}


@pytest.mark.slow
def test_sweeps_and_comparisons_reach_the_kernels(no_training: None, tmp_path: Path) -> None:
    space = {"fusion.omega": [0.5]}
    file = sweep_file(tmp_path, run=RUN, model="fused", space=space, objectives=["mean_loss"])
    masks: dict[str, dict[str, bytes]] = {}
    for device, needed in (("cpu", set()), ("cuda", {"mark_kernel", "collect_kernel", *FUSES})):
        handover._KNOWN.clear()  # the Gram matrices of the CPU's sweep are the GPU's
        with as_gpu() if device == "cuda" else nullcontext(Counter()) as launches:
            swept(file, device, tmp_path / device)
        assert needed <= set(launches), launches
        (folder,) = (tmp_path / device / "regions").iterdir()
        masks[device] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert masks["cpu"] == masks["cuda"] != {}
    made = hashes(tmp_path / "cuda")
    assert len(made) == 1
    assert made == hashes(tmp_path / "cpu"), "the same output, whatever it was computed on"

    fields: dict[str, Any] = {"run": RUN | {"resources": RUN["resources"] | {"device": "cuda"}}, "methods": ["none"]}
    compared(tmp_path, fields, made)


def compared(tmp_path: Path, fields: dict[str, Any], made: Mapping[str, str]) -> None:
    """A comparison in the sweep's folder: it fuses what the sweep did not write, to the same bytes."""
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(fields | {"fixed": {"fusion.omega": 0.5}}))
    comparison = load_comparison(path, (), {"output": tmp_path / "cuda"})
    with as_gpu() as launches:
        ComparisonWork(comparison, _engine(comparison.base.resources, here=True), quiet()).make()
    assert set(launches) >= FUSES, launches
    found = hashes(tmp_path / "cuda")
    assert {name: found[name] for name in made} == made
    assert isinstance(_engine(comparison.base.resources, here=False).merging, on_device.DeviceMerging)


def test_trials_without_a_gpu_cannot_fuse_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they ask Ray for processes that have one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, run=RUN | {"resources": {"device": "cuda"}})
    assert "a trial has no GPU → set resources.gpus_per_worker: 1, or a share of one" in str(caught.value)
    for number, resources in enumerate(({"gpus_per_worker": 1, "workers": 2}, {"distributed": True})):
        (tmp_path / str(number)).mkdir()
        sweep = load(tmp_path / str(number), run=RUN | {"resources": {"device": "cuda", **resources}})
        made = engine_for(sweep.base).merging
        assert isinstance(made, RayMerging)
        assert made._make is own_gpu


def test_trials_may_choose(no_training: None, tmp_path: Path) -> None:
    """With a GPU of their own or without one, whatever the method."""
    for name, gpus in (("one", 0), ("two", 0.5)):
        resources = RUN["resources"] | {"device": "auto", "gpus_per_worker": gpus}
        fields: dict[str, Any] = {"run": RUN | {"resources": resources}, "space": {"fusion.method": ["linear", "dare"]}}
        (tmp_path / name).mkdir()
        check_points(load(tmp_path / name, **fields), "sweep fused")


def test_points_that_a_gpu_cannot_fuse_are_named(no_training: None, tmp_path: Path) -> None:
    fields = {"device": "cuda", "gpus_per_worker": 1}
    sweep: Sweep = load(tmp_path, run=RUN | {"resources": fields}, space={"fusion.method": ["linear", "dare"]})
    with pytest.raises(ConfigError, match=r"fusion.method dare is computed on CPUs alone \(at fusion.method dare\)"):
        check_points(sweep, "sweep fused")
