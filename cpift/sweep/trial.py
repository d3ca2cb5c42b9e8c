"""One trial of a sweep, in its worker: the pipeline from what is shared to the judged model's scores, seed by seed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import ray
import torch
from ray import tune

from cpift.cluster.resident.choosing import staying_between
from cpift.cluster.session import NAMESPACE, use_assigned_gpus
from cpift.cluster.tasks import TaskEngine
from cpift.config.loading import Fields, describe
from cpift.config.run import ResourcesConfig, RunConfig
from cpift.console.progress import ProgressMessage
from cpift.console.view import View, quiet
from cpift.disk.files import digest, write_text
from cpift.errors import CpiftError, StageError, entry
from cpift.merging.on_device import device_merging
from cpift.merging.resident.engine import hold_or_ask, staying
from cpift.merging.resident.holders import Holders
from cpift.pipeline.engine import Engine
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.outcomes import (
    INTEGRATES,
    benchmark_figures,
    known_scores,
    score_benchmarks,
    scored_models,
)
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages.handover import score_fused
from cpift.sweep.config import Sweep
from cpift.sweep.keep import hands_over, remake_command
from cpift.sweep.objectives import figures
from cpift.sweep.record import sweep_record
from cpift.training.tracking import ended_if_stuck


def run_trial(
    config: dict[str, Any], *, sweep: Sweep, board_name: str, failures: Path, held: int | Holders = 0
) -> None:
    """What Tune runs: `config` holds the point, see `point_of`. held: see `hold_or_ask`.

    An error that would only come again is kept in `failures`, so that Tune's next try of the trial ends at once.
    """
    fields = point_of(config)
    marker = failure_file(failures, fields)
    if marker.is_file():
        raise StageError(marker.read_text(encoding="utf-8"))
    try:
        use_assigned_gpus()
        hold_or_ask(held)
        torch.set_num_threads(sweep.base.resources.most_threads)
        with ended_if_stuck(sweep.base.resources.hang_timeout, sys.stderr) as alive:
            view = _BoardView(describe(fields), ray.get_actor(board_name, namespace=NAMESPACE), alive)
            for rung, means in enumerate(rungs(sweep, fields, view), start=1):
                tune.report({"rung": rung} | means)
    except CpiftError as error:
        failures.mkdir(parents=True, exist_ok=True)
        write_text(marker, str(error))
        raise


@contextmanager
def held_between(
    sweep: Sweep, pipeline: Callable[[RunConfig], Pipeline], workers: int, view: View
) -> Iterator[int | Holders]:
    """What the workers of trials, so many at once, keep of models from point to point, or ask for them; says why."""
    if not hands_over(sweep):
        yield 0
        return
    runs = [pipeline(sweep.run({}, seed)) for seed in sweep.seeds]
    with staying_between(runs, workers, asks_ray(sweep.base.resources), view) as where:
        yield where


def point_of(config: dict[str, Any]) -> Fields:
    """The point of a trial, which Tune gives to it under `fields` or field by field."""
    fields: Fields = config.get("fields", config)
    return fields


def failure_file(failures: Path, fields: Mapping[str, Any]) -> Path:
    return failures / f"{digest(dict(fields))[:16]}.txt"


def rungs(sweep: Sweep, fields: Mapping[str, Any], view: View) -> Iterator[dict[str, float]]:
    """The objectives' means after each seed; for ASHA first those of the fused model, before any integration."""
    by_seed: list[dict[str, float]] = []
    maker, integrates = sweep_record(sweep).name, entry(INTEGRATES, sweep.config.model, "model")
    for number, seed in enumerate(sweep.seeds):
        config = sweep.run(fields, seed)
        run = Pipeline(config, engine_for(config), view, maker)
        if number == 0 and sweep.config.search.kind.stops_early and integrates:
            yield _means(sweep, [_figures(sweep, fields, run, "fused")])
        by_seed.append(_figures(sweep, fields, run, sweep.config.model))
        yield _means(sweep, by_seed)


def asks_ray(resources: ResourcesConfig) -> bool:
    """Whether a trial's fine-tunes, evaluations and fusions each ask Ray for their resources, while it holds none.

    On a cluster all of them must: trials that hold CPUs and wait for tasks that need some would wait for ever.
    """
    return resources.by_train or resources.on_cluster


def engine_for(config: RunConfig) -> Engine:
    """This very process, with the CPUs (and the GPU) that it holds, where that is enough; else Ray."""
    resources = config.resources
    if asks_ray(resources):
        engine = TaskEngine(resources, own_cpus=False)
        engine.merging = staying(engine.merging)
        return engine
    return InProcessEngine(staying(device_merging(resources)))


def _figures(sweep: Sweep, fields: Mapping[str, Any], run: Pipeline, model: str) -> dict[str, float]:
    """Makes only what has no scores yet: a model that was scored may have lost its weights since."""
    benchmarks = sweep.benchmarks
    if benchmarks is not None:
        score_benchmarks(run, model, benchmarks)
    scores = known_scores(run, model)
    if scores is None:
        if entry(INTEGRATES, model, "model"):
            run.integrate()
        elif hands_over(sweep):
            score_fused(run, remake_command(sweep, dict(fields), run.config.seed))
        else:
            run.fuse()
        scores = run.evaluate(scored_models(run, model))
    of_tasks = figures(scores, [task.name for task in run.config.tasks], model)
    return of_tasks | benchmark_figures(run, model, benchmarks)


def _means(sweep: Sweep, by_seed: list[dict[str, float]]) -> dict[str, float]:
    names = [objective.figure for objective in sweep.config.objectives]
    for name in names:
        if any(name not in means for means in by_seed):
            why = "no probe here learnt its task (or a loss is 0 or not finite)"
            if name.startswith("benchmark."):
                why = "lm-eval gave no finite number for it"
            raise StageError(f"{name} has no value: {why}")
    return {name: mean(by_name[name] for by_name in by_seed) for name in names}


class _BoardView(View):
    """Posts progress to the sweep's board, under the trial's name, and prints nothing."""

    def __init__(self, trial: str, board: Any, alive: Callable[[bool], None]):
        super().__init__(quiet().console)
        self._trial, self._board, self._alive = trial, board, alive

    def progress(self, message: ProgressMessage) -> None:
        if "waiting" in message:
            return
        self._alive(message.get("step", 0) < message.get("steps", 0))  # between training steps; an evaluation has none
        doing = ", ".join(str(message[key]) for key in ("title", "task") if key in message)
        self._board.post.remote(message | {"title": self._trial, "task": doing})
