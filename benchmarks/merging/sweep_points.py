"""Seconds of a point of a sweep that judges fused models: through the disk, from memory, and with models that stay.

    python -m benchmarks.merging.sweep_points configs/smoke.yaml --output FOLDER
    python -m benchmarks.merging.sweep_points configs/quickstart.yaml --set evaluation.limit=12 --output runs/quickstart

Everything that trials share is made first, in this process, or found in the folder: the demo's has its probes. Then
every point of a small space (p, τ, ω) is made and scored: by a sweep that keeps all weights (a folder is written, read
back, loaded) and by one that keeps the best (in memory), in turns of either order; then by one whose models stay in
memory from point to point. Its outputs are deleted in between, scores and hashes have to be equal, and the first point
of each only warms up. Appends a row of medians to results/sweep_points.jsonl; CPU seconds are those of all threads of
the process, for the machine may be busy; bytes are those of the models' files that were looked at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.record import append
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.loading import load_config
from cpift.console.view import quiet
from cpift.disk.files import file_sha256
from cpift.disk.mapped import MappedFile
from cpift.merging.resident import hold_at_most
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.outcomes import own_models
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork
from cpift.pipeline.stages import handover
from cpift.pipeline.stages.names import ModelRef
from cpift.sweep.config import Sweep, SweepConfig
from cpift.sweep.points import choose_points, group_points
from cpift.sweep.trial import rungs

SPACE = {"regions.p": [0.02, 0.05], "groups.tau_chance": [1.5, 4.5], "fusion.omega": ["uniform", 0.3, 0.5]}
WAYS = {"disk": "all", "memory": "best", "staying": "best"}  # `keep` of each
TURNS = ["disk", "memory"]


@dataclass(frozen=True)
class Point:
    """One point, one way."""

    seconds: float
    cpu_seconds: float
    bytes_read: int
    outcome: tuple[bytes, str]  # scores.json, and the sha256 of the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count_reads()
    sweeps = {way: sweep_of(options.run, options.set, options.output, keep) for way, keep in WAYS.items()}
    row = measured(sweeps)
    print(row)
    append("sweep_points", [row])


def sweep_of(run: Path, overrides: Sequence[str], output: Path, keep: str) -> Sweep:
    base = load_config(run, overrides).model_copy(update={"output": output.absolute()})
    fields = {"run": str(run), "space": SPACE, "model": "fused", "objectives": ["mean_loss"], "keep": keep}
    return Sweep(base.name, SweepConfig.model_validate(fields), base)


def measured(sweeps: Mapping[str, Sweep]) -> dict[str, Any]:
    """The row: medians over points."""
    some = sweeps["disk"]
    points = choose_points(some.config)
    runs = [Pipeline(some.run(point, seed), InProcessEngine(), quiet()) for point in points for seed in some.seeds]
    shared = SharedWork(runs, InProcessEngine(), quiet())
    shared.prepare()
    shared.complete(runs)
    trials = group_points(points, [[run] for run in runs], "fused")
    found: dict[str, list[Point]] = {way: [] for way in WAYS}
    turns = itertools.cycle([TURNS, TURNS[::-1]])
    for trial, order in zip(trials, turns, strict=False):
        for way in order:
            found[way].append(timed(sweeps[way], trial.fields, trial.runs[0]))
    handover.forget()
    hold_at_most(some.base.resources.memory_budget)
    found["staying"] = [timed(sweeps["staying"], trial.fields, trial.runs[0]) for trial in trials]
    for number, trial in enumerate(trials):
        if len({found[way][number].outcome for way in WAYS}) > 1:
            raise SystemExit(f"{trial.fields}: not the same scores and bytes")
        print(trial.fields, {way: round(found[way][number].cpu_seconds, 2) for way in WAYS})
    model = Checkpoint(runs[0].artifacts.base.path)
    return {
        "run": some.name,
        "parameters": model.numel,
        "bytes": model.nbytes,
        "tasks": len(some.base.tasks),
        "rows": sum(score["rows"] for score in json.loads(found["disk"][0].outcome[0]).values()),
        "points": len(trials) - 1,
        **{way: medians(of_points[1:]) for way, of_points in found.items()},
    }


def timed(sweep: Sweep, fields: Mapping[str, Any], run: Pipeline) -> Point:
    """Make and score one point, and delete what it made."""
    _read.clear()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in rungs(sweep, fields, quiet()):
        pass
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    fused = own_models(run, "fused")["fused"]
    scored = run.artifacts.evaluate(ModelRef.of("fused", fused))
    sha256 = fused.manifest()["outputs"]["model.safetensors"]
    if fused.has_weights and file_sha256(fused.path / "model.safetensors") != sha256:
        raise SystemExit(f"{fused.path} is not what its manifest says")
    outcome = (scored.path / "scores.json").read_bytes(), sha256
    for made in (fused, scored):
        shutil.rmtree(made.path)
    return Point(seconds, cpu_seconds, _read.total(), outcome)


def medians(points: Sequence[Point]) -> dict[str, float]:
    return {
        "seconds": round(median(point.seconds for point in points), 3),
        "cpu_seconds": round(median(point.cpu_seconds for point in points), 3),
        "bytes_read": median(point.bytes_read for point in points),
    }


_read = Counter[str]()  # bytes of models that were looked at through their mapped files


def count_reads() -> None:
    """From now on, in this process."""
    view = MappedFile.view

    def counted(self: MappedFile, start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        _read["bytes"] += count * dtype.itemsize
        return view(self, start, dtype, count)

    setattr(MappedFile, "view", counted)  # noqa: B010  (for the whole of this process)


if __name__ == "__main__":
    main()
