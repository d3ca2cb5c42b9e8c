"""Standard benchmarks as objectives of a sweep: lm-eval's figures of every trial's judged model, kept, and the best by
them. A table stands in for lm-eval, which is an extra; the last test has it itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpift.config import needs
from cpift.config.run import RunConfig
from cpift.console.view import quiet
from cpift.errors import ConfigError
from cpift.evaluation import standard
from cpift.evaluation.standard import Benchmarks
from cpift.pipeline.outcomes import benchmark_figures, own_models
from cpift.pipeline.pipeline import Pipeline
from cpift.sweep import trial as sweep_trial
from cpift.sweep.config import Sweep
from cpift.sweep.judging import require_benchmarks
from cpift.sweep.keep import Keeper, hands_over
from cpift.sweep.record import Attempt
from cpift.sweep.results import all_there, gather
from cpift.sweep.scores import best_trial
from tests.helpers.rows import LM_EVAL_TASK
from tests.helpers.sweeps import ByWeights, load

FIGURE = "benchmark.kinds.acc,none"
CHANGES: dict[str, Any] = {
    "space": {"fusion.omega": [0.0, 0.5, 1.0]},
    "model": "fused",
    "objectives": [FIGURE],
    "benchmarks": {"tasks": ["kinds"], "limit": 5},
}


def here(config: RunConfig) -> Pipeline:
    return Pipeline(config, ByWeights(), quiet())  # type: ignore[arg-type]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Benchmarks]:
    """What lm-eval was asked for; its accuracy is 1 for the model whose first weight is largest, less for others."""
    calls: list[Benchmarks] = []

    def scores(models: Mapping[str, Path], wanted: Benchmarks) -> dict[str, Any]:
        calls.append(wanted)
        first = {title: next(iter(load_file(path / "model.safetensors").values())) for title, path in models.items()}
        return {
            title: {"kinds": {"acc,none": float(torch.sigmoid(one.float().mean() * 10)), "acc_stderr,none": None}}
            for title, one in first.items()
        }

    monkeypatch.setattr(standard, "standard_scores", scores)
    monkeypatch.setattr("cpift.sweep.searching.absent_extra", lambda *what: [])
    monkeypatch.setattr(sweep_trial, "engine_for", lambda config: ByWeights())
    return calls


def runs_of(sweep: Sweep, fields: dict[str, Any]) -> Pipeline:
    return here(sweep.run(fields, sweep.seeds[0]))


@pytest.mark.slow
def test_trials_are_judged_by_them_and_the_best_is_kept(asked: list[Benchmarks], tmp_path: Path) -> None:
    sweep = load(tmp_path, **CHANGES)
    assert not hands_over(sweep), "lm-eval reads folders"
    points: list[dict[str, Any]] = [{"fusion.omega": value} for value in (0.0, 0.5, 1.0)]
    keeper, found = Keeper(sweep, here, None), {}
    for point in points:
        (figures,) = list(sweep_trial.rungs(sweep, point, quiet()))
        found[point["fusion.omega"]] = figures[FIGURE]
        keeper.ended(point)
    assert len(set(found.values())) == 3
    assert [one.limit for one in asked] == [5, 5, 5]
    attempts = [Attempt([point], "done", "") for point in points]
    keeper.finish(attempts)
    data = gather(sweep, attempts, here)
    best = best_trial(data)
    assert best is not None
    omega = best.points[0]["fusion.omega"]
    assert found[omega] == max(found.values())
    made = {point["fusion.omega"]: own_models(runs_of(sweep, point), "fused")["fused"] for point in points}
    weights = {value: model.has_weights for value, model in made.items()}
    assert weights == {value: value == omega for value in found}
    assert all_there(sweep, attempts, here)
    for point in points:  # again: from the disk
        assert list(sweep_trial.rungs(sweep, point, quiet())) == [{FIGURE: found[point["fusion.omega"]]}]
    assert len(asked) == 3
    wanted = sweep.benchmarks
    assert wanted is not None
    assert benchmark_figures(runs_of(sweep, points[0]), "fused", wanted) == {FIGURE: found[0.0]}
    assert benchmark_figures(runs_of(sweep, points[0]), "fused", replace(wanted, shots=3)) == {}
    folder = runs_of(sweep, points[0]).artifacts
    assert not any("benchmarks" in str(one) for one in (folder.regions.fields, folder.regions.inputs))


def test_a_task_file_that_changed_is_scored_anew(asked: list[Benchmarks], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "kinds.yaml").write_text("task: kinds")
    sweep = load(tmp_path, **(CHANGES | {"benchmarks": {"tasks": ["kinds"], "folder": "tasks"}}))
    assert sweep.config.benchmarks is not None
    assert sweep.config.benchmarks.folder == tmp_path / "tasks"
    point = {"fusion.omega": 0.5}
    for _ in range(2):
        list(sweep_trial.rungs(sweep, point, quiet()))
    assert len(asked) == 1
    (tmp_path / "tasks" / "kinds.yaml").write_text("task: kinds  # other")
    list(sweep_trial.rungs(sweep, point, quiet()))
    assert len(asked) == 2


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Makes a release of lm-eval the installed one; None: no release."""
    version = metadata.version

    def installed(release: str | None) -> None:
        def told(name: str) -> str:
            if name == "lm_eval" and release is None:
                raise metadata.PackageNotFoundError(name)
            return str(release) if name == "lm_eval" else version(name)

        monkeypatch.setattr(metadata, "version", told)

    return installed


