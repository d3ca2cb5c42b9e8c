"""Sweeps: what is refused, what is planned and merged (no Ray, no training), statistics, and a real one on Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cpift.config.loading import load_config
from cpift.console.view import quiet
from cpift.disk.files import read_json
from cpift.errors import ConfigError
from cpift.evaluation.estimates import estimate, t_quantile
from cpift.method.masks import read_mask
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork
from cpift.sweep.config import Sweep, load_sweep
from cpift.sweep.points import choose_points, group_points
from tests.helpers.sweeps import TASKS, Copies, load, run_fields

# ---- the sweep file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"regions.q": [1]}}, ["space.regions.q", "is not a field"]),
        ({"space": {"regions.p": [0.1, 2.0]}}, ["space.regions.p", "2", "at most 1"]),
        ({"space": {"regions.p": {"low": 0.1, "high": 0.2}}}, ["regions.p", "a grid needs lists"]),
        ({"space": {"regions.p": []}}, ["space.regions.p", "at least 1"]),
        ({"space": {"seed": [1, 2]}}, ["list repeats under `seeds`"]),
        ({"search": "randm"}, ["search.method", "'randm'"]),
        ({"search": "random"}, ["search", "needs `samples`"]),
        ({"search": {"method": "grid", "samples": 3}}, ["search", "leave `samples` out"]),
        ({"objectives": ["accuracy"]}, ["'accuracy' is no figure"]),
        ({"objectives": ["task.z.loss"]}, ["no task 'z'", "a, b, c"]),
        ({"objectives": ["task.a.score"]}, ["write task.a.loss"]),
        ({"seeds": [1, 1]}, ["has one twice"]),
        ({"spaces": {}}, ["spaces: is not a field", "did you mean 'space'?"]),
        ({"run": "nowhere.yaml"}, ["nowhere.yaml", "check the path"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: Mapping[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **changes)
    for part in said:
        assert part in str(caught.value)


def test_a_point_replaces_the_alternative_of_a_field(tmp_path: Path) -> None:
    sweep = load(tmp_path, space={"groups.tau_chance": [2.0], "integration.epochs": [1.0]})
    run = sweep.run({"groups.tau_chance": 2.0, "integration.epochs": 1.0}, 7)
    assert (run.groups.tau, run.groups.tau_chance, run.seed) == (None, 2.0, 7)
    assert (run.integration.steps, run.integration.epochs) == (None, 1.0)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_sweeps_load(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run's data is made by a script first, any file will do here."""
    fields = yaml.safe_load(path.read_text())
    run = yaml.safe_load((path.parent / fields["run"]).read_text())
    (tmp_path / "rows.jsonl").write_text("")
    for source in (task[split] for task in run["tasks"] for split in ("train", "test")):
        if "file" in source:
            source["file"] = "rows.jsonl"
    copied = tmp_path / "sweep.yaml"
    copied.write_text(yaml.safe_dump(fields | {"run": run}, sort_keys=False))
    assert load_sweep(copied).config.space


# ---- points --------------------------------------------------------------------------------------------------------


def test_a_grid_holds_every_combination_once(tmp_path: Path) -> None:
    points = choose_points(load(tmp_path, space={"regions.p": [0.1, 0.2, 0.1], "groups.tau": [0.3, 0.4]}).config)
    assert [tuple(point.values()) for point in points] == [(0.1, 0.3), (0.1, 0.4), (0.2, 0.3), (0.2, 0.4)]


def test_random_points_follow_from_the_seed_and_stay_in_their_ranges(tmp_path: Path) -> None:
    space = {
        "regions.p": {"low": 0.001, "high": 0.1, "log": True},
        "integration.steps": {"low": 1, "high": 3, "integer": True},
        "fusion.space": ["weights", "delta"],
    }
    config = load(tmp_path, space=space, search={"method": "random", "samples": 40}).config
    points = choose_points(config)
    assert points == choose_points(config)
    assert len(points) == 40
    assert all(0.001 <= point["regions.p"] <= 0.1 for point in points)
    assert {point["integration.steps"] for point in points} == {1, 2, 3}
    below = sum(point["regions.p"] < 0.01 for point in points)
    assert 10 <= below <= 30, "a log range is as often below as above its geometric middle"
    other = load(tmp_path, space=space, search={"method": "random", "samples": 40, "seed": 1}).config
    assert choose_points(other) != points


