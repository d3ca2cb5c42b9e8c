"""A sweep on Ray Tune: shared work first, then trials that each do what is left for their own point.

A trial is a thin wrapper around the pipeline in a warm worker. Tune chooses, places and restarts trials; what they made
is in the artifacts, so the same command again goes on from those even where Tune's own state is lost.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ray import tune

from cpift.cluster.engine import RayEngine
from cpift.cluster.fits import cpus_for, parallel_fits
from cpift.cluster.placement import demand, tune_options
from cpift.cluster.session import progress_board, show_progress
from cpift.cluster.tasks import TaskEngine
from cpift.config.loading import describe
from cpift.config.run import ResourcesConfig, RunConfig
from cpift.console.view import View, quiet
from cpift.disk.artifacts import Artifact, claimed
from cpift.disk.files import digest, write_json
from cpift.errors import entry
from cpift.pipeline.outcomes import INTEGRATES, own_models
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork
from cpift.sweep.config import Range, Sweep
from cpift.sweep.judging import require_benchmarks, require_objectives
from cpift.sweep.keep import Keeper
from cpift.sweep.points import Trial, choose_points, group_points
from cpift.sweep.record import Attempt, TrialResult, attempts_of, pinned, read_attempts, sweep_record
from cpift.sweep.results import all_there, own_artifacts
from cpift.sweep.searching import OptunaStudy, optuna_study
from cpift.sweep.trial import asks_ray, failure_file, held_between, point_of, run_trial
from cpift.text.units import show_size

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # no banner: progress is shown by ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are handled by ours, see `console/ending.py`
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are read from the artifacts
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_sweep(sweep: Sweep, view: View) -> list[Attempt]:
    """Make everything the sweep needs and return what was tried; what is there already is not made again.

    A trial that fails is recorded and the others go on; the record is complete, and a rerun does nothing, only when
    none failed. Raises what shared work raises: without probes and regions there is no trial.
    """
    sweep = pinned(sweep)
    record = sweep_record(sweep)
    if record.complete and all_there(sweep, read_attempts(record), pipeline):
        view.cached(f"sweep {sweep.name}")
        _tidy(sweep, Keeper(sweep, pipeline, ()), read_attempts(record), view)
        return read_attempts(record)
    if record.complete:  # of a sweep whose outputs somebody deleted
        shutil.rmtree(record.path)
    started = time.time()
    require_benchmarks(sweep, pipeline(sweep.base))
    with TaskEngine(sweep.base.resources).session():
        search = _search_as_it_goes if sweep.config.search.kind.as_it_goes else _search_planned
        attempts = search(sweep, record, view)
    if not any(attempt.status == "failed" for attempt in attempts):
        with claimed([record], view.warn), record.build(seconds=time.time() - started) as out:
            write_json(out / "attempts.json", [attempt.__dict__ for attempt in attempts])
    return attempts


def pipeline(config: RunConfig) -> Pipeline:
    """A run of the sweep as the driver sees it: silent, for the sweep reports shared work itself."""
    return Pipeline(config, RayEngine(config, stored=False), quiet())


def _search_planned(sweep: Sweep, record: Artifact, view: View) -> list[Attempt]:
    """Grid, random and ASHA: every point is known, so those with one outcome are merged before trials start."""
    points = choose_points(sweep.config)
    runs = [[pipeline(sweep.run(point, seed)) for seed in sweep.seeds] for point in points]
    shared = SharedWork(
        [run for runs_of_point in runs for run in runs_of_point], TaskEngine(sweep.base.resources), view
    )
    shared.prepare()
    trials = group_points(points, runs, sweep.config.model)
    view.note(f"{len(points)} points, seeds {list(sweep.seeds)}: {len(trials)} trials differ in their outcome")
    shared.complete([run for trial in trials for run in trial.runs])
    require_objectives(sweep, trials[0].runs)
    todo, results = [trial.fields for trial in trials if not _done(sweep, trial)], {}
    keeper = Keeper(sweep, pipeline, todo)
    if todo:
        results = _tune(sweep, record, {"fields": tune.grid_search(todo)}, len(todo), keeper, view)
    else:
        view.cached(f"{len(trials)} trials")
    attempts = [_attempt(sweep, trial, record, results) for trial in trials]
    _tidy(sweep, keeper, attempts, view)
    return attempts


def _tidy(sweep: Sweep, keeper: Keeper, attempts: Sequence[Attempt], view: View) -> None:
    """Drop what need not be kept, and write what is to be and only was in memory."""
    keeper.finish(attempts)
    for run in keeper.to_write():
        again = Pipeline(run.config, run.engine, quiet(), sweep_record(sweep).name)
        with view.stage(f"weights of the best trial (seed {run.config.seed})"), _fused(again).compared(view.warn):
            again.fuse()
    if keeper.freed:
        view.note(f"Dropped {show_size(keeper.freed)} of trials' weights (`keep: all` in the sweep's file keeps them)")


def _fused(run: Pipeline) -> Artifact:
    return own_models(run, "fused")["fused"]


def _search_as_it_goes(sweep: Sweep, record: Artifact, view: View) -> list[Attempt]:
    """Optuna: a point follows from the results before it; what no field of the space changes is shared all the same."""
    fixed = _before_search(sweep)
    if fixed is not None:
        SharedWork([pipeline(run) for run in fixed], TaskEngine(sweep.base.resources), view).prepare()
    space = {name: _domain(values) for name, values in sweep.config.space.items()}
    keeper = Keeper(sweep, pipeline, None)
    objectives = [(objective.figure, objective.sign) for objective in sweep.config.objectives]
    study = optuna_study(sweep.config.search, f"{sweep.name}-{record.fingerprint[:8]}", objectives)
    restored = tune.Tuner.can_restore(str(record.work_dir / "tune"))  # which has trials of its own to go on with
    tried = [dict(point) for point in study.tried(close=not restored)]
    known = [point for point in tried if all_there(sweep, [Attempt([point], "done", "")], pipeline)]
    results: dict[str, TrialResult] = {digest(point): {"fields": point, "error": ""} for point in known}
    left = (sweep.config.search.samples or 1) - (0 if restored else len(known))
    if len(known) and not restored:
        view.note(f"Going on from {len(known)} trials of the study {study.name}")
    results |= _tune(sweep, record, space, left, keeper, view, study) if left > 0 else {}
    attempts = attempts_of(sweep, results, pipeline)
    _tidy(sweep, keeper, attempts, view)
    return attempts


def _before_search(sweep: Sweep) -> list[RunConfig] | None:
    """Runs with the probes, and if p has a list the regions, of every point; None where points differ earlier."""
    space = dict(sweep.config.space)
    p = space.pop("regions.p", None)
    later = ("groups.", "backbone.", "fusion.", "integration.")
    if not all(name.startswith(later) for name in space):
        return None
    points = [{}] if p is None or isinstance(p, Range) else [{"regions.p": value} for value in p]
    return [sweep.run(point, seed) for point in points for seed in sweep.seeds]


def _domain(values: Sequence[Any] | Range) -> Any:
    if not isinstance(values, Range):
        return tune.choice(list(values))
    if values.integer:
        draw = tune.lograndint if values.log else tune.randint
        return draw(int(values.low), int(values.high) + 1)
    return (tune.loguniform if values.log else tune.uniform)(values.low, values.high)


def _done(sweep: Sweep, trial: Trial) -> bool:
    return all(artifact.complete for run in trial.runs for artifact in own_artifacts(sweep, run))


def _attempt(sweep: Sweep, trial: Trial, record: Artifact, results: dict[str, TrialResult]) -> Attempt:
    result = results.get(digest(trial.fields))
    points = [dict(point) for point in trial.points]
    if _done(sweep, trial):
        return Attempt(points, "done", "")
    error = "" if result is None else result["error"]
    return Attempt(points, "failed" if error else "stopped", error)


def _tune(
    sweep: Sweep,
    record: Artifact,
    space: dict[str, Any],
    samples: int,
    keeper: Keeper,
    view: View,
    study: OptunaStudy | None = None,
) -> dict[str, TrialResult]:
    """Run trials to their end; by digest of its fields each one's result."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    storage = record.work_dir
    shutil.rmtree(storage / "failures", ignore_errors=True)  # what failed in an earlier call is tried again
    storage.mkdir(parents=True, exist_ok=True)
    with progress_board() as (board_name, board), view.stage(f"{samples} trials"):
        _ViewCallback.current, _ViewCallback.ended = (view, board, keeper), 0
        workers = _concurrency(sweep) or parallel_fits(sweep.base.resources)
        given = {"board_name": board_name, "failures": storage / "failures"}
        resources = _trial_resources(sweep.base.resources)
        with held_between(sweep, pipeline, workers, view) as held:
            trainable = tune.with_parameters(run_trial, sweep=sweep, held=held, **given)
            limited = tune.with_resources(trainable, resources)
            grid = _restored_or_new(sweep, limited, storage, space, samples, view, study)
    tried = [_read_result(grid[i], storage / "failures") for i in range(len(grid))]
    return {digest(result["fields"]): result for result in tried}


