"""The engine of sweeps and comparisons: fine-tunes as Ray tasks, in warm workers, without the helper processes that one
Ray Train run each has.

Only for fine-tunes of one worker; data parallel ones are Ray Train's (`fits.run_fits`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from cpift.cluster.choice import merging_for
from cpift.cluster.engine import evaluate_models
from cpift.cluster.fits import cpus_for, parallel_fits, run_fits
from cpift.cluster.placement import demand, task_options
from cpift.cluster.resident.choosing import staying_between
from cpift.cluster.session import (
    NAMESPACE,
    POLL_SECONDS,
    progress_board,
    raise_failures,
    ray_session,
    show_progress,
    use_assigned_gpus,
)
from cpift.config.run import ResourcesConfig
from cpift.console.progress import OnProgress, ProgressMessage
from cpift.console.view import View
from cpift.evaluation.scores import OnResult
from cpift.merging.engine import Merging
from cpift.merging.resident.engine import asking
from cpift.merging.resident.holders import Holders
from cpift.pipeline.engine import Scoring
from cpift.pipeline.inprocess import fit_here
from cpift.pipeline.run import Run
from cpift.training.spec import RESULT, FitSpec
from cpift.training.tracking import ended_if_stuck


class TaskEngine:
    """The engine of many runs (see `pipeline.engine.Engine`): everything in tasks of its own, never more threads at
    once than CPUs. In a trial of a sweep it serves one run, which holds nothing itself."""

    def __init__(self, resources: ResourcesConfig, own_cpus: bool = True):
        """`resources`: where Ray is. `own_cpus`: whether regions and fusions may run in this process."""
        self._resources = resources
        self.merging: Merging | None = merging_for(resources, own_cpus, stored=False)

    def session(self) -> AbstractContextManager[None]:
        """Within another one it is free, as in a trial. Raises CpiftError for a cluster without what is asked of it."""
        if self._resources.on_cluster and self.merging is not None:
            return self.merging.session()
        return ray_session(self._resources)

    def expect(self, specs: Sequence[FitSpec]) -> None:
        """Nothing to start."""

    @contextmanager
    def keeping(self, runs: Sequence[Run], view: View) -> Iterator[Callable[[Merging | None], Merging | None]]:
        """See `pipeline.engine.KeepsModels`; in processes that all tasks ask."""
        with staying_between(runs, parallel_fits(self._resources), True, view) as where:
            yield partial(asking, holders=where) if isinstance(where, Holders) else _itself

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        fits_in_tasks([spec for spec in specs if not spec.resources.by_train], on_progress)
        spread = [spec for spec in specs if spec.resources.by_train]
        if not spread:
            return
        resources = spread[0].resources
        threads = max(spec.threads * spec.resources.workers for spec in spread)
        fitting = max(1, int(ray.cluster_resources().get("CPU", 1) // threads))
        at_once = min(fitting, resources.parallel or fitting)
        run_fits(spread, resources.model_copy(update={"parallel": at_once}), on_progress)

    def evaluate(self, scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
        evaluate_models([_on_cpus(scoring) for scoring in scorings], on_result, on_progress)


def _itself(merging: Merging | None) -> Merging | None:
    return merging


def _on_cpus(scoring: Scoring) -> Scoring:
    """With a CPU for each thread."""
    need = scoring.resources
    cpus = cpus_for(need.threads, need)
    return replace(scoring, resources=need.model_copy(update={"cpus_per_worker": cpus}))


def fits_in_tasks(specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
    """Run fine-tunes side by side, as many as fit with a CPU for each of their threads; a killed worker's goes on.

    A failed one does not stop the others. Raises StageError at the end that says which failed and why, and CpiftError
    before anything starts if one can never be placed.
    """
    queue = [spec for spec in specs if not (spec.export / RESULT).is_file()]
    if not queue:
        return
    for spec in queue:
        parallel_fits(spec.resources)  # raises where it can never be placed
    limit = queue[0].resources.parallel or len(queue)
    running: dict[Any, str] = {}
    failures: dict[str, BaseException | None] = dict.fromkeys(spec.title for spec in queue)
    with progress_board() as (board_name, board):
        while queue or running:
            while queue and len(running) < limit:
                spec = queue.pop(0)
                running[_remote(spec).remote(spec, board_name)] = spec.title
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            show_progress(board, on_progress)
            for reference in ready:
                title = running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    failures[title] = error
    raise_failures(failures)


def _remote(spec: FitSpec) -> Any:
    need = spec.resources
    return _fit_task.options(
        **task_options(demand(need, cpus_for(spec.threads, need))),
        max_retries=need.max_failures,
        scheduling_strategy="DEFAULT",  # from within a trial too, which holds less
    )


@ray.remote
def _fit_task(spec: FitSpec, board_name: str) -> None:
    use_assigned_gpus()
    board = ray.get_actor(board_name, namespace=NAMESPACE)
    with ended_if_stuck(spec.resources.hang_timeout, sys.stderr) as alive:

        def on_progress(message: ProgressMessage) -> None:
            alive(message["step"] < message["steps"])
            board.post.remote(message)

        fit_here(spec, on_progress)
