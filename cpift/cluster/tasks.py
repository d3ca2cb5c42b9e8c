"""A sweep's fine-tunes as Ray tasks: warm workers, without the helper processes of one Ray Train run each.

Only for fine-tunes of one worker; data parallel ones are Ray Train's (`fits.run_fits`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from cpift.cluster.engine import evaluate_models
from cpift.cluster.fits import cpus_for, parallel_fits, run_fits
from cpift.cluster.merging import merging_of
from cpift.cluster.placement import demand, task_options
from cpift.cluster.session import (
    NAMESPACE,
    POLL_SECONDS,
    progress_board,
    raise_failures,
    ray_session,
    show_progress,
    use_assigned_gpus,
)
from cpift.config.run import ResourcesConfig, RunConfig
from cpift.console.progress import Message, OnProgress
from cpift.evaluation.scores import OnResult
from cpift.merging.engine import Merging
from cpift.pipeline.inprocess import fit_here
from cpift.training.spec import RESULT, FitSpec
from cpift.training.tracking import ended_if_stuck


@contextmanager
def on_ray(resources: ResourcesConfig) -> Iterator[OnRay]:
    """A Ray session and the engine on it."""
    with ray_session(resources):
        yield OnRay()


class OnRay:
    """`SharedEngine` on Ray; never more threads at once than CPUs."""

    def merging(self, resources: ResourcesConfig) -> Merging | None:
        return merging_of(resources, stored=False)

    def fit(self, resources: ResourcesConfig, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        fits_in_tasks([spec for spec in specs if not spec.resources.by_train], resources, on_progress)
        specs = [spec for spec in specs if spec.resources.by_train]
        if not specs:
            return
        threads = max(spec.threads for spec in specs) * resources.workers
        fitting = max(1, int(ray.cluster_resources().get("CPU", 1) // threads))
        run_fits(
            specs, resources.model_copy(update={"parallel": min(fitting, resources.parallel or fitting)}), on_progress
        )

    def evaluate(
        self, config: RunConfig, models: dict[str, Path], on_result: OnResult, on_progress: OnProgress
    ) -> None:
        cpus = cpus_for(config.resources.threads, config.resources)
        resources = config.resources.model_copy(update={"cpus_per_worker": cpus})
        evaluate_models(models, config.tasks, config.evaluation, resources, on_result, on_progress)


def fits_in_tasks(specs: Sequence[FitSpec], resources: ResourcesConfig, on_progress: OnProgress) -> None:
    """Run fine-tunes side by side, as many as fit with a CPU for each of their threads; a killed worker's goes on.

    A failed one does not stop the others. Raises StageError at the end that says which failed and why, and CpiftError
    before anything starts if one can never be placed.
    """
    queue = [spec for spec in specs if not (spec.export / RESULT).is_file()]
    if not queue:
        return
    for spec in queue:
        parallel_fits(spec.resources)  # raises where it can never be placed
    limit = resources.parallel or len(queue)
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

        def on_progress(message: Message) -> None:
            alive(message["step"] < message["steps"])
            board.post.remote(message)

        fit_here(spec, on_progress)
