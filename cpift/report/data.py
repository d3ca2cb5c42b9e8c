"""What a finished run found, as plain data, and what can honestly be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, Protocol, TypedDict

import numpy as np

from cpift.checkpoints.writing import TensorRecord
from cpift.disk.artifact_state import Manifest
from cpift.evaluation.metrics import described
from cpift.evaluation.retention import (
    DEFINITION,
    judged,
    larger_is_better,
    learning_of,
    probe_of,
    retained,
    sentences,
)
from cpift.evaluation.scores import Score, finite
from cpift.merging.checks import Check
from cpift.report.places import ExpertRow, Move
from cpift.training.spec import HeldOutRow, LogRow

LEFT_OUT = "‡"  # beside tasks that their own probe did not learn


@dataclass(frozen=True)
class Sample:
    """One test row and what models replied to it."""

    task: str
    prompt: str
    expected: str
    replies: dict[str, tuple[str, float | None]]  # model -> reply, and its score from 0 to 1


class RegionSize(TypedDict):
    """Of a core region."""

    requested: int  # ⌊p·D⌋ elements
    count: int
    threshold: float


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. Plain values only, gathered from the artifacts of a run."""

    name: str
    config_yaml: str
    models: list[str]  # in the order shown: "base", "probe <task>"…, "backbone" (when staged), "fused", "final"
    tasks: list[str]
    scores: dict[str, dict[str, Score]]  # model -> task -> `retention.condensed`
    jaccard: list[list[float]]
    chance: float
    tau: float
    groups: list[list[str]]  # in stage order
    cores: dict[str, list[TensorRecord]]  # by task
    regions: dict[str, RegionSize]  # by task
    slerp: list[TensorRecord]  # of the fusion
    curves: dict[str, list[LogRow]]  # by fine-tune
    checks: list[Check]
    provenance: list[Manifest]  # one an artifact
    warnings: list[str]
    measure: str = "update"  # `regions.measure`, what core elements were chosen by
    rows: list[str] = field(default_factory=list)  # how much of each task's rows the fine-tunes used
    headline: str = ""  # `evaluation.verdict.verdict_sentence`
    model: str = ""  # the folder of the last model, from the run's
    prompt: str = "[]"  # turns to try it with, in Python
    halves: dict[str, dict[str, float]] = field(default_factory=dict)  # model -> task -> half of retention's interval
    mean_halves: dict[str, float] = field(default_factory=dict)  # model -> the same of its mean retention
    tokens: dict[str, dict[str, int | None]] = field(
        default_factory=dict
    )  # model -> fine-tune that it took -> input tokens, None where nobody counted them
    samples: list[Sample] = field(default_factory=list)
    history: list[tuple[str, str]] = field(default_factory=list)  # folder and change of each run that led here
    held_out: dict[str, list[HeldOutRow]] = field(default_factory=dict)  # by fine-tune that watched its loss there
    experts: list[ExpertRow] = field(default_factory=list)  # of a mixture of experts
    moves: dict[str, list[Move]] = field(default_factory=dict)  # by task, where its probe moved θ0; empty if not known


class Scored(Protocol):
    """What retention is computed from: a run's report, or the scores alone."""

    @property
    def tasks(self) -> list[str]: ...

    @property
    def scores(self) -> dict[str, dict[str, Score]]: ...


@dataclass(frozen=True)
class Standing:
    """One model over all judged tasks."""

    mean: float
    worst_task: str
    worst: float


def retention(data: Scored, model: str, task: str) -> float | None:
    """Of `model` on a judged task; None of another one, or where the task has no probe."""
    learnt, own = learning_of([task], data.scores).get(task), data.scores[model].get(task)
    if learnt is None or own is None or learnt.left_out:
        return None
    value = float(retained(np.array(larger_is_better(own)), np.array(learnt.probe)))
    return value if math.isfinite(value) else None


def standing(data: Scored, model: str) -> Standing | None:
    """Mean retention and the worst task of the judged ones; None where there are none, or a probe was not scored."""
    learning = learning_of(data.tasks, data.scores)
    values = {task: share for task in judged(learning) if (share := retention(data, model, task)) is not None}
    if not values or len(learning) < len(data.tasks) or len(values) < len(judged(learning)):
        return None
    worst = min(values, key=lambda task: values[task])
    return Standing(mean(values.values()), worst, values[worst])


def left_out_marks(data: Scored) -> dict[str, str]:
    """By task that is in no mean, for its probe did not learn it: the sign to put beside its name."""
    return {task: LEFT_OUT for task, learnt in learning_of(data.tasks, data.scores).items() if learnt.left_out}


