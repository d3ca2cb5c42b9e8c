"""What Ray Train costs a fine-tune, and what side by side saves: the smoke config's probes.

    python -m benchmarks.training.fits              # about four minutes on two cores
    python -m benchmarks.training.fits --steps 400  # longer fine-tunes

Rows in results/fits.jsonl, seconds of wall time: the three probes in this process one after another, as Ray Train runs
one after another, and as Ray Train runs as many at once as fit. `session` is the start and stop of Ray by themselves.
All must leave the same bytes.

What a Ray Train run costs beyond the training is processes: a controller, a worker and their helpers start and import
for each one. Done against it: fine-tunes are described without torch (`training/spec.py`), so that only the worker
imports it; on the cluster that cpift starts itself, health checks are twice a second and the preemption watcher,
metrics and state reconciliation are off (`cluster/session.py`); several fine-tunes start side by side; and a sweep
trains its probes as plain Ray tasks in warm workers (`cluster/tasks.py`), which pay none of it. What is left, about 15
s a run on two cores, is start-up.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import append
from cpift.cluster.fits import run_fits
from cpift.cluster.session import ray_session
from cpift.config.loading import load_config
from cpift.config.run import RunConfig
from cpift.console.progress import ProgressMessage
from cpift.console.view import View
from cpift.disk.files import file_sha256
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import probe
from cpift.training.spec import FitSpec

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def specs_in(output: Path, changes: list[str]) -> tuple[RunConfig, list[FitSpec]]:
    config = load_config(SMOKE, [f"output={output}", *changes])
    pipeline = Pipeline(config, InProcessEngine(), View())
    return config, probe.specs(pipeline, pipeline.pretrained())


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return round(time.perf_counter() - started, 2)


def nothing(message: ProgressMessage) -> None:
    pass


def session(config: RunConfig) -> None:
    with ray_session(config.resources):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    seconds, digests = {}, set()
    with tempfile.TemporaryDirectory() as temporary:
        for way in ("warm-up", "in process", "ray, one after another", "ray, side by side"):
            config, specs = specs_in(Path(temporary) / way, [f"probe.steps={options.steps}"])
            if way == "ray, one after another":
                seconds["session"] = timed(partial(session, config))
            if way.startswith("ray"):
                at_once = 1 if way.endswith("another") else None
                resources = config.resources.model_copy(update={"parallel": at_once})
                seconds[way] = timed(partial(run_fits, specs, resources, nothing))
            else:  # imports are paid by the first way
                engine = InProcessEngine()
                chosen = specs[:1] if way == "warm-up" else specs
                seconds[way] = timed(partial(engine.fit, chosen, nothing))
            if way != "warm-up":
                digests.add(tuple(file_sha256(spec.export / "model.safetensors") for spec in specs))
    del seconds["warm-up"]
    row = {"probes": 3, "steps": options.steps, "seconds": seconds, "same_bytes": len(digests) == 1}
    serial = seconds["ray, one after another"] - seconds["session"]
    row["overhead_per_probe"] = round((serial - seconds["in process"]) / 3, 2)
    append("fits", [row])
    print(row)


if __name__ == "__main__":
    main()
