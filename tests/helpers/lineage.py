"""Finished runs to go on from, made in a second: fine-tunes are θ0 with noise, losses follow from the weights."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from cpift.config.loading import parse_config
from cpift.config.run import RunConfig
from cpift.console.view import quiet
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import preflight
from cpift.pipeline.report import Report, report
from cpift.pipeline.session import at_work
from tests.helpers.sweeps import Copies, run_fields


class Noise(Copies):
    """An engine that trains nothing. Losses of rows differ by model, so that there is something to compare."""

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fit(self, specs: Any, on_progress: Any) -> None:
        super().fit(specs, on_progress)
        for spec in specs:
            path = spec.export / "training.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen": [], "tokens": [8]}))

    def evaluate(self, scorings: Any, on_result: Any, on_progress: Any) -> None:
        from safetensors.torch import load_file

        for scoring in scorings:
            self.scored[scoring.title] += 1
            weights = load_file(scoring.path / "model.safetensors")
            loss = 1.0 + 1 / sum(float(tensor.abs().mean()) for tensor in weights.values())
            rows = [{"loss": loss + row / 100, "tokens": 2} for row in range(4)]
            score = {"metric": "loss", "score": None, "loss": loss, "tokens": 8, "rows": 4, "examples": rows}
            scores = {task.name: score for task in scoring.tasks}
            on_result(scoring.title, {"scores": scores, "seconds": 1.0, "device": "cpu"})


def fields(*tasks: str) -> dict[str, Any]:
    """A run's file with these of the tasks a, b, c; their rows are on the disk as far as they are written there."""
    raw = run_fields()
    raw["tasks"] = [task for task in raw["tasks"] if task["name"] in tasks]
    raw["regions"] = {"p": 0.1}
    return raw


def config_of(raw: dict[str, Any], output: Path) -> RunConfig:
    return parse_config({**raw, "output": str(output)}, output.parent, "run")


def finish(config: RunConfig) -> tuple[Pipeline, Report, Noise]:
    """Check and make all of a run, as `cpift run` does."""
    engine = Noise()
    preflight(config, stage="run")
    pipeline = Pipeline(config, engine, quiet())
    with at_work(pipeline, "run"):
        return pipeline, report(pipeline), engine
