"""Which device work runs on, with what torch and Ray report of GPUs faked: there is none here."""

from __future__ import annotations

import ast
import os
import platform
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpift import devices
from cpift.cli.many import require_gpus, unused_gpus
from cpift.cluster import session as distributed_session
from cpift.cluster.session import use_assigned_gpus
from cpift.config.inputs import ScratchModel
from cpift.config.loading import load_config, with_fields
from cpift.config.run import ModelConfig, ResourcesConfig, RunConfig
from cpift.devices import compute_device, resolved, reusing_memory
from cpift.errors import ConfigError, CpiftError
from cpift.evaluation.scoring import evaluate_model
from cpift.models.sources import materialise
from cpift.pipeline.engine import Scoring
from cpift.pipeline.inprocess import InProcessEngine
from cpift.training.fit import fit
from cpift.training.spec import StageSpec
from cpift.training.weights.reading import load_whole
from tests.helpers.fits import spec

CPIFT = Path(devices.__file__).parent


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "scratch"
    materialise(ModelConfig(scratch=ScratchModel(hidden_size=16, layers=1, heads=2), dtype="float32"), path)
    return path


@pytest.fixture(autouse=True)
def four_gpus(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, all of them visible, as Ray leaves them to tasks that asked for none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(devices, "_assigned", None)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "0,1,2,3")


def in_a_worker(monkeypatch: pytest.MonkeyPatch, ids: list[str]) -> None:
    """As a task, actor or Train worker to which Ray assigned these."""
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ids, "TPU": []})
    monkeypatch.setattr(distributed_session.ray, "get_runtime_context", lambda: context)
    use_assigned_gpus()


@pytest.mark.parametrize(
    ("assigned", "asked", "device"),
    [
        (None, 0, "cpu"),
        (None, 1, "cuda"),
        (None, 0.5, "cuda"),
        ([], 0, "cpu"),
        ([], 1, "cpu"),  # of a trial whose work asks for its own
        (["2"], 1, "cuda"),
        (["0", "1"], 2, "cuda"),
    ],
)
def test_a_gpu_is_used_only_where_it_was_assigned(
    monkeypatch: pytest.MonkeyPatch, assigned: list[str] | None, asked: float, device: str
) -> None:
    if assigned is not None:
        in_a_worker(monkeypatch, assigned)
    assert compute_device(asked) == device
    hidden = assigned == []
    assert [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")] == (
        ["", ""] if hidden else ["0,1,2,3"] * 2
    )


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CpiftError, match=r"resources\.gpus_per_worker 1: .* sees no GPU .* set .*: 0"):
        compute_device(1)


def test_bf16_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "native_bf16", lambda device: device == "cuda")
    assert [resolved("auto", "cpu"), resolved("auto", "cuda")] == ["float32", "bfloat16"]
    assert resolved("float32", "cuda") == "float32"


def test_without_a_gpu_asked_for_fits_and_evaluations_stay_on_the_cpu(
    tmp_path: Path, model_path: Path, smoke_config: Path
) -> None:
    """Trainer alone would take cuda:0, and with four in sight a DataParallel model."""
    one = spec(model_path, tmp_path, StageSpec(("add",)), checkpoint_every=0)
    assert one.resources.gpus_per_worker == 0
    result = fit(replace(one, training=one.training.model_copy(update={"steps": 1, "precision": "auto"})))
    assert result["device"].startswith("cpu")
    assert result["precision"] == resolved("auto", "cpu")
    run = with_fields(load_config(smoke_config), {"evaluation.limit": 1}, "test")
    found: dict[str, Any] = {}
    scoring = Scoring("base", model_path, run.tasks, run.evaluation, run.resources)
    InProcessEngine().evaluate([scoring], found.__setitem__, lambda message: None)
    assert found["base"]["device"].startswith("cpu")
    alone = evaluate_model(model_path, run.tasks, run.evaluation)
    assert found["base"]["scores"]["addition"]["loss"] == alone["addition"].loss


