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
from cpift.data.tasks import load_examples, source_fingerprint
from cpift.disk.files import read_json
from cpift.errors import ConfigError
from cpift.evaluation.estimates import estimate, t_quantile
from cpift.method.masks import read_mask
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.outcomes import own_models
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork
from cpift.sweep.config import Sweep, load_sweep
from cpift.sweep.judging import on_report_rows
from cpift.sweep.points import check_points, choose_points, group_points
from cpift.sweep.record import sweep_record
from tests.helpers.sweeps import TASKS, Copies, load, run_fields
from tests.helpers.toys import make_toy

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
        ({"search": {"storage": "sqlite:///a.db"}}, ["storage: of method optuna alone"]),
        ({"search": {"method": "optuna", "samples": 2, "storage": "a.db"}}, ["write sqlite:///a.db"]),
        ({"search": {"method": "optuna", "samples": 2, "sampler": "cmaes"}}, ["two or more ranges", "regions.p"]),
        ({"report": 1.5}, ["report.share", "below 1"]),
        ({"report": {"tests": {"z": {"file": "z.jsonl"}}}}, ["report.tests.z", "no such task"]),
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


def test_fields_that_a_method_does_not_look_at_make_no_trial(tmp_path: Path) -> None:
    space = {"fusion.method": ["linear", "ties"], "fusion.density": [0.2, 0.4], "fusion.weights.a": [0.5]}
    sweep = load(tmp_path, space=space, model="fused")
    merged = [sweep.run(point, 0).fusion for point in choose_points(sweep.config)]
    assert [fusion.density for fusion in merged] == [0.2, 0.2, 0.2, 0.4]
    assert all(fusion.weights == {"a": 0.5} for fusion in merged)


def test_a_search_never_sees_the_rows_that_are_reported(tmp_path: Path) -> None:
    fields = run_fields()
    held = {"procedural": "addition", "size": 30}
    fields["tasks"][1] = {"name": "b", "train": held, "holdout": {"rows": 10}}
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "1+1?", "completion": "2"}\n')
    report = {"share": 0.25, "tests": {"c": {"file": "other.jsonl"}}}
    sweep = load(tmp_path, run=fields, report=report)
    plain, seen, told = (make({}, 0) for make in (sweep.plain, sweep.run, sweep.reported))
    for name in ("a", "b"):
        rows = [{example.reply: example for example in load_examples(run.task(name).test_data)} for run in (seen, told)]
        every = {example.reply for example in load_examples(plain.task(name).test_data)}
        assert set(rows[0]) | set(rows[1]) == every
        assert len(rows[1]) < len(rows[0])
        prompts = [{str(example.prompt) for example in side.values()} for side in rows]
        assert not prompts[0] & prompts[1]
        sources = [run.task(name).test_data for run in (plain, seen, told)]
        assert len({source_fingerprint(source) for source in sources}) == 3
        assert seen.task(name).train_data == plain.task(name).train_data
    assert seen.task("c").test_data == plain.task("c").test_data
    assert told.task("c").test_data.file == other


@pytest.mark.slow
def test_the_best_is_reported_beside_the_run_as_it_stands(models: Path, tmp_path: Path) -> None:
    test = {"procedural": "addition", "size": 6, "split": "test"}
    tasks = [{"name": name, "checkpoint": {"path": str(models / name)}, "test": test} for name in ("one", "two")]
    run = {"name": "given", "model": {"path": str(models / "base")}, "tasks": tasks, "fusion": {"method": "linear"}}
    sweep = load(tmp_path, run=run, space={"fusion.weights.two": [0.2, 0.5]}, model="fused", report=0.5)
    maker = sweep_record(sweep).name
    said = [
        on_report_rows(sweep, {"fusion.weights.two": 0.2}, lambda run, at=engine: Pipeline(run, at, quiet(), maker))
        for engine in (InProcessEngine(), NoEngine())  # the second would score nothing
    ]
    assert said[0].scores == said[1].scores
    assert list(said[0].scores) == ["base", "probe one", "probe two", "as it stands", "best"]
    assert said[0].scores["best"]["one"]["rows"] == 3
    assert said[0].sentences()[-1].startswith("best against as it stands: ")
    best, stands = (Pipeline(sweep.run(at, 0), NoEngine(), quiet()) for at in ({"fusion.weights.two": 0.2}, {}))
    (kept,), (dropped,) = own_models(best, "fused").values(), own_models(stands, "fused").values()
    assert kept.has_weights
    assert not dropped.has_weights
    assert "--set=fusion.weights={}" in str(read_json(dropped.path / "manifest.json"))


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


@pytest.mark.slow
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


def test_points_that_the_memory_budget_does_not_hold_are_told_first(tmp_path: Path) -> None:
    run = run_fields() | {"model": {"path": str(make_toy(tmp_path / "toy", 0))}}
    run["resources"] = run["resources"] | {"memory_budget": 8000}  # slices of the toy, and no whole matrices
    sweep = load(tmp_path, run=run, space={"fusion.method": ["linear", "iso_c"]})
    with pytest.raises(ConfigError, match=r"by whole tensors, .* \(at fusion\.method iso_c\)") as told:
        check_points(sweep, "sweep final")
    assert [problem.where for problem in told.value.problems] == ["resources.memory_budget"]