def _read_result(result: tune.Result, failures: Path) -> TrialResult:
    fields = point_of(result.config or {})
    marker = failure_file(failures, fields)
    reason = marker.read_text(encoding="utf-8") if marker.is_file() else str(result.error)
    return {"fields": fields, "error": reason if result.error else ""}


def _restored_or_new(
    sweep: Sweep,
    trainable: Any,
    storage: Path,
    space: dict[str, Any],
    samples: int,
    view: View,
    study: OptunaStudy | None,
) -> tune.ResultGrid:
    """Go on where a killed driver left Tune; where its state is not usable, begin anew over the artifacts."""
    experiment = storage / "tune"
    if tune.Tuner.can_restore(str(experiment)):
        try:
            view.note("Going on with the trials of an earlier call")
            return tune.Tuner.restore(str(experiment), trainable, resume_errored=False, restart_errored=True).fit()
        except (ValueError, KeyError, EOFError, OSError, RuntimeError, json.JSONDecodeError) as error:
            view.warn(f"Ray Tune's state cannot be used ({error}): trials begin anew, what they made is kept")
    shutil.rmtree(experiment, ignore_errors=True)
    kind = sweep.config.search.kind
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=samples if kind.as_it_goes else 1,
            search_alg=_optuna(sweep, study) if study is not None else None,
            scheduler=_asha(sweep) if kind.stops_early else None,
            max_concurrent_trials=_concurrency(sweep),
            reuse_actors=True,  # a warm worker has torch and transformers imported
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=sweep.base.resources.max_failures),
            callbacks=[_ViewCallback()],
            verbose=0,
        ),
    ).fit()


