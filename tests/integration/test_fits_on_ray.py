"""Fine-tunes on real local Ray, each a Ray Train run of its own or in a group's workers: a killed worker, a failing
neighbour, checkpoints in a store of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpift.cluster.fits import parallel_fits, run_fits
from cpift.cluster.group import FitGroup, servable
from cpift.cluster.session import ray_session
from cpift.cluster.work import item_of
from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig, ResourcesConfig
from cpift.config.tasks import EvaluationConfig
from cpift.errors import CpiftError, StageError
from cpift.models.sources import materialise
from cpift.pipeline.inprocess import Scoring, score_here
from cpift.training.fit import fit
from cpift.training.spec import FitSpec
from tests.helpers.fits import spec, weights

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


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with ray_session(SMALL):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    scratch = ScratchModel(hidden_size=32, intermediate_size=48, heads=2)
    materialise(ModelConfig(scratch=scratch, dtype="float32"), folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of `long`."""
    out = tmp_path_factory.mktemp("undisturbed")
    fit(spec(base, out, **LONG))
    return weights(out / "export")


LONG: dict[str, Any] = {"steps": 200, "checkpoint_every": 40, "log_every": 20}


def long(base: Path, out: Path) -> FitSpec:
    return replace(spec(base, out, **LONG), title=out.name, resources=SMALL)


def broken(base: Path, out: Path) -> FitSpec:
    return replace(spec(base, out, learning_rate=1e12, steps=10), title=out.name, resources=SMALL)


def test_a_killed_worker_resumes_beside_one_that_fails(base: Path, undisturbed: str, tmp_path: Path) -> None:
    stored = SMALL.model_copy(update={"storage": f"file://{tmp_path / 'store'}"})
    good = replace(long(base, tmp_path / "good"), resources=stored)
    bad = broken(base, tmp_path / "bad")
    killed: list[int] = []

    def kill(message: dict[str, Any]) -> None:
        if not killed and message["title"] == "good" and message["step"] >= 60:
            killed.extend(training_workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    assert parallel_fits(SMALL) >= 4
    with pytest.raises(CpiftError, match="huge: its workers do not fit the cluster"):
        run_fits([replace(good, title="huge", resources=ResourcesConfig(workers=1000))], SMALL, kill)
    with pytest.raises(StageError) as failure:
        run_fits([good, bad], SMALL, kill)
    assert killed
    assert "1 of 2 failed, 1 finished and are kept" in str(failure.value)
    assert "bad: the loss is" in str(failure.value)
    assert f"Logs: {tmp_path}" in str(failure.value)
    assert weights(good.export) == undisturbed
    assert "step 200 of 200" in (good.logs / "worker-0.log").read_text()
    assert not list((tmp_path / "store").iterdir())
    assert not list(good.scratch.glob("stage-*")), "no checkpoint outlives the export"
    assert list(bad.scratch.iterdir())


def test_of_a_group_one_worker_is_replaced_and_the_others_go_on(base: Path, undisturbed: str, tmp_path: Path) -> None:
    one, other, bad = long(base, tmp_path / "one"), long(base, tmp_path / "other"), broken(base, tmp_path / "bad")
    steps: dict[str, int] = {}
    workers: list[int] = []

    def kill(message: dict[str, Any]) -> None:
        steps[message["title"]] = message.get("step", 0)
        if not workers and min(steps.get("one", 0), steps.get("other", 0)) >= 50:
            workers.extend(training_workers())
            os.kill(workers[0], signal.SIGKILL)

    kind = servable(SMALL, ())
    assert kind is not None
    group = FitGroup(kind, 2, SMALL, tmp_path / "group")
    try:
        failed = group.run([item_of(work) for work in (one, other, bad)], lambda title, result: None, kill)
        assert {title for title, error in failed.items() if error is not None} == {"bad"}
        assert str(failed["bad"]).startswith("bad: the loss is")
        assert [weights(work.export) for work in (one, other)] == [undisturbed] * 2
        assert len(workers) == 2
        assert workers[1] in training_workers()
        assert "step 200 of 200" in (other.logs / "worker-0.log").read_text()
        assert not list(tmp_path.glob("*/scratch/kept-*")), "no checkpoint outlives the export"

        scores: dict[str, Any] = {}  # by the workers that trained
        scoring = Scoring("scored", one.export, one.tasks, EvaluationConfig(max_length=64), SMALL)
        assert group.run([item_of(scoring)], scores.__setitem__, kill) == {"scored": None}
        assert scores["scored"]["scores"] == score_here(scoring, kill)["scores"]
    finally:
        group.close()
    assert not training_workers()
    assert not list((tmp_path / "group").iterdir())
