"""Ray: the pipeline's engine, and evaluations as Ray tasks. Fine-tunes are in `distributed_fits.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from cpift.config import ResourcesConfig, RunConfig, TaskConfig
from cpift.config_evaluation import EvaluationConfig
from cpift.distributed_fits import run_fits
from cpift.distributed_session import (
    NAMESPACE,
    POLL_SECONDS,
    OnProgress,
    progress_board,
    raise_failures,
    ray_session,
    show_progress,
    use_assigned_gpus,
)
from cpift.fit_spec import FitSpec


def evaluate_models(
    models: dict[str, Path],
    tasks: Sequence[TaskConfig],
    settings: EvaluationConfig,
    resources: ResourcesConfig,
    on_result: Callable[[str, dict[str, Any]], None],
    on_progress: OnProgress,
) -> None:
    """Score models in parallel Ray tasks; `on_result` gets each model's result as soon as it is there."""
    if not models:
        return
    with ray_session(resources), progress_board() as (board_name, board):
        remote = _evaluate_worker.options(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker or None,
            max_retries=2,
            scheduling_strategy="DEFAULT",  # from within a sweep's trial too, whose own share of a CPU is too small
        )
        arguments = (tuple(tasks), settings, resources, board_name)
        pending = {remote.remote(title, path, *arguments): title for title, path in models.items()}
        failures: dict[str, BaseException | None] = {}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_SECONDS)
            show_progress(board, on_progress)
            for reference in ready:
                title = pending.pop(reference)
                try:
                    on_result(title, ray.get(reference))
                except ray.exceptions.RayError as error:
                    failures[title] = error
        raise_failures(failures)


@ray.remote
def _evaluate_worker(
    title: str,
    path: Path,
    tasks: tuple[TaskConfig, ...],
    settings: EvaluationConfig,
    resources: ResourcesConfig,
    board_name: str,
) -> dict[str, Any]:
    import torch

    from cpift.data import same_rows
    from cpift.devices import compute_device, device_name
    from cpift.evaluate import evaluate_model
    from cpift.given import model_files
    from cpift.mapped_reads import guarded_reads

    use_assigned_gpus()
    torch.set_num_threads(resources.threads)
    board = ray.get_actor(board_name, namespace=NAMESPACE)
    order = [task.name for task in tasks]

    def on_progress(task: str, done: int, total: int) -> None:
        share = (order.index(task) + done / max(total, 1)) / len(order)
        board.post.remote({"title": title, "done": share, "task": task})

    device = compute_device(resources.gpus_per_worker)
    started = time.time()
    rows = {task.name: task.test_data for task in tasks}
    with guarded_reads(f"evaluation of {title}", model_files(path)), same_rows(rows) as data:
        scores = evaluate_model(path, tasks, settings, device=device, on_progress=on_progress)
    kept = {task: asdict(score) for task, score in scores.items()}
    return {"scores": kept, "seconds": time.time() - started, "device": device_name(device), "data": data}


class RayEngine:
    """The pipeline's engine on Ray (see `engine.Engine`)."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._session: ExitStack | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within it one Ray connection serves all stages; it is made when the first of them needs it."""
        with ExitStack() as self._session:
            yield
        self._session = None

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        self._connect(on_progress)
        run_fits(specs, self._config.resources, on_progress)

    def evaluate(
        self, models: dict[str, Path], on_result: Callable[[str, dict[str, Any]], None], on_progress: OnProgress
    ) -> None:
        self._connect(on_progress)
        config = self._config
        evaluate_models(models, config.tasks, config.evaluation, config.resources, on_result, on_progress)

    def _connect(self, on_progress: OnProgress) -> None:
        if self._session is not None:
            if not ray.is_initialized():
                on_progress({"waiting": f"starting Ray{self._where}"})
            self._session.enter_context(ray_session(self._config.resources))
        on_progress({"waiting": "waiting for the first worker to start"})

    @property
    def _where(self) -> str:
        address = self._config.resources.address or os.environ.get("RAY_ADDRESS")
        return " on this machine" if address is None else f": connecting to {address}"
