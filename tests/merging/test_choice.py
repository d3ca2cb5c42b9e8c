"""`resources.device: auto`: what is timed, what is taken and said; with made-up times, and the CPU as the GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import cpift
from cpift.cli.main import app
from cpift.config.loading import parse_config
from cpift.config.run import FusionConfig, RegionsConfig, ResourcesConfig
from cpift.merging import on_device
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.engine import merge
from cpift.merging.gpu import choice
from cpift.merging.gpu.choice import AutoMerging
from cpift.merging.gpu.lanes import GpuMemoryError
from cpift.merging.on_device import DeviceMerging, device_merging, foretold
from cpift.merging.registry import method_named
from cpift.method.changes import ChangesInPassing
from cpift.method.regions import Streaming, write_regions
from tests.helpers.checkpoints import Models, make_moved
from tests.helpers.merges import config_file, make_models

NUMEL = 30 * 70 + 33 + 3 * 501


class Spied(DeviceMerging):
    """The GPU: counts what is made of it beside what is timed."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.marked = self.merged = 0

    def mark(self, selection: Any, masks: Any) -> Any:
        self.marked += not isinstance(masks, choice._Unkept)
        return super().mark(selection, masks)

    def merge_shards(self, *arguments: Any) -> Any:
        self.merged += 1
        return super().merge_shards(*arguments)


class Times:
    """A timer with answers, the GPU's first; what it is given is done."""

    def __init__(self, *seconds: float | Exception):
        self.left = list(seconds)

    def __call__(self, work: choice.Work) -> float:
        work()
        found = self.left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(autouse=True)
def nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_TAKEN", {})
    monkeypatch.setattr(choice, "LEAST", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_moved(tmp_path_factory.mktemp("models"))


def selected(models: Models, merging: AutoMerging | None, out: Path, **fields: Any) -> dict[str, bytes]:
    out.mkdir()
    streaming = Streaming(mark=merging.mark if merging else None)
    write_regions(*models, RegionsConfig(p=0.05, **fields), {0.05: out}, streaming)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("seconds", "on_gpu", "said"),
    [
        ((0.5, 2.0), 1, "core regions on the GPU: 0.50 s on the GPU, 2.00 s on "),
        ((2.0, 0.5), 0, "core regions on the CPU: 2.00 s on the GPU, 0.50 s on "),
        (
            (GpuMemoryError("resources.device: it has no room → use `cpu`"),),
            0,
            "core regions on the CPU: it has no room",
        ),
    ],
)
def test_regions_are_selected_where_it_is_faster(
    models: Models, tmp_path: Path, seconds: Sequence[Any], on_gpu: int, said: str
) -> None:
    gpu, told, timer = Spied(), list[str](), Times(*seconds)
    merging = AutoMerging(gpu, timer).telling(told.append)
    wanted = selected(models, None, tmp_path / "cpu")
    assert selected(models, merging, tmp_path / "one") == wanted
    assert selected(models, merging, tmp_path / "two") == wanted, "it is not timed again"
    assert gpu.marked == 2 * on_gpu
    assert timer.left == []
    assert [said in line for line in told] == [True], told
    if len(seconds) == 2:
        assert told[0].endswith(f"for all {NUMEL:,} elements of 3 models")


