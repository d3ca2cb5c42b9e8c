"""Sweeps on real local Ray: shared work, a failure, a lost Ray state, ASHA and Optuna over the same artifacts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cpift.cli.main import main
from cpift.cluster.resident import choosing
from cpift.cluster.session import ray_session
from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig
from cpift.console.view import quiet
from cpift.disk.files import file_sha256, read_json
from cpift.models.sources import materialise
from cpift.pipeline.outcomes import own_models
from cpift.pipeline.stages import handover
from cpift.sweep.config import Sweep, load_sweep
from cpift.sweep.record import Attempt, sweep_record
from cpift.sweep.results import gather
from cpift.sweep.scores import SweepData, best_trial
from cpift.sweep.search import pipeline, run_sweep
from cpift.sweep.trial import asks_ray
from tests.helpers.sweeps import sweep_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module", autouse=True)
def one_ray_session(root: Path) -> Iterator[None]:
    """Ray starts once; all sweeps share its warm workers."""
    with ray_session(load(root).base.resources):
        yield


def load(root: Path, **changes: Any) -> Sweep:
    folder = root / f"file-{len(list(root.iterdir()))}"
    folder.mkdir()
    return load_sweep(sweep_file(folder, **changes), output=root / "out")


def made(root: Path) -> dict[Path, int]:
    """Every artifact by the time its manifest was written."""
    return {path: path.stat().st_mtime_ns for path in root.glob("out/*/*/manifest.json")}


def count(root: Path, stage: str) -> int:
    return len(list((root / "out" / stage).glob("[!.]*")))


def given(root: Path, **changes: Any) -> dict[str, Any]:
    """The fields of a run over θ0 and two fine-tunes that exist, with rows to score on and none to train on."""
    folder = root / "given"
    if not folder.exists():
        materialise(ModelConfig(scratch=ScratchModel(hidden_size=16, layers=1, heads=2), dtype="float32"), folder / "0")
        weights = load_file(folder / "0" / "model.safetensors")
        for seed in (1, 2):
            torch.manual_seed(seed)
            shutil.copytree(folder / "0", folder / str(seed))
            moved = {name: x + 0.05 * torch.randn(x.shape) for name, x in weights.items()}
            save_file(moved, folder / str(seed) / "model.safetensors", metadata={"format": "pt"})
    rows = {"procedural": "addition", "size": 6, "split": "test"}
    tasks = [
        {"name": f"t{n}", "checkpoint": {"path": str(folder / str(n))}, "test": rows | {"seed": n}} for n in (1, 2)
    ]
    fixed = {"name": "given", "model": {"path": str(folder / "0")}, "backbone": {"source": "pretrained"}}
    return fixed | {"tasks": tasks, "resources": {"cpus_per_worker": 0.5, "threads_per_worker": 1}} | changes


@pytest.fixture(scope="module")
def grid(root: Path, one_ray_session: None) -> tuple[Sweep, list[Attempt], SweepData]:
    """Two p and three τ, of which two give the same groups; ω of 0 and 1 are two fusions each."""
    sweep = load(root, space={"regions.p": [0.05, 0.2], "groups.tau": [0.0, 0.001, 1.0]})
    attempts = run_sweep(sweep, quiet())
    return sweep, attempts, gather(sweep, attempts, pipeline)


def test_a_grid_makes_everything_once(root: Path, grid: tuple[Sweep, list[Attempt], SweepData]) -> None:
    _, attempts, data = grid
    assert [(attempt.status, len(attempt.points)) for attempt in attempts] == [("done", 2), ("done", 1)] * 2
    stages = {"model": 1, "probe": 3, "regions": 2, "backbone": 2, "fuse": 4, "integrate": 4, "evaluate": 1 + 3 + 2 + 8}
    assert {stage: count(root, stage) for stage in stages} == stages
    reuse = {one.stage: (one.needed, one.made) for one in data.reuse}
    assert reuse["probe"] == (18, 3)
    assert reuse["integrate"] == (6, 4)
    assert best_trial(data) is not None


def test_only_the_best_trials_weights_are_left(root: Path, grid: tuple[Sweep, list[Attempt], SweepData]) -> None:
    sweep, _, data = grid
    best = best_trial(data)
    assert best is not None
    kept = own_models(pipeline(sweep.run(best.points[0], sweep.seeds[0])), "final").values()
    left = {path.parent for stage in ("fuse", "integrate") for path in (root / "out" / stage).glob("*/*.safetensors")}
    assert left == {made.path for made in kept}


def test_the_same_sweep_again_does_nothing(root: Path, grid: tuple[Sweep, list[Attempt], SweepData]) -> None:
    sweep, attempts, _ = grid
    before = made(root)
    assert run_sweep(sweep, quiet()) == attempts
    assert made(root) == before


def test_without_rays_state_and_record_a_sweep_is_rebuilt_from_artifacts(
    root: Path, grid: tuple[Sweep, list[Attempt], SweepData]
) -> None:
    sweep, attempts, _ = grid
    shutil.rmtree(root / "out" / "sweep")
    shutil.rmtree(root / "out" / ".work")
    victim = max(made(root), key=lambda path: (path.parent.parent.name == "integrate", str(path))).parent
    fused = root / "out" / "fuse" / read_json(victim / "manifest.json")["inputs"]["fused"][:12] / "manifest.json"
    shutil.rmtree(victim)
    before = made(root)
    assert run_sweep(sweep, quiet()) == attempts
    after = made(root)
    assert {path for path in after if path not in before and path.parts[-3] != "sweep"} == {victim / "manifest.json"}
    assert {path for path in before if after[path] != before[path]} <= {fused}, "whose weights had been dropped"


def test_a_failed_trial_is_reported_and_the_others_finish(root: Path) -> None:
    changes = {"integration.learning_rate": [0.001, 1e30], "integration.schedule": ["constant_with_warmup"]}
    fixed = {"integration.steps": 4, "integration.log_every": 1, "integration.max_grad_norm": 1e30}
    sweep = load(root, space=changes, fixed=fixed)
    attempts = run_sweep(sweep, quiet())
    assert [attempt.status for attempt in attempts] == ["done", "failed"]
    assert "the loss is" in attempts[1].reason
    assert not sweep_record(sweep).complete, "the same command must try it again"
    data = gather(sweep, attempts, pipeline)
    assert [trial.status for trial in data.trials] == ["done", "failed"]


def test_asha_stops_trials_before_their_integration(root: Path, grid: Any) -> None:
    space = {"fusion.omega": [0.1, 0.3, 0.5, 0.7]}
    sweep = load(root, space=space, search={"method": "asha", "reduction": 4}, objectives=["mean_loss"], concurrency=1)
    before = count(root, "integrate")
    attempts = run_sweep(sweep, quiet())
    states = [attempt.status for attempt in attempts]
    assert set(states) == {"done", "stopped"}, states
    assert count(root, "integrate") - before == states.count("done")


def test_optuna_searches_and_reuses(root: Path, grid: Any) -> None:
    pytest.importorskip("optuna")
    space = {"regions.p": [0.05, 0.2], "fusion.omega": {"low": 0.0, "high": 1.0}}
    sweep = load(root, space=space, search={"method": "optuna", "samples": 3}, fixed={"groups.tau": 0.0}, model="fused")
    probes, integrations = count(root, "probe"), count(root, "integrate")
    attempts = run_sweep(sweep, quiet())
    assert sum(len(attempt.points) for attempt in attempts) == 3
    assert all(attempt.status == "done" for attempt in attempts)
    assert (count(root, "probe"), count(root, "integrate")) == (probes, integrations), "the fused model needs no more"
    assert read_json(sweep_record(sweep).path / "attempts.json")


def test_given_checkpoints_with_test_rows_alone_are_scored_by_the_command(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "given.yaml"
    path.write_text(yaml.safe_dump(given(root)))
    monkeypatch.setattr(sys, "argv", ["cpift", "evaluate", str(path), "--output", str(root / "scored")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    printed = capsys.readouterr().out.splitlines()
    models = [line.split(":")[0] for line in printed if not line.startswith("! ")]  # what no probe learnt comes first
    assert models == ["base", "probe t1", "probe t2", "fused"]


@pytest.mark.parametrize("held", [False, True], ids=["written", "held by other processes"])
def test_given_checkpoints_are_swept_alike_in_trials_and_by_the_clusters_tasks(
    held: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trials, for a linear merge has no ω. On a cluster a trial holds no CPU, and its fusion is tasks; or it is
    merged where it is scored, from models in the memory of processes that all trials ask."""
    monkeypatch.setattr(handover, "room_here", lambda: 1)  # no worker has room for models of its own
    free = choosing.free_resources
    monkeypatch.setattr(choosing, "free_resources", lambda: free() * 2)  # one machine reads its own files by itself
    found, notes = [], list[str]()
    for distributed in (False, True):
        folder = root / f"given-{distributed}-{held}"
        folder.mkdir()
        resources = given(root)["resources"] | {"distributed": distributed}
        space = {"fusion.method": ["cpift", "linear"], "fusion.omega": [0.2, 0.8]}
        keep = "scores" if held else "all"
        fields = {"run": given(root, resources=resources), "space": space, "model": "fused", "keep": keep}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(fields | {"objectives": ["mean_loss"]}))
        sweep, view = load_sweep(folder / "sweep.yaml", output=folder / "out"), quiet()
        monkeypatch.setattr(view, "note", notes.append)
        assert asks_ray(sweep.base.resources) == distributed
        attempts = run_sweep(sweep, view)
        assert [(one.status, len(one.points)) for one in attempts] == [("done", 1), ("done", 1), ("done", 2)]
        best = best_trial(gather(sweep, attempts, pipeline))
        assert best is not None
        means = {
            trial.number: trial.figures["fused"]["mean_loss"].mean for trial in gather(sweep, attempts, pipeline).trials
        }
        assert best.number == min(means, key=lambda number: means[number])
        made = {path.parent: read_json(path)["outputs"] for path in (folder / "out" / "fuse").glob("*/manifest.json")}
        hashes = {path.name: outputs["model.safetensors"] for path, outputs in made.items()}
        assert held or hashes == {path.name: file_sha256(path / "model.safetensors") for path in made}
        assert not (held and any((folder / "out" / "fuse").glob("*/model.safetensors")))
        found.append((best.points, hashes))
    assert len(found[0][1]) == 3
    assert found[0] == found[1]
    _FOUND.append(found[0])
    assert all(one == found[0] for one in _FOUND)
    stay = [note for note in notes if note.startswith("Models stay in memory from point to point: ")]
    where = ["in a process that all workers ask, beside mapped files; ", "in 2 processes of the cluster"]
    assert [what in note for what, note in zip(where, stay, strict=False)] == [True, True] * held


_FOUND: list[Any] = []  # of the same points, each way
