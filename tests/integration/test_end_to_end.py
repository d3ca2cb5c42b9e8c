"""`cpift run` as a user runs it: on real local Ray, twice, and killed in every stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cpift_kernels import unpack_mask
from ray.cluster_utils import Cluster

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.disk.files import file_sha256, read_json
from cpift.method.masks import read_mask, read_summary
from tests.helpers.killed import killed_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# In order, and whether with Ray, whose start and workers take half a minute of a core. Stages that are left out read
# and write in milliseconds, as fusion does here, or train as these do.
KILLED: dict[str, bool] = {
    "probes": True,
    "fusion": False,
    "integration": True,
    "evaluation": False,
}
ONE_AT_ONCE = ("--set", "resources.parallel=1")


def command(config: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "cpift.cli", "run", str(config), "--output", str(output)]


def run(config: Path, output: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        command(config, output), capture_output=True, text=True, timeout=600, check=False, env=environment
    )


@pytest.fixture(scope="module")
def finished(smoke_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder and what it printed."""
    output = tmp_path_factory.mktemp("run")
    done = run(smoke_config, output, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)  # as Ray has it on its own
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def only(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return found


def test_a_run_ends_with_scores_and_a_report(finished: tuple[Path, str]) -> None:
    output, printed = finished
    for word in ("base", "probe", "backbone", "fused", "final", "addition", "spelling", "ending", "report.html"):
        assert word in printed
    assert (output / "report.html").read_text().lower().startswith("<!doctype html>")
    scores = {}
    for path in (output / "evaluate").iterdir():
        manifest = read_json(path / "manifest.json")
        scores[manifest["label"]] = read_json(path / "scores.json")
        assert manifest["outputs"]["scores.json"] == file_sha256(path / "scores.json")
    assert set(scores) == {"base", "probe-addition", "probe-spelling", "probe-ending", "backbone", "fused", "final"}
    for task in ("addition", "spelling", "ending"):
        assert scores[f"probe-{task}"][task]["loss"] < scores["base"][task]["loss"]


def test_a_finished_run_loads_in_transformers(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = only(finished[0] / "integrate")
    tokenizer = AutoTokenizer.from_pretrained(final)
    batch = tokenizer.apply_chat_template([{"role": "user", "content": "2+2="}], return_tensors="pt", return_dict=True)
    logits = AutoModelForCausalLM.from_pretrained(final)(**batch).logits
    assert bool(logits.isfinite().all())


def test_cores_are_the_donors_and_frozen_elements_did_not_move(finished: tuple[Path, str]) -> None:
    output, _ = finished
    regions, fused = only(output / "regions"), Checkpoint(only(output / "fuse"))
    summary = read_summary(regions)
    probes = {path.name.rpartition("-")[0]: Checkpoint(path) for path in (output / "probe").iterdir()}
    compared = 0
    for name in fused.names:
        masks = {task: bits(regions, task, name, fused.tensors[name].numel) for task in summary["tasks"]}
        owners = torch.stack(list(masks.values())).sum(0)
        for task, mask in masks.items():
            sole = mask & (owners == 1)
            assert torch.equal(fused.tensor(name).flatten()[sole], probes[task].tensor(name).flatten()[sole])
            compared += int(sole.sum())
    assert compared > 0
    training = read_json(only(output / "integrate") / "training.json")
    groups = read_json(only(output / "group") / "groups.json")["groups"]
    assert [entry["stage"] for entry in training["frozen"]] == list(range(1, len(groups)))
    assert len(groups) > 1
    assert all(entry["moved"] == 0 < entry["elements"] for entry in training["frozen"])


def bits(regions: Path, task: str, name: str, numel: int) -> torch.Tensor:
    words = read_mask(regions, task, name)
    return torch.zeros(numel, dtype=torch.bool) if words is None else unpack_mask(words, numel)


def test_the_same_command_again_does_nothing(finished: tuple[Path, str], smoke_config: Path) -> None:
    output, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("manifest.json")}
    done = run(smoke_config, output)
    assert done.returncode == 0, done.stderr
    assert "Everything was cached" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in output.rglob("manifest.json")} == before


# What appears in a run's folder once workers train.
AT_WORK = "logs/**/events.out.tfevents.*"


def kill_in(stage: str, config: Path, output: Path) -> None:
    """Start a run and SIGKILL it in a stage while it trains."""
    started = [*command(config, output), *ONE_AT_ONCE]
    process = subprocess.Popen(started, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if f"▸ {stage}" in line:
            break
    before = set(output.glob(AT_WORK))
    while set(output.glob(AT_WORK)) <= before:
        assert process.poll() is None, "the run ended before it was at work"
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_killed_in_its_stages_the_run_ends_with_the_same_models(
    finished: tuple[Path, str], smoke_config: Path, tmp_path: Path
) -> None:
    undisturbed, _ = finished
    output = tmp_path / "killed"
    for stage, with_ray in KILLED.items():
        if with_ray:
            kill_in(stage, smoke_config, output)
        else:
            killed_in(stage, output, "run", smoke_config)
    cpift.run(smoke_config, output=output, in_process=True)
    for folder in ("probe", "backbone", "fuse", "integrate"):
        wanted = {path.name: file_sha256(path / "model.safetensors") for path in (undisturbed / folder).iterdir()}
        got = {p.name: file_sha256(p / "model.safetensors") for p in (output / folder).iterdir() if p.name[0] != "."}
        assert got == wanted
    assert (output / "summary.json").read_text() == (undisturbed / "summary.json").read_text()


def test_on_a_full_cluster_regions_do_not_wait_for_workers_that_are_idle(smoke_config: Path, tmp_path: Path) -> None:
    """One CPU, which a fine-tune's worker takes, and then each task of regions."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    fields = {"resources.address": cluster.address, "resources.cpus_per_worker": 1, "probe.steps": 2}
    changes = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
    stage = [sys.executable, "-m", "cpift.cli", "regions", str(smoke_config), "--output", str(tmp_path), *changes]
    try:
        done = subprocess.run(stage, capture_output=True, text=True, timeout=400, check=False)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert only(tmp_path / "regions")