def _optuna(sweep: Sweep, study: OptunaStudy) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    objectives = sweep.config.objectives
    return OptunaSearch(
        metric=[objective.figure for objective in objectives],
        mode=["max" if objective.sign > 0 else "min" for objective in objectives],
        sampler=study.sampler,
        study_name=study.name,
        storage=study.storage,
    )


def _asha(sweep: Sweep) -> Any:
    """Rungs: the fused model with the first seed, then the judged model's mean over one seed more each time."""
    from ray.tune.schedulers import ASHAScheduler

    objective = sweep.config.objectives[0]
    rungs = len(sweep.seeds) + entry(INTEGRATES, sweep.config.model, "model")
    return ASHAScheduler(
        time_attr="rung",
        metric=objective.figure,
        mode="max" if objective.sign > 0 else "min",
        max_t=rungs,
        grace_period=1,
        reduction_factor=sweep.config.search.reduction,
    )


def _concurrency(sweep: Sweep) -> int | None:
    """Trials at once at most: what was asked for, and never more fine-tunes than fit whole."""
    resources = sweep.base.resources
    fitting = parallel_fits(resources)  # raises where not even one can be placed
    limits = [sweep.config.concurrency, fitting if asks_ray(resources) else resources.parallel]
    return min((limit for limit in limits if limit is not None), default=None)


def _trial_resources(resources: ResourcesConfig) -> dict[str, float]:
    """What a trial holds: no CPU at all where all its work asks for its own.

    A hundredth of one (Ray wants something) on each node would leave none with the whole CPU that a worker may need.
    """
    if asks_ray(resources):
        return {"memory": 2**20}
    return tune_options(demand(resources, cpus_for(resources.most_threads, resources)))


class _ViewCallback(tune.Callback):
    """Shows what trials post, and drops what need not be kept of those that end.

    Tune keeps a copy of it on disk, so what it works with belongs to the class.
    """

    current: ClassVar[tuple[View, Any, Keeper] | None] = None
    polled: ClassVar[float] = 0.0
    ended: ClassVar[int] = 0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.current is not None and time.monotonic() - _ViewCallback.polled > 0.5:
            _ViewCallback.polled = time.monotonic()
            view, board, _ = self.current
            show_progress(board, view.progress)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "finished")
        if self.current is not None:
            self.current[2].ended(point_of(trial.config))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "failed")

    def _say(self, trial: Any, how: str) -> None:
        if self.current is not None:
            _ViewCallback.ended += 1
            title = describe(point_of(trial.config))
            self.current[0].finish(title)
            self.current[0].note(f"  {_ViewCallback.ended} {how}: {title}")
