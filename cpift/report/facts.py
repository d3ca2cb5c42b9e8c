"""What of a finished run a report shows beside its scores: intervals of retention, tokens a model, sample replies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpift.config.run import TaskConfig
from cpift.data.tasks import read_examples
from cpift.disk.artifacts import Artifact
from cpift.evaluation.metrics import described, right_answer
from cpift.evaluation.retention import judged, learning_of, probe_of
from cpift.evaluation.scores import Score
from cpift.evaluation.verdict import share_of
from cpift.report.data import Sample
from cpift.rows.examples import Example
from cpift.training.spec import RESULT, read_training

_ROWS = 2  # sample rows a task
Halves = dict[str, dict[str, float]]


def tokens_of(artifacts: Sequence[Artifact]) -> int | None:
    """Input tokens that fine-tunes among these artifacts saw; None where one was made before they were counted."""
    counts = [
        read_training(artifact.path).get("tokens") for artifact in artifacts if (artifact.path / RESULT).is_file()
    ]
    return None if None in counts else sum(sum(stages) for stages in counts if stages is not None)


# ---- intervals -------------------------------------------------------------------------------------------------------


def halves(tasks: Sequence[str], scores: Mapping[str, Mapping[str, Score]]) -> tuple[Halves, dict[str, float]]:
    """Half of the intervals of retention over the test rows: by model and judged task, and by model of its mean.

    `scores`: with their rows, as `scores.json` has them. Without those that are 0: of a probe on its own task.
    """
    learnt = judged(learning_of(tasks, scores))
    by_task: Halves = {}
    means = {}
    for model in scores:
        halves_by_task = {task: half for task in learnt if (half := _half(scores, model, [task]))}
        if halves_by_task:
            by_task[model] = halves_by_task
        if len(halves_by_task) and (half := _half(scores, model, learnt)):
            means[model] = half
    return by_task, means


def _half(scores: Mapping[str, Mapping[str, Score]], model: str, tasks: Sequence[str]) -> float | None:
    half = share_of(scores, model, tasks).half
    return half if half is not None and math.isfinite(half) and half > 0 else None


# ---- tokens ----------------------------------------------------------------------------------------------------------


def tokens_by_model(
    artifacts: Mapping[str, Artifact], models: Mapping[str, str], base: str
) -> dict[str, dict[str, Any]]:
    """By model and fine-tune that it took, the input tokens of that: see `ReportData.tokens`.

    artifacts: every artifact of a run by title. models: by title, the fingerprint of what is scored. base: that of θ0.
    """
    by_print = {artifact.fingerprint: (title, artifact) for title, artifact in artifacts.items()}
    return {model: dict(_behind(fingerprint, model, by_print, base)) for model, fingerprint in models.items()}


def _behind(
    fingerprint: str, title: str, known: Mapping[str, tuple[str, Artifact]], base: str
) -> Iterator[tuple[str, int | None]]:
    """The fine-tunes that went into an artifact, the earliest first. One that was given has no count."""
    if fingerprint == base:
        return
    if fingerprint not in known:
        yield title, None
        return
    own, artifact = known[fingerprint]
    for name, source in artifact.inputs.items():
        if source in known or name.startswith(probe_of("")) or name == "backbone":
            yield from _behind(source, name, known, base)
    if (artifact.path / RESULT).is_file():
        yield "integration" if own == "integrate" else own, tokens_of([artifact])


# ---- replies ---------------------------------------------------------------------------------------------------------


def samples(tasks: Sequence[TaskConfig], scores: Mapping[str, Mapping[str, Score]]) -> list[Sample]:
    """The first test rows of every task that has replies, and what each model said, but for probes of other tasks."""
    probes = {probe_of(task.name): task.name for task in tasks}
    shown_samples = []
    for task in tasks:
        shown = [model for model in scores if probes.get(model, task.name) == task.name]
        rows = {model: scores[model][task.name].get("examples", [])[:_ROWS] for model in shown}
        if any("prediction" in row for own in rows.values() for row in own):
            for place, example in enumerate(itertools.islice(read_examples(task.test_data), _ROWS)):
                said = {
                    model: (str(own[place]["prediction"]), own[place].get("score"))
                    for model, own in rows.items()
                    if place < len(own) and "prediction" in own[place]
                }
                expected = right_answer(example) if described(scores[shown[0]][task.name]).counted else example.reply
                shown_samples += [Sample(task.name, _prompt(example), expected, said)] if said else []
    return shown_samples


def _prompt(example: Example) -> str:
    """One turn as it is; of several each with its role."""
    turns = example.prompt
    return "\n".join(turn.content if len(turns) == 1 else f"{turn.role}: {turn.content}" for turn in turns)
