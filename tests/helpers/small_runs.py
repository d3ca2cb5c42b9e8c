"""Runs of seconds, of given rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpift.config.loading import parse_config
from cpift.config.run import RunConfig


def turns(prompt: str, reply: str, system: bool = False) -> dict[str, Any]:
    first = [{"role": "system", "content": "s"}] if system else []
    last = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"messages": [*first, *last]}


def run_of(tmp_path: Path, rows: list[Any], model: Any = None, test: list[Any] | None = None, **more: Any) -> RunConfig:
    for name, lines in (("train", rows), ("test", rows if test is None else test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    task = {"train": {"file": "train.jsonl"}, "test": {"file": "test.jsonl"}}
    training = {"steps": 2, "batch_size": 2, "max_length": 48, "checkpoint_every": 0, "precision": "float32"}
    raw = {
        "name": "t",
        "output": str(tmp_path / "out"),
        "model": model or {"scratch": {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2}},
        "tasks": [{"name": "a", **task}, {"name": "b", **task}],
        "probe": training,
        "backbone": {"source": "pretrained"},
        "regions": {"p": 0.05},
        "integration": dict(training),
        "evaluation": {"max_length": 64, "batch_size": 4},
        "tracking": [],
    }
    for name, value in more.items():
        *parents, last = name.split("__")
        node: Any = raw
        for parent in parents:
            node = node[parent]
        node[last] = value
    return parse_config(raw, tmp_path, "t")
