"""Ray: fine-tunes as Ray Train runs that share a cluster.

Ray's own state is an optimisation: a fine-tune is done when its exported model is there, and what Ray keeps of it only
shortens the way there after a crash.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cpift.cluster.placement import KINDS, Nodes, Placement, demand, in_words, train_options
from cpift.cluster.session import (
    NAMESPACE,
    POLL_SECONDS,
    alive_nodes,
    free_resources,
    leave_modules_alone,
    progress_board,
    raise_failures,
    ray_session,
    show_progress,
    use_assigned_gpus,
)
from cpift.cluster.storage import RUN, FitStorage
from cpift.config.run import ResourcesConfig
from cpift.console.progress import OnProgress, ProgressMessage
from cpift.disk.files import write_text
from cpift.errors import CpiftError, StageError, explain_os_error
from cpift.training.spec import RESULT, FitSpec
from cpift.training.tracking import tracker_variables

_NEWS_SECONDS = 3.0  # until a cluster knows that what was given back is free


def run_fits(specs: Sequence[FitSpec], resources: ResourcesConfig, on_progress: OnProgress) -> None:
    """Run fine-tunes side by side, as many as fit, the rest queued; each leaves its model in its `export`.

    Each takes its `spec.resources`. `resources` says where to run and how many at once at most. A failed one does not
    stop the others. Raises StageError at the end that says which failed and why, and CpiftError before anything starts
    if one's workers can never be placed.
    """
    todo = [spec for spec in specs if not (spec.export / RESULT).is_file()]
    if not todo:
        return
    # Ray's own watch is for workers that do not answer at all; the worker's, for one that does and trains no more.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(min(600.0, resources.hang_timeout)))
    with ray_session(resources), progress_board() as (board_name, board):
        nodes = _nodes()
        for spec in todo:
            _require_room(spec.title, spec.resources, nodes)
        done: dict[str, Future[None]] = {}
        pool = ThreadPoolExecutor(len(todo))
        try:
            _drive(todo, resources.parallel or len(todo), nodes, pool, board_name, board, done, on_progress)
        finally:  # interrupted: what is queued must not start, and what runs ends with the Ray session
            pool.shutdown(wait=False, cancel_futures=True)
        raise_failures({title: future.exception() for title, future in done.items()}, f"Logs: {todo[0].logs.parent}")


def parallel_fits(resources: ResourcesConfig, title: str = "a fine-tune") -> int:
    """How many fine-tunes of these resources fit the cluster at once. Raises CpiftError if not even one does."""
    nodes = _nodes()
    _require_room(title, resources, nodes)
    count = _count(nodes, resources)
    return min(resources.parallel or count, count)


def _count(nodes: Nodes, resources: ResourcesConfig) -> int:
    """How many fine-tunes can be placed, one after the other, which takes the room away."""
    count = 0
    while (placement := nodes.place(resources)) is not None:
        nodes.take(placement)
        count += 1
    return count


def free_room(resources: ResourcesConfig) -> int:
    """How many workers of these resources fit beside the work of others; 1 where they would wait for each other."""
    count = _count(Nodes(free_resources()), resources)
    return max(1, min(resources.parallel or count, count))


def wait_for_room(resources: ResourcesConfig, title: str, on_progress: OnProgress) -> int:
    """How many fine-tunes of these resources fit beside the work of others; on a full cluster, as soon as one does.

    Raises CpiftError if not even one would fit an empty cluster, and StageError if Ray is lost.
    """
    most, since, said = parallel_fits(resources, title), time.monotonic(), False
    while not (free := _count(Nodes(free_resources()), resources)):
        if not said and time.monotonic() - since > _NEWS_SECONDS:
            need = in_words(demand(resources))
            on_progress({"waiting": f"waiting for room for a worker ({need}): the work of others fills the cluster"})
            said = True
        time.sleep(POLL_SECONDS)
    on_progress({"waiting": "waiting for the first worker to start"})
    return min(most, free)


def cpus_for(threads: int, resources: ResourcesConfig) -> float:
    """CPUs that one worker holds: one for each thread, but no more than some node has."""
    largest: float = max(node["Resources"].get("CPU", 0.0) for node in alive_nodes())
    return max(resources.cpus_per_worker, min(float(threads), largest))


def _nodes() -> Nodes:
    return Nodes([node["Resources"] for node in alive_nodes()])


def _require_room(title: str, need: ResourcesConfig, nodes: Nodes) -> None:
    """Ray retries workers that it cannot place for ever: refuse them."""
    if nodes.place(need) is None:
        raise CpiftError(
            f"{title}: its workers do not fit the cluster even when nothing else runs: resources.workers "
            f"{need.workers}, each {in_words(demand(need))} ({', '.join(KINDS.values())}), on {nodes}: "
            "lower them, or add nodes"
        )


def _drive(
    todo: Sequence[FitSpec],
    at_once: int,
    nodes: Nodes,
    pool: ThreadPoolExecutor,
    board_name: str,
    board: Any,
    done: dict[str, Future[None]],
    on_progress: OnProgress,
) -> None:
    """Start whatever fits beside what runs, first come first served; show progress until all have ended.

    Only whole worker groups are started: groups that each hold a part of what they need would wait for each other.
    """
    queue = list(todo)
    running: dict[Future[None], tuple[FitSpec, Placement]] = {}
    while queue or running:
        for spec in list(queue):
            placement = nodes.place(spec.resources) if len(running) < at_once else None
            if placement is not None:
                nodes.take(placement)
                queue.remove(spec)
                running[pool.submit(_run_fit, spec, board_name)] = (spec, placement)
        ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        show_progress(board, on_progress)
        for future in ended:
            spec, placement = running.pop(future)
            nodes.give_back(placement)
            done[spec.title] = future


def _run_fit(spec: FitSpec, board_name: str) -> None:
    """One TorchTrainer, driven by the calling thread until it ends."""
    resources, storage = spec.resources, FitStorage.of(spec)
    storage.drop_damaged_state()
    worker = demand(resources)
    # A range, which makes Ray's fine-tune elastic; its annotation does not know it.
    workers: Any = (resources.min_workers, resources.workers) if resources.min_workers else resources.workers
    # Ray's own default for the controller is to try for ever.
    limits: dict[str, Any] = dict.fromkeys(("max_failures", "controller_failure_limit"), resources.max_failures)
    # Workers of a Ray started here have this environment already.
    variables = tracker_variables(spec.tracking) if resources.on_cluster else {}
    runtime: dict[str, Any] = {"worker_runtime_env": {"env_vars": variables}} if variables else {}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"spec": spec, "board": board_name},
        torch_config=TorchConfig(backend="nccl" if "GPU" in worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, **train_options(worker)),
        run_config=ray.train.RunConfig(
            name=RUN,
            storage_path=storage.place,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(**limits),
            **runtime,
        ),
    )
    _failure_file(spec).unlink(missing_ok=True)
    result = _fit_through_controllers(trainer, resources.max_failures)
    if result.error is not None:
        raise result.error
    storage.drop()  # Ray holds this run for finished, and the model is exported or never will be
    if _failure_file(spec).is_file():
        raise StageError(_failure_file(spec).read_text(encoding="utf-8"))
    if not (spec.export / RESULT).is_file():
        raise StageError(f"{spec.title}: its worker ended but {spec.export} is not there; is it on shared storage?")
    spec.drop_checkpoints()  # not in the worker: what it uploads may still be read


def _fit_through_controllers(trainer: TorchTrainer, failures: int) -> ray.train.Result:
    """Ray restarts killed workers, but not a controller that dies: start another, which goes on where that one was."""
    for left in reversed(range(failures + 1)):
        try:
            return trainer.fit()
        except ray.exceptions.RayActorError:
            if not left:
                raise
    raise AssertionError


def _train_worker(config: dict[str, Any]) -> None:
    """What runs in every Ray Train worker; only there is transformers imported."""
    import torch

    from cpift.checkpoints.opening import model_files
    from cpift.disk.guarded import guarded_reads
    from cpift.training.fit import FitHooks, fit
    from cpift.training.tracking import ended_if_stuck, log_file

    use_assigned_gpus()
    leave_modules_alone()
    spec: FitSpec = config["spec"]
    context = ray.train.get_context()
    main = context.get_world_rank() == 0
    board = ray.get_actor(config["board"], namespace=NAMESPACE)
    checkpoint = ray.train.get_checkpoint()

    def on_checkpoint(folder: Path, metrics: dict[str, Any]) -> None:
        # Every rank reports, in step; rank 0 hands over the folder once all have put their random state in it.
        if context.get_world_size() > 1:
            torch.distributed.barrier()
        saved = ray.train.Checkpoint.from_directory(str(folder)) if main else None
        ray.train.report(metrics, checkpoint=saved, **how)

    def on_progress(message: ProgressMessage) -> None:
        alive(message["step"] < message["steps"])  # what comes after a stage's last step has no known length
        if main:
            board.post.remote(message)

    def linked(saved: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        return ray.train.Checkpoint.from_directory(FitStorage.of(spec).keep(Path(saved.path), name))

    modes = ray.train.CheckpointUploadMode
    how: dict[str, Any] = {"checkpoint_upload_mode": modes.ASYNC if spec.remote_storage else modes.SYNC}
    how |= {} if spec.remote_storage else {"checkpoint_upload_fn": linked}
    hooks = FitHooks(on_progress=on_progress, on_checkpoint=on_checkpoint, is_main=main)
    partial = spec.export.with_name(f".{spec.export.name}.partial")
    if main:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with ExitStack() as stack:
            log = stack.enter_context(log_file(spec.logs / f"worker-{context.get_world_rank()}.log"))
            alive = stack.enter_context(ended_if_stuck(spec.resources.hang_timeout, log))
            resumed = Path(stack.enter_context(checkpoint.as_directory())) if checkpoint else None
            with guarded_reads(spec.title, model_files(spec.model)):
                fit(replace(spec, export=partial), replace(hooks, resume_from=resumed))
    except Exception as error:
        reason = str(error) if isinstance(error, CpiftError) else explain_os_error(error)
        if reason is None:
            raise
        write_text(_failure_file(spec), reason)  # it would only happen again: tell the driver, don't be retried
        return
    if main:
        os.replace(partial, spec.export)


def _failure_file(spec: FitSpec) -> Path:
    return spec.scratch / "failure.txt"
