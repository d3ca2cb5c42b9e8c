"""Which weights a sweep keeps: trials run here, with an engine that adds noise instead of training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cpift.config.loading import Fields, load_config
from cpift.config.run import RunConfig
from cpift.console.view import quiet
from cpift.disk.files import read_json
from cpift.pipeline.outcomes import known_scores, own_models
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork
from cpift.sweep import trial as sweep_trial
from cpift.sweep.config import Sweep
from cpift.sweep.keep import Keeper
from cpift.sweep.points import Trial, choose_points, group_points
from cpift.sweep.record import Attempt
from cpift.sweep.results import all_there, gather, write_results
from cpift.sweep.scores import best_trial
from tests.helpers.sweeps import ByWeights, load


def here(config: RunConfig) -> Pipeline:
    return Pipeline(config, ByWeights(), quiet())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_trial, "engine_for", lambda config: ByWeights())


def trials_of(sweep: Sweep) -> list[Trial]:
    points = choose_points(sweep.config)
    runs = [[here(sweep.run(point, seed)) for seed in sweep.seeds] for point in points]
    shared = SharedWork([run for one in runs for run in one], ByWeights(), quiet())
    shared.prepare()
    trials = group_points(points, runs, sweep.config.model)
    shared.complete([run for trial in trials for run in trial.runs])
    return trials


def go(sweep: Sweep, fields: Fields) -> None:
    for _ in sweep_trial.rungs(sweep, fields, quiet()):
        pass


def attempts(trials: Sequence[Trial]) -> list[Attempt]:
    return [Attempt([dict(point) for point in trial.points], "done", "") for trial in trials]


def weights(sweep: Sweep, stages: Sequence[str] = ("fuse", "integrate")) -> set[Path]:
    return {path.parent for stage in stages for path in (sweep.base.output_dir / stage).glob("*/model.safetensors")}


def own(trial: Trial) -> set[Path]:
    return {made.path for run in trial.runs for made in own_models(run, "final").values()}


def everything(sweep: Sweep) -> Iterator[tuple[str, bytes]]:
    """Scores and shared weights."""
    for path in sorted(sweep.base.output_dir.rglob("*")):
        if path.name == "scores.json" or (path.name == "model.safetensors" and path.parts[-3] in ("probe", "backbone")):
            yield str(path), path.read_bytes()


def swept(tmp_path: Path, **changes: Any) -> tuple[Sweep, list[Trial], Keeper]:
    """A sweep whose trials have all run."""
    sweep = load(tmp_path, seeds=[3, 4], **changes)
    trials = trials_of(sweep)
    keeper = Keeper(sweep, here, [trial.fields for trial in trials])
    for trial in trials:
        go(sweep, trial.fields)
        before = dict(everything(sweep))
        keeper.ended(trial.fields)
        assert dict(everything(sweep)) == before, "scores and shared weights stay"
    return sweep, trials, keeper


@pytest.mark.slow
def test_the_best_trials_weights_are_kept_and_never_those_of_more_than_it_and_the_next(tmp_path: Path) -> None:
    sweep, trials, keeper = swept(tmp_path)
    keeper.finish(attempts(trials))
    data = gather(sweep, attempts(trials), here)
    best = best_trial(data)
    assert best is not None
    chosen = next(trial for trial in trials if trial.fields == best.points[0])
    assert weights(sweep) == own(chosen)
    assert len(own(chosen)) == 4, "fused and final, two seeds"
    assert keeper.freed > 0
    assert all_there(sweep, attempts(trials), here)
    assert all(trial.figures["final"] for trial in data.trials), "the report has every score"


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "share"), [("all", 1), ("scores", 0)])
def test_all_or_none(tmp_path: Path, keep: str, share: int) -> None:
    sweep, trials, keeper = swept(tmp_path, keep=keep)
    keeper.finish(attempts(trials))
    assert len(weights(sweep)) == share * 4 * len(trials)
    assert len(weights(sweep, ["probe"])) == 6


@pytest.mark.slow
def test_a_resumed_trial_makes_nothing_again(tmp_path: Path) -> None:
    sweep, trials, _ = swept(tmp_path, keep="scores")
    before = {path: path.stat().st_mtime_ns for path in sweep.base.output_dir.rglob("*.json")}
    for trial in trials:
        go(sweep, trial.fields)
    assert {path: path.stat().st_mtime_ns for path in sweep.base.output_dir.rglob("*.json")} == before
    assert weights(sweep) == set()


def test_what_a_coming_trial_needs_is_not_dropped(tmp_path: Path) -> None:
    """Two lengths of integration from one fused model, and a trial that was stopped before its integration."""
    space = {"integration.steps": [2, 3], "groups.tau": [0.0]}
    sweep = load(tmp_path, space=space, keep="scores")
    first, second = trials_of(sweep)
    keeper = Keeper(sweep, here, [first.fields, second.fields])
    go(sweep, first.fields)
    keeper.ended(first.fields)
    assert len(weights(sweep, ["fuse"])) == 1, "the second trial begins with it"
    assert weights(sweep, ["integrate"]) == set()
    go(sweep, second.fields)
    keeper.ended(second.fields)
    assert weights(sweep) == set()


@pytest.mark.slow
def test_of_fused_models_that_are_only_scored_the_best_is_written(tmp_path: Path) -> None:
    sweep = load(tmp_path, model="fused", space={"fusion.omega": [0.2, 0.5]}, objectives=["mean_loss"])
    trials = trials_of(sweep)
    for trial in trials:
        go(sweep, trial.fields)
    assert weights(sweep) == set()
    assert all(known_scores(run, "fused") for trial in trials for run in trial.runs)
    keeper = Keeper(sweep, here, ())
    keeper.finish(attempts(trials))
    (best,) = keeper.to_write()
    hashes = own_models(best, "fused")["fused"].manifest()["outputs"]
    best.fuse()
    assert weights(sweep) == {own_models(best, "fused")["fused"].path}
    assert own_models(best, "fused")["fused"].manifest()["outputs"]["model.safetensors"] == hashes["model.safetensors"]
    assert keeper.to_write() == []
    value = {run: figures_of(run) for trial in trials for run in trial.runs}
    assert value[next(run for run in value if run.config == best.config)] == min(value.values())


def figures_of(run: Pipeline) -> float:
    scores = known_scores(run, "fused")
    assert scores is not None
    return sum(score["loss"] for score in scores["fused"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "written"), [("all", 2), ("scores", 0)])
def test_as_many_fused_models_are_written_as_are_kept(tmp_path: Path, keep: str, written: int) -> None:
    sweep = load(tmp_path, model="fused", space={"fusion.omega": [0.2, 0.5]}, objectives=["mean_loss"], keep=keep)
    trials = trials_of(sweep)
    for trial in trials:
        go(sweep, trial.fields)
    keeper = Keeper(sweep, here, ())
    keeper.finish(attempts(trials))
    assert (len(weights(sweep)), keeper.to_write()) == (written, [])


@pytest.mark.slow
def test_a_search_keeps_fused_models_until_its_end(tmp_path: Path) -> None:
    sweep = load(tmp_path, keep="scores")
    trials = trials_of(sweep)
    keeper = Keeper(sweep, here, None)
    for trial in trials[:2]:
        go(sweep, trial.fields)
        keeper.ended(trial.fields)
    assert (len(weights(sweep, ["fuse"])), len(weights(sweep, ["integrate"]))) == (2, 0)
    keeper.finish(attempts(trials[:2]))
    assert weights(sweep) == set()


@pytest.mark.slow
def test_what_a_run_or_another_sweep_made_stays(tmp_path: Path) -> None:
    sweep = load(tmp_path, keep="scores")
    trials = trials_of(sweep)
    mine = here(trials[0].runs[0].config)
    mine.integrate()
    theirs = load(tmp_path, keep="all", seeds=[0], objectives=["mean_loss"])
    go(theirs, trials[1].fields)
    for trial in trials:
        go(sweep, trial.fields)
    Keeper(sweep, here, ()).finish(attempts(trials))
    assert weights(sweep) == own(trials[0]) | own(trials[1])


@pytest.mark.slow
def test_runs_find_the_best_weights_and_make_others_again(tmp_path: Path) -> None:
    sweep, trials, keeper = swept(tmp_path)
    before = {str(path): path.read_bytes() for path in sweep.base.output_dir.rglob("scores.json")}
    keeper.finish(attempts(trials))
    report = write_results(gather(sweep, attempts(trials), here), sweep.base.output_dir)
    best = here(load_config(report.with_name("best.yaml")))
    best.evaluate()
    assert not best.worked, "everything was there"
    dropped = next(trial for trial in trials if not own(trial) & weights(sweep))
    manifest = dropped.runs[1].artifacts
    groups = dropped.runs[1].group().groups
    fused = own_models(dropped.runs[1], "final")["fused"]
    final = manifest.integrate(groups, fused)
    command = final.manifest()["dropped"]["remake"].split()
    assert command[:3] == ["cpift", "run", str(report.with_name("best.yaml"))]
    overrides = [one.removeprefix("--set=") for one in command[3:]]
    again = here(load_config(Path(command[2]), overrides))
    hashes = {made.path: made.manifest()["outputs"]["model.safetensors"] for made in (fused, final)}
    again.evaluate()
    assert again.worked
    assert again.integrate().path == final.path
    for made in (fused, final):
        assert made.has_weights
        assert made.manifest()["outputs"]["model.safetensors"] == hashes[made.path]
    assert {str(path): path.read_bytes() for path in sweep.base.output_dir.rglob("scores.json")} == before
    Keeper(sweep, here, ()).finish(attempts(trials))
    assert {fused.path, final.path} <= weights(sweep), "what a run made again is the user's"


@pytest.mark.slow
def test_a_crash_before_a_trials_weights_are_dropped_is_made_up_for(tmp_path: Path) -> None:
    """The driver dies when the last trial has ended: the same command finds it done, and drops what was left."""
    sweep, trials, _ = swept(tmp_path, keep="all")
    assert len(weights(sweep)) == 4 * len(trials)
    later = load(tmp_path, seeds=[3, 4], keep="best")
    Keeper(later, here, ()).finish(attempts(trials))
    assert len(weights(sweep)) == 4
    assert all(known_scores(run, "final") for trial in trials for run in trial.runs)
    marked = [
        path for path in (sweep.base.output_dir / "integrate").glob("*/manifest.json") if read_json(path).get("dropped")
    ]
    assert len(marked) == 2 * (len(trials) - 1)
    assert all(json.loads(path.read_text())["made_for"] for path in marked)
