"""Ray: fine-tunes as parallel Ray Train runs, evaluations as Ray tasks.

Ray's own state is an optimisation: a fine-tune is done when its exported model is there, and what Ray keeps of it only
shortens the way there after a crash.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cpift.artifacts import write_text
from cpift.config import EvaluationConfig, ResourcesConfig, RunConfig, TaskConfig
from cpift.errors import CpiftError, StageError
from cpift.fit_spec import RESULT, FitSpec

OnProgress = Callable[[dict[str, Any]], None]
NAMESPACE = "cpift"
_POLL_SECONDS = 0.5
# Ray Train's defaults are made for hours of training; these shave seconds off short ones on the cluster that we start.
_LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
}


@contextmanager
def ray_session(resources: ResourcesConfig) -> Iterator[None]:
    """Connect to the configured cluster, or start Ray here and stop it afterwards. Nested use is free."""
    if ray.is_initialized():
        yield
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 256 * 2**20}
    if address is not None:
        options = {"address": address}
    else:
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Collects the latest progress message of every running piece of work."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[str, Any]] = {}

    def post(self, message: dict[str, Any]) -> None:
        self._latest[message["title"]] = message

    def take(self) -> list[dict[str, Any]]:
        messages, self._latest = list(self._latest.values()), {}
        return messages


@contextmanager
def progress_board() -> Iterator[tuple[str, Any]]:
    """The name of a new board, for workers to find it, and its handle; the board ends with the block."""
    name = f"progress-{uuid.uuid4().hex[:8]}"
    board = ProgressBoard.options(name=name).remote()  # type: ignore[attr-defined]
    try:
        yield name, board
    finally:
        ray.kill(board)


def run_fits(specs: Sequence[FitSpec], resources: ResourcesConfig, on_progress: OnProgress) -> None:
    """Run fine-tunes side by side, as many as fit, the rest queued; each leaves its model in its `export`.

    A failed one does not stop the others. Raises StageError at the end that says which failed and why, and CpiftError
    before anything starts if a single worker group can never be placed.
    """
    todo = [spec for spec in specs if not (spec.export / RESULT).is_file()]
    if not todo:
        return
    with ray_session(resources), progress_board() as (board_name, board):
        parallel = parallel_fits(resources)
        pool = ThreadPoolExecutor(parallel)
        futures = {pool.submit(_run_fit, spec, resources, board_name): spec for spec in todo}
        try:
            _follow(list(futures), board, on_progress)
        finally:  # interrupted: what is queued must not start, and what runs ends with the Ray session
            pool.shutdown(wait=False, cancel_futures=True)
        raise_failures({spec.title: future.exception() for future, spec in futures.items()})


def parallel_fits(resources: ResourcesConfig) -> int:
    """How many whole worker groups fit at once.

    Ray retries an unplaceable group for ever, and groups that each hold a part of what they need wait for each other:
    so a group that can't fit is refused, and no more are started than fit together.
    """
    need = {"CPU": resources.workers * resources.cpus_per_worker, "GPU": resources.workers * resources.gpus_per_worker}
    have = ray.cluster_resources()
    for kind, amount in need.items():
        if amount > have.get(kind, 0):
            raise CpiftError(
                f"one fine-tune needs {amount:g} {kind}s (resources.workers {resources.workers} × "
                f"{kind.lower()}s_per_worker), the cluster has {have.get(kind, 0):g}: lower it, or add nodes"
            )
    fitting = int(min(have[kind] // amount for kind, amount in need.items() if amount > 0))
    return min(resources.parallel or fitting, fitting)


def _run_fit(spec: FitSpec, resources: ResourcesConfig, board_name: str) -> None:
    """One TorchTrainer, driven by the calling thread until it ends."""
    storage = spec.scratch / "ray"
    _drop_damaged_state(storage / "fit")
    storage.mkdir(parents=True, exist_ok=True)
    use_gpu = resources.gpus_per_worker > 0
    per_worker = {"CPU": resources.cpus_per_worker}
    # Ray's own default for the controller is to try for ever.
    limits: dict[str, Any] = dict.fromkeys(("max_failures", "controller_failure_limit"), resources.max_failures)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"spec": spec, "board": board_name},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=use_gpu,
            resources_per_worker=per_worker | ({"GPU": resources.gpus_per_worker} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="fit",
            storage_path=str(storage),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(**limits),
        ),
    )
    _failure_file(spec).unlink(missing_ok=True)
    result = trainer.fit()
    if result.error is not None:
        raise result.error
    if _failure_file(spec).is_file():
        shutil.rmtree(storage)  # Ray holds this run for finished
        raise StageError(_failure_file(spec).read_text(encoding="utf-8"))
    if not (spec.export / RESULT).is_file():
        raise StageError(f"{spec.title}: its worker ended but {spec.export} is not there; is it on shared storage?")


def _drop_damaged_state(run: Path) -> None:
    """Forget a Ray Train run whose snapshot a crash left half written, which would block its name."""
    snapshot = run / "checkpoint_manager_snapshot.json"
    try:
        json.loads(snapshot.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        shutil.rmtree(run)


def _train_worker(config: dict[str, Any]) -> None:
    """What runs in every Ray Train worker; only there is transformers imported."""
    import torch

    from cpift.finetune import FitHooks, fit

    spec: FitSpec = config["spec"]
    context = ray.train.get_context()
    main = context.get_world_rank() == 0
    board = ray.get_actor(config["board"], namespace=NAMESPACE)
    checkpoint = ray.train.get_checkpoint()

    def on_checkpoint(folder: Path, metrics: dict[str, Any]) -> None:
        # Every rank reports, in step; rank 0 hands over the folder once all have put their random state in it.
        if context.get_world_size() > 1:
            torch.distributed.barrier()
        kept = ray.train.Checkpoint.from_directory(str(folder)) if main else None
        ray.train.report(metrics, checkpoint=kept)

    hooks = FitHooks(
        on_progress=lambda message: board.post.remote(message) if main else None,
        on_checkpoint=on_checkpoint,
        resume_from=Path(checkpoint.path) if checkpoint else None,
        is_main=main,
    )
    partial = spec.export.with_name(f".{spec.export.name}.partial")
    if main:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        fit(replace(spec, export=partial), hooks)
    except CpiftError as error:  # it would only happen again: tell the driver instead of being retried
        write_text(_failure_file(spec), str(error))
        return
    if main:
        os.replace(partial, spec.export)


def _failure_file(spec: FitSpec) -> Path:
    return spec.scratch / "failure.txt"


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
            num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker or None, max_retries=2
        )
        arguments = (tuple(tasks), settings, resources.threads, board_name)
        pending = {remote.remote(title, path, *arguments): title for title, path in models.items()}
        failures: dict[str, BaseException | None] = {}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
            for message in ray.get(board.take.remote()):
                on_progress(message)
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
    threads: int,
    board_name: str,
) -> dict[str, Any]:
    import torch

    from cpift.devices import device_name
    from cpift.evaluate import evaluate_model

    torch.set_num_threads(threads)
    board = ray.get_actor(board_name, namespace=NAMESPACE)
    order = [task.name for task in tasks]

    def on_progress(task: str, done: int, total: int) -> None:
        share = (order.index(task) + done / max(total, 1)) / len(order)
        board.post.remote({"title": title, "done": share, "task": task})

    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.time()
    scores = evaluate_model(path, tasks, settings, device=device, on_progress=on_progress)
    kept = {task: asdict(score) for task, score in scores.items()}
    return {"scores": kept, "seconds": time.time() - started, "device": device_name()}


def _follow(futures: Sequence[Future[None]], board: Any, on_progress: OnProgress) -> None:
    """Show progress until all are done."""
    pending = set(futures)
    while pending:
        _, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for message in ray.get(board.take.remote()):
            on_progress(message)


def raise_failures(failures: dict[str, BaseException | None]) -> None:
    found = {title: error for title, error in failures.items() if error is not None}
    if not found:
        return
    interrupt = next((error for error in found.values() if not isinstance(error, Exception)), None)
    if interrupt is not None:
        raise interrupt
    lines = [f"  - {title}: {_root_cause(error).removeprefix(f'{title}: ')}" for title, error in found.items()]
    done = len(failures) - len(found)
    raise StageError(f"{len(found)} of {len(failures)} failed, {done} finished and are kept\n" + "\n".join(lines))


def _root_cause(error: BaseException) -> str:
    """The last words of the innermost error, for Ray wraps a worker's exception several times."""
    workers = getattr(error, "worker_failures", None)
    inner = next(iter(workers.values())) if workers else error
    return str(getattr(inner, "cause", None) or inner).strip()


class RayEngine:
    """The pipeline's engine on Ray (see `pipeline.Engine`)."""

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
        self._connect()
        run_fits(specs, self._config.resources, on_progress)

    def evaluate(
        self, models: dict[str, Path], on_result: Callable[[str, dict[str, Any]], None], on_progress: OnProgress
    ) -> None:
        self._connect()
        config = self._config
        evaluate_models(models, config.tasks, config.evaluation, config.resources, on_result, on_progress)

    def _connect(self) -> None:
        if self._session is not None:
            self._session.enter_context(ray_session(self._config.resources))
