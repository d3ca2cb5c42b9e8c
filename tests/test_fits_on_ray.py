"""Fine-tunes on real local Ray: a killed worker, a failing neighbour, checkpoints in a store of their own."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpift.config import ModelConfig, ResourcesConfig
from cpift.config_inputs import ScratchModel
from cpift.distributed_fits import parallel_fits, run_fits
from cpift.distributed_session import ray_session
from cpift.errors import CpiftError, StageError
from cpift.finetune import fit
from cpift.models import materialise

from .fits import weights
from .test_finetune import spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SMALL = ResourcesConfig(cpus_per_worker=0.25, threads_per_worker=1)


def training_workers() -> list[int]:
    """Process ids of Ray's training workers below this process."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_bytes()
    below, level = [], [os.getpid()]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        below += level
    return [pid for pid in below if b"RayTrainWorker" in names[pid]]


def test_a_killed_worker_resumes_beside_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    base = tmp_path / "base"
    scratch = ScratchModel(hidden_size=32, intermediate_size=48, heads=2)
    materialise(ModelConfig(scratch=scratch, dtype="float32"), base)
    settings: dict[str, Any] = {"steps": 200, "checkpoint_every": 40, "log_every": 20}
    fit(spec(base, tmp_path / "undisturbed", **settings))

    stored = SMALL.model_copy(update={"storage": f"file://{tmp_path / 'store'}"})
    good = replace(spec(base, tmp_path / "good", **settings), title="good", resources=stored)
    bad = replace(spec(base, tmp_path / "bad", learning_rate=1e12, steps=10), title="bad", resources=SMALL)
    killed: list[int] = []

    def kill(message: dict[str, Any]) -> None:
        if not killed and message["title"] == "good" and message["step"] >= 60:
            killed.extend(training_workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with ray_session(SMALL):
        assert parallel_fits(SMALL) >= 4
        with pytest.raises(CpiftError, match="huge: its workers do not fit the cluster"):
            run_fits([replace(good, title="huge", resources=ResourcesConfig(workers=1000))], SMALL, kill)
        with pytest.raises(StageError) as failure:
            run_fits([good, bad], SMALL, kill)
    assert killed
    assert "1 of 2 failed, 1 finished and are kept" in str(failure.value)
    assert "bad: the loss is" in str(failure.value)
    assert f"Logs: {tmp_path}" in str(failure.value)
    assert weights(good.export) == weights(tmp_path / "undisturbed" / "export")
    assert "step 200 of 200" in (good.logs / "worker-0.log").read_text()
    assert not list((tmp_path / "store").iterdir())
    assert not list(good.scratch.glob("stage-*")), "no checkpoint outlives the export"
    assert list(bad.scratch.iterdir())