def test_random_search_of_a_small_space_ends(tmp_path: Path) -> None:
    config = load(tmp_path, space={"groups.tau": [0.1, 0.2]}, search={"method": "random", "samples": 9}).config
    assert len(choose_points(config)) == 2


# ---- sharing and merging, with an engine that copies θ0 instead of training -----------------------------------------


def planned(sweep: Sweep) -> tuple[list[dict[str, Any]], list[list[Pipeline]]]:
    points = choose_points(sweep.config)
    return points, [[Pipeline(sweep.run(p, s), NoEngine(), quiet()) for s in sweep.seeds] for p in points]


def test_shared_work_is_made_once_and_equal_outcomes_are_one_trial(tmp_path: Path) -> None:
    sweep = load(tmp_path, seeds=[3, 4])
    points, runs = planned(sweep)
    engine = Copies()
    shared = SharedWork([run for one in runs for run in one], engine, quiet())
    shared.prepare()
    assert engine.fits == {f"probe {task} (seed {seed})": 1 for task in TASKS for seed in (3, 4)}
    assert len(list((tmp_path / "out" / "regions").iterdir())) == 4, "two p, two seeds"
    trials = group_points(points, runs, sweep.config.model)
    # τ = 0 and 0.001 join all tasks, τ = 1 none: six points are four trials.
    assert [[point["groups.tau"] for point in trial.points] for trial in trials] == [[0.0, 0.001], [1.0]] * 2
    shared.complete([run for trial in trials for run in trial.runs])
    assert sum(engine.fits.values()) == 6 + 4, "two groupings × two seeds: backbones do not depend on p"
    assert sum(engine.scored.values()) == 1 + 6 + 4, "θ0, probes and backbones"
    before = engine.fits.copy(), engine.scored.copy()
    again = SharedWork([run for one in planned(sweep)[1] for run in one], engine, quiet())
    again.prepare()
    again.complete(again.runs)
    assert (engine.fits, engine.scored) == before


def test_a_single_run_finds_what_the_sweep_selected_and_masks_are_nested(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    _, runs = planned(sweep)
    SharedWork([run for one in runs for run in one], Copies(), quiet()).prepare()
    path = tmp_path / "single.yaml"
    path.write_text(yaml.safe_dump(run_fields() | {"regions": {"p": 0.2}, "output": str(tmp_path / "out")}))
    single = StageArtifacts(load_config(path))
    assert single.regions.complete, "cpift run with this p must be a cache hit"
    narrow, wide = (run.artifacts.regions.path for one in (runs[0], runs[3]) for run in one)
    for task in TASKS:
        for name in read_json(narrow / "regions.json")["regions"][task]["cores"]:
            inside, outside = read_mask(narrow, task, name), read_mask(wide, task, name)
            assert inside is not None
            assert outside is not None
            assert torch.equal(inside & outside, inside)


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "freedom", "wanted"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.3026527),
        (0.95, 4, 2.1318468),
        (0.975, 29, 2.0452296),
        (0.995, 9, 3.2498355),
    ],
)
def test_t_quantiles(q: float, freedom: int, wanted: float) -> None:
    """Against printed tables."""
    assert t_quantile(q, freedom) == pytest.approx(wanted, abs=1e-6)


def test_estimate() -> None:
    """Mean 2, standard deviation 1, n = 3: half-width 4.3027 / √3."""
    found = estimate([1.0, 2.0, 3.0], 0.95)
    assert found.mean == 2.0
    assert found.high == pytest.approx(2 + 4.3026527 / 3**0.5)
    assert (estimate([1.0], 0.95).low, estimate([1.0], 0.95).mean) == (None, 1.0)
