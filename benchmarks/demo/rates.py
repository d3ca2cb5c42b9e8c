"""Choose the demo's learning rates: three trials for every method, on a seed and rows that the demo does not show.

    python configs/quickstart_tasks.py
    python -m benchmarks.demo.rates run       # → benchmarks/results/demo_rates.jsonl; ten minutes on two idle cores
    python -m benchmarks.demo.rates choose    # the table, and the value of each field with the best mean

A trial is scored on the dev rows, with mean retention against the probes of its own seed. What is finished is kept in
runs/demo-rates, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from cpift.compare.budgets import Budgets
from cpift.compare.methods import together
from cpift.config.loading import load_config, with_fields
from cpift.config.run import RunConfig
from cpift.console.view import View, quiet
from cpift.devices import device_name
from cpift.disk.artifacts import source_commit
from cpift.evaluation.retention import condensed, judged, larger_is_better, learning_of, probe_of, retained
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.inprocess import InProcessEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork, titled_backbone
from cpift.pipeline.stages import integrate, order
from cpift.pipeline.stages.fuse import add_card
from cpift.pipeline.stages.names import ModelRef

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "demo_rates.jsonl"
SEEDS = (101,)  # the demo's is 0


class Contender(NamedTuple):
    """A method with the one field that is tuned."""

    name: str
    field: str  # in the demo's config
    values: tuple[float, ...]


CPIFT = Contender("CPI-FT", "integration.learning_rate", (5e-5, 1e-4, 2e-4))
SFT = Contender("full SFT, balanced", "baselines.full_sft.learning_rate", (5e-5, 1e-4, 2e-4))
TIES = Contender("TIES", "baselines.ties.weight", (1.0, 1.5, 2.0))
AVERAGE = Contender("average", "", (0.0,))  # has nothing to tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "choose"))
    if parser.parse_args().command == "run":
        RECORD.write_text("".join(json.dumps(line) + "\n" for seed in SEEDS for line in trials(seed)), encoding="utf-8")
    print(table([json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]))


def demo(seed: int) -> RunConfig:
    """The demo's run, scored on dev rows."""
    fields: dict[str, Any] = {"seed": seed, "output": str(ROOT / "runs" / "demo-rates"), "tracking": []}
    fields["resources.threads_per_worker"] = 2  # one fine-tune after another
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    tasks = [task.model_dump(mode="json", exclude_none=True) for task in config.tasks]
    for task in tasks:
        task["test"]["file"] = task["test"]["file"].replace("_test.jsonl", "_dev.jsonl")
    return with_fields(config, fields | {"tasks": tasks}, "demo rates")


def trials(seed: int) -> Iterator[dict[str, Any]]:
    """Every contender with each of its values: a line of the record."""
    config = demo(seed)
    run = Pipeline(config, NoEngine(), quiet())
    shared = SharedWork([run], InProcessEngine(), View())
    shared.prepare()
    references = [run.pretrained(), *run.artifacts.tuned.values()]
    scores = scored(shared, run, references)
    for contender in (AVERAGE, TIES, CPIFT, SFT):
        for value in contender.values:
            model = MAKERS[contender.name](shared, run, value)
            all_scores = scores | scored(shared, run, [model])
            yield line(seed, contender, value, condensed(all_scores), model.title)


def average(shared: SharedWork, run: Pipeline, value: float) -> ModelRef:
    return merged(run, {"fusion.method": "linear"})


def ties(shared: SharedWork, run: Pipeline, value: float) -> ModelRef:
    return merged(run, {"fusion.method": "ties", "fusion.density": 0.2, "fusion.weight": value})


def merged(run: Pipeline, fields: Mapping[str, Any]) -> ModelRef:
    return Pipeline(with_fields(run.config, fields, "demo rates"), NoEngine(), quiet()).fuse()


def integrated(shared: SharedWork, run: Pipeline, value: float) -> ModelRef:
    own = Pipeline(with_fields(run.config, {CPIFT.field: value}, "demo rates"), NoEngine(), quiet())
    groups, fused = own.group().groups, own.fuse()
    artifact = order.outputs(own.artifacts, own.known())["integrate"]
    spec = integrate.spec(own, fused, groups, artifact)
    shared.train(
        f"integration, {value:g}",
        [(artifact, spec, own)],
        lambda output, out: add_card(own, "final", groups, output, out),
    )
    return ModelRef.of("final", artifact)


def plain(shared: SharedWork, run: Pipeline, value: float) -> ModelRef:
    training = run.config.backbone_training.model_copy(update={"learning_rate": value})
    fields = {"backbone.training": training.model_dump(mode="json", exclude_none=True)}
    own = Pipeline(with_fields(run.config, fields, "demo rates"), NoEngine(), quiet())
    groups = together(own)
    sized = Budgets().sft(own, groups, "total", balanced=True)
    artifact = sized.artifacts.backbone(groups)
    assert artifact is not None
    shared.train(f"full SFT, {value:g}", [(artifact, titled_backbone(sized, groups, artifact), sized)])
    return ModelRef.of("sft", artifact)


MAKERS = {AVERAGE.name: average, TIES.name: ties, CPIFT.name: integrated, SFT.name: plain}


def scored(shared: SharedWork, run: Pipeline, models: list[ModelRef]) -> dict[str, Any]:
    """Scores by model and task."""
    wanted = [(run.artifacts.evaluate(model), model, run) for model in models]
    shared.score("models", wanted)
    return {
        model.title: json.loads((artifact.path / "scores.json").read_text(encoding="utf-8"))
        for artifact, model, _ in wanted
    }


def line(seed: int, contender: Contender, value: float, scores: Mapping[str, Any], model: str) -> dict[str, Any]:
    import numpy as np

    tasks = list(scores[model])
    learning = learning_of(tasks, scores)
    own = {
        task: float(retained(np.array(larger_is_better(scores[model][task])), np.array(learning[task].probe)))
        for task in judged(learning)
    }
    return {
        "seed": seed,
        "method": contender.name,
        "field": contender.field,
        "value": value,
        "retention": mean(own.values()),
        "by_task": own,
        "scores": {task: scores[model][task]["score"] for task in tasks},
        "probes": {task: scores[probe_of(task)][task]["score"] for task in tasks},
        "base": {task: scores["base"][task]["score"] for task in tasks},
        "rows": {task: scores[model][task]["rows"] for task in tasks},
        "device": device_name(),
        "commit": source_commit(),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Every trial's mean retention, and of each method the value with the best mean over seeds."""
    seeds = list(dict.fromkeys(row["seed"] for row in lines))
    head = ["method", "field", "value", *(f"seed {seed}" for seed in seeds), "mean", ""]
    rows = [head, ["---"] * len(head)]
    for method in dict.fromkeys(row["method"] for row in lines):
        by_value: dict[float, list[float]] = {}
        for one in lines:
            if one["method"] == method:
                by_value.setdefault(one["value"], []).append(one["retention"])
        best = max(by_value, key=lambda value: mean(by_value[value]))
        field = next(row["field"] for row in lines if row["method"] == method)
        for value, kept_by_seed in by_value.items():
            chosen = "chosen" if field and value == best else ""
            shown = [f"{share:.1%}" for share in (*kept_by_seed, mean(kept_by_seed))]
            rows.append([method, field or "–", f"{value:g}" if field else "–", *shown, chosen])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
