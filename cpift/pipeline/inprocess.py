"""An engine without a cluster: fine-tunes and evaluations in this process, one after another.

A sweep's trials run on it, each in a warm worker of its own, and spare the helper processes and the start-up that a
Ray Train run costs every time. The same fine-tune ends with the same bits on either engine.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.run import ResourcesConfig
from cpift.console.progress import OnProgress, counted
from cpift.disk.files import digest, link_folder
from cpift.errors import CpiftError
from cpift.evaluation.scores import Evaluation, OnResult
from cpift.pipeline.engine import Scoring
from cpift.training.spec import RESULT, FitSpec

if TYPE_CHECKING:
    from cpift.devices import Device
    from cpift.merging.checks import OnElements
    from cpift.merging.engine import Merging


class InProcessEngine:
    """The pipeline's engine in one process (see `engine.Engine`); data parallel fine-tunes need Ray's."""

    def __init__(self, merging: Merging | None = None):
        self.merging = merging

    def session(self) -> AbstractContextManager[None]:
        """Nothing to keep open."""
        return nullcontext()

    def expect(self, specs: Sequence[FitSpec]) -> None:
        """Nothing to start. Raises CpiftError where one could not run here."""
        for spec in specs:
            _require_one_worker(spec.resources)

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        self.expect(specs)
        for spec in specs:
            if not (spec.export / RESULT).is_file():
                fit_here(spec, on_progress)

    def evaluate(self, scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
        for scoring in scorings:
            on_result(scoring.title, score_here(scoring, on_progress))
            give_back_memory()


def score_here(scoring: Scoring, on_progress: OnProgress) -> Evaluation:
    """Score one model in this process: `scores`, `seconds`, `device` and `data`, what its rows were; of one that is
    merged for it, `merged`. Of a part there are no scores: its results are kept."""
    import torch

    from cpift.checkpoints.opening import model_files
    from cpift.data.tasks import same_rows
    from cpift.devices import compute_device, device_name
    from cpift.disk.guarded import guarded_reads
    from cpift.evaluation.scoring import evaluate_model, score_part

    title, path, tasks = scoring.title, scoring.path, scoring.tasks
    order = [task.name for task in tasks]

    def on_rows(task: str, done: int, total: int) -> None:
        share = (order.index(task) + done / max(total, 1)) / len(order)
        on_progress({"title": title, "done": share, "task": task})

    tensors, merged = scoring.merge.make(_merging(scoring, on_progress)) if scoring.merge else (None, None)
    torch.set_num_threads(scoring.resources.threads)
    device = compute_device(scoring.resources.gpus_per_worker)
    started = time.time()
    rows = {task.name: task.test_data for task in tasks}
    with guarded_reads(f"evaluation of {title}", model_files(path)), same_rows(rows) as data:
        how: dict[str, Any] = {"device": device, "on_progress": on_rows, "kept": _kept_results(scoring, device)}
        scores = {}
        if scoring.part is not None:
            score_part(path, tasks, scoring.settings, scoring.part, **how)
        else:
            scores = evaluate_model(path, tasks, scoring.settings, tensors=tensors, **how)
    records = {task: score.record() for task, score in scores.items()}
    seconds = time.time() - started
    return {
        "scores": records,
        "seconds": seconds,
        "device": device_name(device),
        "data": data,
        "merged": merged,
    }


def _kept_results(scoring: Scoring, device: Device) -> Path | None:
    """In a folder named by what decides results and is not part of an evaluation's name: device and code."""
    from cpift.devices import device_name, resolved
    from cpift.disk import facts

    if scoring.kept is None or facts.releases() is None:
        return None
    computed = [device_name(device), resolved(scoring.settings.precision, device), facts.code(), facts.releases()]
    return scoring.kept / digest(computed)[:16]


def _merging(scoring: Scoring, on_progress: OnProgress) -> OnElements:
    assert scoring.merge is not None
    return counted(on_progress, f"{scoring.title}: fusion", scoring.merge.like.numel)


def _require_one_worker(resources: ResourcesConfig) -> None:
    if resources.workers > 1:
        raise CpiftError(f"resources.workers {resources.workers}: one process is one worker")
    if resources.storage is not None:
        raise CpiftError(f"resources.storage {resources.storage}: one process keeps its checkpoints beside the run")


def fit_here(spec: FitSpec, on_progress: OnProgress) -> None:
    """One fine-tune in this process; killed and called again it goes on from its last checkpoint."""
    from cpift.checkpoints.opening import model_files
    from cpift.disk.guarded import guarded_reads
    from cpift.training.fit import FitHooks, fit

    spec.scratch.mkdir(parents=True, exist_ok=True)
    hooks = FitHooks(
        on_progress=on_progress,
        on_checkpoint=lambda folder, _: _keep(folder, spec.scratch),
        resume_from=max(_kept(spec.scratch), default=None),
    )
    partial = spec.export.with_name(f".{spec.export.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with guarded_reads(spec.title, model_files(spec.model)):
        fit(replace(spec, export=partial), hooks)
    os.replace(partial, spec.export)
    spec.drop_checkpoints()
    give_back_memory()


def _kept(scratch: Path) -> list[Path]:
    return list(scratch.glob("kept-*"))


def _keep(folder: Path, scratch: Path) -> None:
    """Give a checkpoint a second name, which the Trainer's rotation spares, and drop the one before it."""
    before = _kept(scratch)
    number = 1 + max((int(path.name.removeprefix("kept-")) for path in before), default=0)
    link_folder(folder, scratch / f"kept-{number:06}")
    for path in before:
        shutil.rmtree(path)


def give_back_memory() -> None:
    """A warm worker holds models of earlier trials no longer than it must."""
    from cpift.devices import free_memory

    gc.collect()
    free_memory()
