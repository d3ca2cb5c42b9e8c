"""Models that stay in a trial's worker from point to point: what is read, what is made, and what is said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.cluster.resident import choosing
from cpift.cluster.tasks import TaskEngine
from cpift.console.view import View, quiet
from cpift.disk import mapped
from cpift.disk.files import read_json
from cpift.merging.resident.engine import hold_at_most
from cpift.merging.resident.residents import MAPPED
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.shared import SharedWork
from cpift.pipeline.stages import handover
from cpift.sweep import search
from cpift.sweep.config import Sweep
from cpift.sweep.points import choose_points
from cpift.sweep.trial import held_between, rungs
from tests.helpers.sweeps import ByWeights, load, run_fields

RUN = run_fields() | {"backbone": {"source": "pretrained"}}
FUSED: dict[str, Any] = {"run": RUN, "model": "fused", "objectives": ["mean_loss"]}


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake = ByWeights()
    for engine in (InProcessEngine, TaskEngine):
        for name in ("expect", "fit", "evaluate"):
            done = getattr(fake, name)
            monkeypatch.setattr(engine, name, lambda self, *arguments, done=done: done(*arguments))
    yield
    hold_at_most(0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes of θ0 and fine-tunes that are looked at, or copied."""
    counts, view = Counter[str](), mapped.MappedFile.view

    def counted(self: Any, start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        if self._path.name == "model.safetensors":
            counts["bytes"] += count * dtype.itemsize
        return view(self, start, dtype, count)

    monkeypatch.setattr(mapped.MappedFile, "view", counted)
    return counts


@pytest.mark.slow
def test_the_first_point_alone_reads_the_models(tmp_path: Path, read: Counter[str]) -> None:
    """Of a search that chooses p as it goes, too: each of its points selects its own regions."""
    space = {"regions.p": {"low": 0.01, "high": 0.2}, "fusion.omega": [0.2, 0.6]}
    searched = {"method": "random", "samples": 3, "seed": 1}
    made: dict[int, dict[str, str]] = {}
    needed: dict[int, list[int]] = {}
    for held in (0, 1 << 24):
        (tmp_path / str(held)).mkdir()
        sweep = load(tmp_path / str(held), **FUSED, space=space, search=searched)
        points = choose_points(sweep.config)
        shared = SharedWork([search.pipeline(sweep.run(points[0], 0))], TaskEngine(sweep.base.resources), quiet())
        shared.prepare()
        handover._KNOWN.clear()
        hold_at_most(held)
        needed[held] = []
        for point in points:
            read.clear()
            list(rungs(sweep, point, quiet()))
            needed[held].append(read["bytes"])
        fused = (sweep.base.output_dir / "fuse").rglob("manifest.json")
        made[held] = {path.parent.name: read_json(path)["outputs"]["model.safetensors"] for path in sorted(fused)}
    assert len(points) == 3
    assert made[0] == made[1 << 24] != {}
    again, stays = (counts[1:] for counts in needed.values())
    assert min(again) > 0
    assert stays == [0, 0]


@pytest.mark.parametrize(
    ("changes", "held", "said"),
    [
        ({}, True, "Models stay in memory from point to point"),
        ({"keep": "all"}, False, ""),
        ({"model": "final"}, False, ""),
        ({"fixed": {"fusion.method": "ties"}}, True, "Models stay in memory from point to point"),
        ({"fixed": {"resources.memory_budget": 1}}, False, "more than resources.memory_budget"),
    ],
    ids=str,
)
def test_what_is_taken_is_said(
    changes: dict[str, Any], held: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load(tmp_path, **FUSED | {"space": {"fusion.omega": [0.5]}} | changes)
    run, view, notes = search.pipeline(sweep.base), quiet(), list[str]()
    monkeypatch.setattr(view, "note", notes.append)
    monkeypatch.setattr(choosing, "alive_nodes", list)
    assert kept(sweep, view) == 0, "nothing is there to be looked at yet"
    SharedWork([run], TaskEngine(sweep.base.resources), quiet()).prepare()
    assert not notes
    assert bool(kept(sweep, view)) == held
    assert [said in note for note in notes] == ([True] if said else [])


def kept(sweep: Sweep, view: View) -> Any:
    """What two workers keep, or ask."""
    with held_between(sweep, search.pipeline, 2, view) as where:
        return where


def test_where_memory_has_no_room_for_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load(tmp_path, **FUSED, space={"fusion.omega": [0.5]})
    run = search.pipeline(sweep.base)
    SharedWork([run], TaskEngine(sweep.base.resources), quiet()).prepare()
    monkeypatch.setattr(handover, "available_memory", lambda: 1 << 12)
    found = handover.kept_between_points([run], 2)
    assert found.held == 0
    assert "in each of 2 workers would be more than half of what is free" in found.why
    need = MAPPED.needs(found.models, found.tasks)
    monkeypatch.setattr(handover, "available_memory", lambda: 2 * need)
    choice = choosing._choice(handover.kept_between_points([run], 2), run.config.resources, 2, False)
    assert choice is not None
    assert (choice.count, choice.room) == (1, MAPPED), "one copy for both"
    assert "in a process that all workers ask, beside mapped files; " in choice.said


def test_every_seeds_models_are_counted(tmp_path: Path) -> None:
    sweep = load(tmp_path, **FUSED, space={"fusion.omega": [0.5]}, seeds=[1, 2])
    runs = [search.pipeline(sweep.run({}, seed)) for seed in sweep.seeds]
    SharedWork(runs, TaskEngine(sweep.base.resources), quiet()).prepare()
    found = handover.kept_between_points(runs, 1)
    assert found.held
    assert (len(found.models), found.tasks) == (1 + 2 * 3, 3)