def test_one_gpu_of_four_is_no_data_parallel_model(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    from cpift.training import fit as finetune
    from cpift.training import steps

    made: list[SimpleNamespace] = []

    def arguments(**fields: Any) -> Any:
        made.append(SimpleNamespace(n_gpu=4, **fields))
        return made[-1]

    def loaded(path: Path, dtype: torch.dtype, device: str, attention: str) -> Any:
        assert device == "cuda"
        return load_whole(path, dtype, "cpu")

    monkeypatch.setattr(finetune, "load_whole", loaded)  # no GPU is here
    monkeypatch.setattr(steps, "TrainingArguments", arguments)
    monkeypatch.setattr(finetune, "WholeTrainer", lambda args, **rest: (_ for _ in ()).throw(StopIteration(args)))
    one = spec(model_path, tmp_path, StageSpec(("add",)))
    gpu = replace(one, resources=one.resources.model_copy(update={"gpus_per_worker": 1}))
    with pytest.raises(RuntimeError, match="StopIteration"):
        fit(gpu)
    (args,) = made
    assert (args.use_cpu, args.dataloader_pin_memory, args._n_gpu) == (False, True, 1)
    assert isinstance(getattr(TrainingArguments, "n_gpu", None), property)  # what `_n_gpu` stands behind


@pytest.mark.slow
def test_nothing_but_devices_asks_torch_for_gpus() -> None:
    """The word stands where it is a config's, or another tool's option, and not for torch."""
    configs = ("resources", "many", "merging", "preflight", "choosing")
    words = (*configs, "devices", "steps", "mergekit_flags", "on_device", "options", "possible")
    for path in CPIFT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_bf16_supported", "accelerator")
            spelt = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")
            assert path.stem == "devices" or not named, f"{path.name}:{node.lineno}"
            assert path.stem in words or not spelt, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("fields", "address", "said"),
    [
        ({}, None, "this machine has 4 GPUs, and this config uses none: .* resources.gpus_per_worker: 1"),
        ({"resources.gpus_per_worker": 1}, None, None),
        ({"tasks.0.resources.gpus_per_worker": 0.5}, None, None),
        ({"resources.address": "head:6379"}, 8.0, "the cluster at head:6379 has 8 GPUs"),
        ({"resources.address": "head:6379"}, 0.0, None),
        ({"resources.address": "127.0.0.1:9"}, None, "is not known: no Ray cluster answers at 127.0.0.1:9"),
    ],
)
def test_the_plan_says_that_gpus_stay_idle(
    smoke_config: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], address: float | None, said: str | None
) -> None:
    if address is not None:
        monkeypatch.setattr(distributed_session, "cluster_gpus", lambda resources: address)
    run: RunConfig = with_fields(load_config(smoke_config), fields, "test")
    note = unused_gpus(run)
    assert (note is None) == (said is None)
    if note is not None and said is not None:
        assert re.search(said, note), note


@pytest.mark.parametrize(("gpus", "refused"), [(8.0, False), (0.0, True), (None, False)])
def test_a_plan_refuses_a_cluster_without_the_gpus_that_it_names(
    smoke_config: Path, monkeypatch: pytest.MonkeyPatch, gpus: float | None, refused: bool
) -> None:
    """Not one that does not answer from here."""

    def count(resources: ResourcesConfig) -> float:
        if gpus is None:
            raise CpiftError("no Ray cluster answers")
        return gpus

    monkeypatch.setattr(distributed_session, "cluster_gpus", count)
    run = with_fields(load_config(smoke_config), {"resources.device": "cuda", "resources.address": "head:6379"}, "test")
    told = r"resources\.device: is `cuda`, and the cluster at head:6379 has no GPU → use `cpu`, or add nodes with GPUs"
    with pytest.raises(ConfigError, match=told) if refused else nullcontext():
        require_gpus(run)
    require_gpus(with_fields(run, {"resources.device": "cpu"}, "test"))


@pytest.mark.parametrize("driver", [True, False])
def test_torch_is_asked_for_gpus_unless_no_driver_is_there(monkeypatch: pytest.MonkeyPatch, driver: bool) -> None:
    def load(name: str) -> None:
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError("cannot open shared object file")

    monkeypatch.setattr(devices.ctypes, "CDLL", load)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    assert devices.visible_gpus() == 4  # torch is here: nothing is won by not asking
    monkeypatch.delitem(sys.modules, "torch")
    assert devices._has_driver() == driver
    if not driver:
        assert devices.visible_gpus() == 0
        assert "torch" not in sys.modules


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CpiftError, match=r"resources\.device: is `cuda`, and torch .* sees no GPU here"):
        devices.current_gpu()


def _in_heap(block: torch.Tensor) -> bool:
    """Whether a tensor lies among the process's other blocks, not in pages of its own."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    parts = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return any(int(start, 16) <= block.data_ptr() < int(stop, 16) for start, stop in parts)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_is_reused_inside_only() -> None:
    """A heap that grew over large blocks for good made Linux refuse to fork the process later."""

    def made() -> torch.Tensor:
        return torch.empty(128 << 20, dtype=torch.uint8)

    with reusing_memory():
        with reusing_memory():
            assert _in_heap(made())
        assert _in_heap(made()), "the outer one is not over"
    with reusing_memory("cuda"):
        assert not _in_heap(made())
    assert not _in_heap(made())
