"""What a finished run found, as plain data, and what can honestly be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Protocol

Score = dict[str, Any]


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. Plain values only, gathered from the artifacts of a run."""

    name: str
    config_yaml: str
    models: list[str]  # in the order shown: "base", "probe <task>"…, "backbone" (when staged), "fused", "final"
    tasks: list[str]
    scores: dict[str, dict[str, Score]]  # model -> task -> metric, score, loss, tokens, rows
    jaccard: list[list[float]]
    chance: float
    tau: float
    groups: list[list[str]]  # in stage order
    cores: dict[str, list[dict[str, Any]]]  # task -> per tensor: tensor, numel, core
    regions: dict[str, dict[str, Any]]  # task -> requested, count, threshold
    slerp: list[
        dict[str, Any]
    ]  # per tensor: tensor, angles (radians, one a fold), lerp (share, one a fold), core, numel
    curves: dict[str, list[dict[str, Any]]]  # fine-tune -> stage, step, loss, learning_rate
    checks: list[dict[str, Any]]  # name, passed (None: nothing to compare), detail
    provenance: list[dict[str, Any]]  # one manifest an artifact
    warnings: list[str]


class Scored(Protocol):
    """What retention is computed from: a run's report, or the scores alone."""

    @property
    def tasks(self) -> list[str]: ...

    @property
    def scores(self) -> dict[str, dict[str, Score]]: ...


@dataclass(frozen=True)
class Retention:
    """One model on one task, relative to the task's own probe: 1 is as good."""

    value: float
    by_loss: bool  # probe's loss ÷ model's loss, because the metric is the loss or the probe scored 0


@dataclass(frozen=True)
class Standing:
    """One model over all tasks."""

    mean: float
    worst_task: str
    worst: float


def probe_of(task: str) -> str:
    """The title of a task's probe among the models."""
    return f"probe {task}"


def retention(data: Scored, model: str, task: str) -> Retention | None:
    """Score of `model` ÷ score of the task's own probe; None where the task has no probe or the ratio no meaning."""
    own, probe = data.scores[model].get(task), data.scores.get(probe_of(task), {}).get(task)
    if own is None or probe is None:
        return None
    if probe["score"]:
        return Retention(own["score"] / probe["score"], by_loss=False)
    return Retention(probe["loss"] / own["loss"], by_loss=True) if own["loss"] > 0 else None


def standing(data: Scored, model: str) -> Standing | None:
    """Mean retention and the worst task; None where a task's retention is unknown."""
    found = {task: retention(data, model, task) for task in data.tasks}
    values = {task: one.value for task, one in found.items() if one is not None}
    if len(values) < len(data.tasks):
        return None
    worst = min(values, key=lambda task: values[task])
    return Standing(mean(values.values()), worst, values[worst])


def compare(one: Score, other: Score) -> int:
    """1 where `one` is better than `other` on the same task, −1 where worse, 0 where equal: by score, else by loss."""
    if one["score"] is None or other["score"] is None:
        return (one["loss"] < other["loss"]) - (one["loss"] > other["loss"])
    return (one["score"] > other["score"]) - (one["score"] < other["score"])


def summary(data: ReportData) -> dict[str, Any]:
    """The run in figures, for machines."""
    standings = {model: standing(data, model) for model in data.models}
    return {
        "name": data.name,
        "tasks": data.tasks,
        "models": {
            model: {
                "mean_retention": found.mean if found else None,
                "worst_task": found.worst_task if found else None,
                "worst_retention": found.worst if found else None,
                "mean_loss": mean(score["loss"] for score in data.scores[model].values()),
                "scores": data.scores[model],
            }
            for model, found in standings.items()
        },
        "groups": data.groups,
        "checks_passed": not any(check["passed"] is False for check in data.checks),
        "verdict": verdict(data),
        "warnings": data.warnings,
    }


def verdict(data: ReportData) -> list[str]:
    """Sentences that say what the last model did against each of the others, and how little one run proves."""
    final = data.models[-1]
    sentences = []
    for rival, name in (("base", "θ0"), ("fused", "the fused model"), ("backbone", "the backbone alone")):
        if rival in data.models and rival != final:
            sentences.append(_against(data, final, name, dict.fromkeys(data.tasks, rival)))
    probes = {task: probe_of(task) for task in data.tasks if probe_of(task) in data.models}
    if probes:
        sentences.append(_against(data, final, "each task's own probe", probes))
    return [*sentences, _caveat(data, final)]


def _against(data: ReportData, model: str, name: str, rivals: Mapping[str, str]) -> str:
    """`rivals`: by task, the model to compare with. By metric, and by loss where that is another question."""
    pairs = {task: (data.scores[model][task], data.scores[rival][task]) for task, rival in rivals.items()}
    text = f"The {model} model against {name}: {_outcomes({task: compare(*pair) for task, pair in pairs.items()})}."
    if all(own["score"] is None for own, _ in pairs.values()):
        return text
    by_loss = {task: compare(own | {"score": None}, other) for task, (own, other) in pairs.items()}
    return f"{text} By loss per answer token: {_outcomes(by_loss)}."


def _outcomes(signs: Mapping[str, int]) -> str:
    words = {1: "better on", 0: "equal on", -1: "worse on"}
    tasks = {sign: [task for task, found in signs.items() if found == sign] for sign in words}
    return "; ".join(f"{words[sign]} {_count(found, len(signs))}" for sign, found in tasks.items() if found)


def _count(tasks: Sequence[str], total: int) -> str:
    if len(tasks) == total:
        return "the one task" if total == 1 else f"all {total} tasks"
    return f"{len(tasks)} of {total} ({', '.join(tasks)})"


def _caveat(data: ReportData, model: str) -> str:
    rows = [data.scores[model][task]["rows"] for task in data.tasks]
    size = f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}"
    text = f"This is one run with one seed on {size} test rows a task: a lead, not a proof."
    counted = [score["rows"] for score in data.scores[model].values() if score["metric"] in ("choice", "number")]
    if counted:
        width = 100 * 1.96 * math.sqrt(0.25 / min(counted))
        text += (
            f" An accuracy over {min(counted)} rows has a 95 % sampling interval of up to ±{width:.0f} points, before "
            "any variation between training runs."
        )
    return text