def test_the_first_elements_are_timed(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of regions whole ranges, of a merge whole tensors; and none where all are too few."""
    monkeypatch.setattr(choice, "SAMPLE", 33)
    told = list[str]()
    merging = AutoMerging(Spied(), Times(1, 2, 1, 2)).telling(told.append)
    selected(models, merging, tmp_path / "one", scope="tensor")
    merged(models, merging, tmp_path / "fused", method="linear")
    assert [line.rpartition(", for ")[2] for line in told] == [
        f"all {30 * 70:,} elements of 3 models",  # the first tensor is one range
        f"the first 33 of {NUMEL:,} elements of 2 models",  # the one that is no larger; linear reads no θ0
    ]
    monkeypatch.setattr(choice, "LEAST", NUMEL + 1)
    monkeypatch.setattr(choice, "_TAKEN", {})
    selected(models, AutoMerging(Spied(), Times()).telling(told.append), tmp_path / "two")
    assert told[2] == (
        f"resources.device auto: core regions on the CPU: all {NUMEL:,} elements of 3 models are too few to be timed "
        "on the GPU"
    )


def merged(models: Models, merging: AutoMerging | None, out: Path, **fields: Any) -> bytes:
    base, tuned = models
    inputs, config = FusionInputs(base, base, tuned, out, list(tuned)), FusionConfig(**fields)
    method = method_named(config.method).make(Materials(inputs, config, 0, lambda wanted: []))
    out.mkdir()
    merge(method, base, out, "inputs", shard_size=10**9, shards_by=merging.merge_shards if merging else None)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("seconds", "on_gpu"), [((1.0, 2.0), 1), ((2.0, 1.0), 0)])
def test_a_merge_is_made_where_it_is_faster(
    models: Models, tmp_path: Path, seconds: Sequence[float], on_gpu: int
) -> None:
    gpu, told, timer = Spied(), list[str](), Times(*seconds)
    merging = AutoMerging(gpu, timer).telling(told.append)
    assert merged(models, merging, tmp_path / "auto", method="slerp") == merged(
        models, None, tmp_path / "cpu", method="slerp"
    )
    assert gpu.merged == on_gpu
    assert [line.startswith(f"resources.device auto: merging by slerp on the {'CG'[on_gpu]}PU") for line in told] == [
        True
    ]
    placed = merging.placing(method_of(models, "slerp"))(method_of(models, "slerp"))
    assert isinstance(placed, on_device.OnDevice) == bool(on_gpu), "in memory where it is made in files"
    assert timer.left == []


def method_of(models: Models, name: str) -> Any:
    base, tuned = models
    inputs, config = FusionInputs(base, base, tuned, Path(), list(tuned)), FusionConfig(method=name)
    return method_named(name).make(Materials(inputs, config, 0, lambda wanted: []))


def test_what_gpus_do_not_merge_is_not_timed(models: Models, tmp_path: Path) -> None:
    merging = AutoMerging(Spied(), Times()).telling(lambda line: pytest.fail(line))
    found = merged(models, merging, tmp_path / "auto", method="dare", density=0.5)
    assert found == merged(models, None, tmp_path / "cpu", method="dare", density=0.5)


@pytest.mark.parametrize(("seconds", "measured"), [((2.0, 1.0), True), ((1.0, 2.0), False)])
def test_changes_are_measured_where_processors_select(
    models: Models, tmp_path: Path, seconds: Sequence[float], measured: bool
) -> None:
    """By the pass itself alone, not by what is timed."""
    base, tuned = models
    sizes, found = {name: info.numel for name, info in base.tensors.items() if info.numel}, list[Any]()
    for mark in (None, AutoMerging(Spied(), Times(*seconds)).mark):
        passing, out = ChangesInPassing(), tmp_path / str(len(found))
        out.mkdir()
        write_regions(base, tuned, RegionsConfig(p=0.05), {0.05: out}, Streaming(mark=mark, passing=passing))
        found.append(passing.of(1, sizes))
    assert found[0] is not None
    assert found[1] == (found[0] if measured else None)


def test_what_is_timed_was_done_once_before() -> None:
    done = list[int]()
    assert choice.seconds_of(lambda: done.append(1)) >= 0
    assert done == [1, 1]


def test_without_a_gpu_nothing_is_timed_and_torch_is_not_loaded() -> None:
    program = (
        "import sys; from cpift.config.run import ResourcesConfig; from cpift import devices\n"
        "devices._has_driver = lambda: False\n"
        "from cpift.merging.on_device import device_merging\n"
        "assert device_merging(ResourcesConfig(device='auto')) is None\n"
        "print([name for name in ('torch', 'triton', 'cpift.merging.gpu.choice') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "visible_gpus", lambda: 1)
    monkeypatch.setattr(on_device, "current_gpu", lambda: torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "gpus", "told"),
    [
        ({"resources": {"device": "cpu"}}, 1, None),
        ({}, 0, "regions and fusion on the CPU: torch sees no GPU here"),
        ({}, 1, "regions and fusion on the GPU or the CPU, whichever is faster on their first elements"),
        ({}, 2, "regions and fusion on one of 2 GPUs (`cuda` takes all of them) or the CPU, whichever is faster"),
        ({"resources": {"distributed": True}}, 1, "regions and fusion on the CPU: a cluster's CPUs compute them"),
        (
            {"fusion": {"method": "ties"}},
            1,
            "first elements; fusion on the CPU: fusion.method ties is computed on CPUs",
        ),
    ],
)
def test_a_plan_says_what_it_will_be(
    fields: dict[str, Any], gpus: int, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(on_device, "visible_gpus", lambda: gpus)
    tasks = [{"name": name, "checkpoint": {"path": str(tmp_path)}} for name in ("x", "y")]
    raw = {"name": "r", "model": {"path": str(tmp_path)}, "tasks": tasks, **fields}
    raw["resources"] = {"device": "auto", **raw.get("resources", {})}
    config = parse_config(raw, tmp_path, "run")
    found = foretold(config)
    assert on_device.check_device(config) == []
    assert (found is None) == (told is None)
    assert told is None or (found is not None and found.startswith("resources.device auto: ") and told in found), found


@pytest.mark.parametrize(("gpus", "told"), [(1, None), (3, "all 3 GPUs, a process of Ray for each")])
def test_a_plan_for_gpus_says_that_ray_shares_them_out(
    gpus: int, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "visible_gpus", lambda: gpus)
    tasks = [{"name": name, "checkpoint": {"path": str(tmp_path)}} for name in ("x", "y")]
    raw = {"name": "r", "model": {"path": str(tmp_path)}, "tasks": tasks, "resources": {"device": "cuda"}}
    found = foretold(parse_config(raw, tmp_path, "run"))
    assert found == (told and f"resources.device cuda: regions and fusion on {told}")


def test_commands_choose_and_another_choice_stays_cached(
    one_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan`, `regions` and `fuse`; what one device has finished is not made by the other."""
    make_models(tmp_path)
    file = config_file(tmp_path, tmp_path)
    options = ["--output", str(tmp_path / "out"), "--set", "regions.p=0.2", "--set", "resources.device=auto"]

    def run(*command: str) -> str:
        done = CliRunner().invoke(app, [*command, str(file), *options])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    assert "whichever is faster on their first elements" in " ".join(run("plan").split())
    monkeypatch.setattr(choice, "seconds_of", Times(1.0, 2.0, 2.0, 1.0))
    assert "core regions on the GPU: 1.00 s on the GPU, 2.00 s on" in run("regions")
    assert "merging by cpift on the CPU: 2.00 s on the GPU, 1.00 s on" in run("fuse")
    choice._TAKEN.clear()
    for command in ("regions", "fuse"):
        assert "resources.device auto" not in run(command), "nothing is left to be done, so nothing is timed"


@pytest.mark.slow
def test_python_chooses_too(one_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_models(tmp_path)
    base, tuned = tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"}
    timer = Times(1.0, 2.0, 1.0, 2.0)
    monkeypatch.setattr(choice, "seconds_of", timer)
    cores = cpift.regions(base, tuned, p=0.2, device="auto")
    assert len(timer.left) == 2
    same = cpift.regions(base, tuned, p=0.2)
    for task in tuned:
        assert all(torch.equal(words, same[task].words[name]) for name, words in cores[task].words.items())
    cpift.merge(base, tuned, tmp_path / "auto", method="slerp", device="auto")
    assert timer.left == []
    cpift.merge(base, tuned, tmp_path / "cpu", method="slerp")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "cpu")]
    assert written[0] == written[1]
    assert isinstance(device_merging(ResourcesConfig(device="auto")), AutoMerging)