def test_figures_are_of_a_release_of_lm_eval(
    asked: list[Benchmarks], tmp_path: Path, install: Callable[[str | None], None]
) -> None:
    sweep, times = load(tmp_path, **CHANGES), []
    for release in ("0.4.9", "0.4.9", "0.4.13", "0.4.9", None):  # at last a machine that only reports
        install(release)
        assert [one.keys() for one in sweep_trial.rungs(sweep, {"fusion.omega": 0.5}, quiet())] == [{FIGURE}]
        times.append(len(asked))
    assert times == [1, 1, 2, 2, 2]


def test_finished_figures_of_no_release_stay(
    asked: list[Benchmarks], tmp_path: Path, install: Callable[[str | None], None]
) -> None:
    sweep = load(tmp_path, **CHANGES)
    for release in (None, "0.4.13"):
        install(release)
        list(sweep_trial.rungs(sweep, {"fusion.omega": 0.5}, quiet()))
    assert len(asked) == 1


def test_a_figure_that_lm_eval_has_not_is_told_before_any_work(asked: list[Benchmarks], tmp_path: Path) -> None:
    sweep = load(tmp_path, **(CHANGES | {"objectives": ["benchmark.kinds.f1,none"]}))
    run = here(sweep.base)
    with pytest.raises(ConfigError, match=r"'benchmark\.kinds\.f1,none': lm-eval has no such figure → one of benchm"):
        require_benchmarks(sweep, run)
    assert [one.limit for one in asked] == [1]
    assert not (run.root / "probe").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": ["benchmark.gsm8k.acc,none"]}, "is of none of the benchmarks → name its task under .* kinds"),
        ({"benchmarks": None}, "is of none of the benchmarks → name its task under `benchmarks`; there are none"),
        ({"benchmarks": {"tasks": []}}, r"benchmarks\.tasks"),
        ({"benchmarks": {"tasks": ["kinds"], "folder": "nowhere"}}, r"benchmarks\.folder: .*nowhere is no folder"),
        ({"fixed": {"resources.workers": 2}}, "benchmarks: are scored in the trials' own processes"),
    ],
)
def test_what_cannot_be_is_told_first(
    changes: dict[str, Any], said: str, asked: list[Benchmarks], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, **(CHANGES | changes))


def test_without_the_extra_they_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"benchmarks: lm-eval needs lm_eval, which is not installed → pip in"):
        load(tmp_path, **CHANGES)


def test_lm_eval_itself_judges_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sweep_trial, "engine_for", lambda config: ByWeights())
    (tmp_path / "tasks").mkdir()
    rows = [{"prompt": word, "answer": kind} for word, kind in (("cat", "noun"), ("run", "verb"), ("Anna", "name"))]
    (tmp_path / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "kinds.yaml").write_text(LM_EVAL_TASK.format(file=tmp_path / "kinds.jsonl"))
    figure = "benchmark.local_kinds.acc,none"
    benchmarks = {"tasks": ["local_kinds"], "folder": "tasks"}
    sweep = load(tmp_path, **(CHANGES | {"objectives": [figure], "benchmarks": benchmarks}))
    require_benchmarks(sweep, here(sweep.base))
    ((found, *_),) = ([means] for means in sweep_trial.rungs(sweep, {"fusion.omega": 0.5}, quiet()))
    assert found[figure] in {0.0, 1 / 3, 2 / 3, 1.0}
