"""A sweep that trains in seconds, and an engine that does not train."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from cpift.sweep.config import Sweep, load_sweep

TASKS = ("a", "b", "c")


def run_fields() -> dict[str, Any]:
    """A run that trains in a second or two: three tasks, a tiny model, two to four steps."""
    source = {"procedural": "addition", "size": 8}
    return {
        "name": "tiny",
        "model": {"scratch": {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "max_length": 64}},
        "tasks": [
            {"name": name, "train": source | {"seed": seed}, "test": source | {"split": "test"}}
            for seed, name in enumerate(TASKS)
        ],
        "probe": {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "max_length": 32},
        "integration": {"steps": 2, "batch_size": 4, "learning_rate": 0.001, "max_length": 32},
        "resources": {"cpus_per_worker": 0.5, "threads_per_worker": 1, "parallel": 2},
    }


def sweep_file(folder: Path, **changes: Any) -> Path:
    fields = {
        "run": run_fields(),
        "space": {"regions.p": [0.05, 0.2], "groups.tau": [0.0, 0.001, 1.0]},
        "objectives": ["mean_retention", "mean_loss"],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(fields | changes, sort_keys=False))
    return path


def load(folder: Path, **changes: Any) -> Sweep:
    return load_sweep(sweep_file(folder, **changes), output=folder / "out")


class Copies:
    """Stands in for Ray: a "fine-tune" is θ0 with noise from the title; counts what it was asked for."""

    merging = None

    def __init__(self) -> None:
        self.fits: Counter[str] = Counter()
        self.scored: Counter[str] = Counter()

    def expect(self, specs: Any) -> None:
        """Nothing here takes its time to start."""

    def fit(self, specs: Any, on_progress: Any) -> None:
        from safetensors.torch import load_file, save_file

        for spec in specs:
            self.fits[spec.title] += 1
            tensors = load_file(spec.model / "model.safetensors")
            generator = torch.Generator().manual_seed(sum(map(ord, spec.title)) + spec.seed)
            moved = {name: t + torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
            spec.export.mkdir(parents=True)
            for path in spec.model.iterdir():
                if path.name != "manifest.json":
                    (spec.export / path.name).write_bytes(path.read_bytes())
            save_file(moved, spec.export / "model.safetensors", metadata={"format": "pt"})
            (spec.export / "training.json").write_text(
                json.dumps({"title": spec.title, "device": "cpu", "seconds": 1.0, "log": []})
            )

    def evaluate(self, scorings: Any, on_result: Any, on_progress: Any) -> None:
        for scoring in scorings:
            self.scored[scoring.title] += 1
            score = {"metric": "loss", "score": None, "loss": 1.0, "tokens": 1, "rows": 1}
            scores = {task.name: score for task in scoring.tasks}
            on_result(scoring.title, {"scores": scores, "seconds": 1.0, "device": "cpu"})


class ByWeights(Copies):
    """A model's loss follows from its weights, so they must be there, or be merged, to be scored."""

    def evaluate(self, scorings: Any, on_result: Any, on_progress: Any) -> None:
        from safetensors.torch import load_file

        for scoring in scorings:
            made = scoring.merge.make() if scoring.merge else (load_file(scoring.path / "model.safetensors"), None)
            weights, merged = made
            loss = 1.0 + 1 / sum(float(tensor.abs().mean()) for tensor in weights.values())  # noise "learns"
            score = {"metric": "loss", "score": None, "loss": loss, "tokens": 1, "rows": 1}
            scores = {task.name: score for task in scoring.tasks}
            on_result(scoring.title, {"scores": scores, "seconds": 1.0, "device": "cpu", "merged": merged})