def compare(one: Score, other: Score) -> int:
    """1 where `one` is better than `other` on the same task, −1 where worse, 0 where equal: by score, else by loss."""
    if one["score"] is None or other["score"] is None:
        one, other = {**one, "score": None}, {**other, "score": None}
    ours, theirs = larger_is_better(one), larger_is_better(other)
    return int(ours > theirs) - int(ours < theirs)


def total_tokens(data: ReportData, model: str) -> int | None:
    """Input tokens of the fine-tunes behind a model; None where one of them was not counted."""
    counts = list(data.tokens[model].values())
    return None if None in counts else sum(count for count in counts if count is not None)


def usage(data: ReportData, folder: str) -> str:
    """Three lines of Python that load the last model, which is in `folder`, and use it."""
    return (
        "from transformers import pipeline\n"
        f'chat = pipeline("text-generation", {folder!r})\n'
        f'print(chat({data.prompt})[0]["generated_text"][-1]["content"])'
    )


def summary(data: ReportData) -> dict[str, Any]:
    """The run in figures, for machines."""
    standings = {model: standing(data, model) for model in data.models}
    learning = learning_of(data.tasks, data.scores)
    return {
        "name": data.name,
        "tasks": data.tasks,
        "retention": {
            "definition": DEFINITION,
            "tasks": judged(learning),
            "left_out": {task: learnt.left_out for task, learnt in learning.items() if learnt.left_out},
            "not_shown": {task: learnt.not_shown for task, learnt in learning.items() if learnt.not_shown},
        },
        "models": {
            model: {
                "mean_retention": figures.mean if figures else None,
                "mean_retention_half_interval": data.mean_halves.get(model),
                "worst_task": figures.worst_task if figures else None,
                "worst_retention": figures.worst if figures else None,
                "training_tokens": total_tokens(data, model) if model in data.tokens else None,
                "mean_loss": finite(mean(score["loss"] for score in data.scores[model].values())),
                "scores": {task: _plain(score) for task, score in data.scores[model].items()},
            }
            for model, figures in standings.items()
        },
        "groups": data.groups,
        **({"experts": data.experts} if data.experts else {}),
        **({"history": [{"run": run, "change": change} for run, change in data.history]} if data.history else {}),
        "checks_passed": not any(check["passed"] is False for check in data.checks),
        "model": data.model,
        "verdict": verdict(data),
        "warnings": data.warnings,
        "rows": data.rows,
    }


def _plain(score: Score) -> Score:
    """A score as JSON has it."""
    shown: Score = finite(score | ({"gain": asdict(score["gain"])} if "gain" in score else {}))
    return shown


def verdict(data: ReportData) -> list[str]:
    """The verdict in one sentence; what the probes learnt, if that is in doubt; what the last model did against each of
    the others; and how little one run proves."""
    final, texts = data.models[-1], [data.headline] if data.headline else []
    texts += sentences(learning_of(data.tasks, data.scores))
    for rival, name in (
        ("base", "θ0"),
        ("before", "the model before"),
        ("fused", "the fused model"),
        ("backbone", "the backbone alone"),
    ):
        if rival in data.models and rival != final:
            texts.append(_against(data, final, name, dict.fromkeys(data.tasks, rival)))
    probes = {task: probe_of(task) for task in data.tasks if probe_of(task) in data.models}
    if probes:
        texts.append(_against(data, final, "each task's own probe", probes))
    return [*texts, _caveat(data, final)]


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
    tasks = {sign: [task for task, outcome in signs.items() if outcome == sign] for sign in words}
    return "; ".join(f"{words[sign]} {_count(count, len(signs))}" for sign, count in tasks.items() if count)


def _count(tasks: Sequence[str], total: int) -> str:
    if len(tasks) == total:
        return {1: "the one task", 2: "both tasks"}.get(total, f"all {total} tasks")
    return f"{len(tasks)} of {total} ({', '.join(tasks)})"


def _caveat(data: ReportData, model: str) -> str:
    rows = [data.scores[model][task]["rows"] for task in data.tasks]
    size = f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}"
    text = f"This is one run with one seed on {size} test rows a task: a lead, not a proof."
    counted = [score["rows"] for score in data.scores[model].values() if described(score).counted and score["rows"]]
    if counted:
        width = 100 * 1.96 * math.sqrt(0.25 / min(counted))
        text += (
            f" An accuracy over {min(counted)} rows has a 95 % sampling interval of up to ±{width:.0f} points, before "
            "any variation between training runs."
        )
    return text
