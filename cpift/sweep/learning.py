"""What the probes of a sweep learnt, which decides whether retention has a meaning there."""

from __future__ import annotations

from collections.abc import Sequence

from cpift.errors import StageError
from cpift.evaluation.retention import judged, learning_of, sentences
from cpift.pipeline.outcomes import scores_of, shared_models
from cpift.pipeline.pipeline import Pipeline
from cpift.sweep.config import Sweep
from cpift.sweep.objectives import figure_named, figures


def require_objectives(sweep: Sweep, runs: Sequence[Pipeline]) -> None:
    """Raise StageError where an objective is a retention that no model can have, for a probe did not learn its task.

    runs: with scores of θ0 and the probes. Before the first trial, not after its work.
    """
    for run in runs:
        tasks, scores = [task.name for task in run.config.tasks], scores_of(run, shared_models(run))
        known = figures(scores, tasks, "base")
        for figure in (objective.figure for objective in sweep.config.objectives):
            if (row := figure_named(figure)) is not None and row.learnt and figure not in known:
                why = " ".join(sentences(learning_of(tasks, scores))) or "A probe has a loss of 0."
                raise StageError(
                    f"objectives, {figure}: has no value with seed {run.config.seed}. {why} Train probes longer or on "
                    "more rows, or judge by mean_loss or by scores of tasks"
                )


def learning_said(runs: Sequence[Pipeline]) -> list[str]:
    """What has to be said before any mean retention, and with which seeds it holds."""
    said: dict[str, set[int]] = {}
    judged_by_seed: dict[int, set[tuple[str, ...]]] = {}
    distinct = {(run.config.seed, *(model.fingerprint for model in run.artifacts.tuned.values())): run for run in runs}
    for run in distinct.values():
        learning = learning_of([task.name for task in run.config.tasks], scores_of(run, shared_models(run)))
        judged_by_seed.setdefault(run.config.seed, set()).add(tuple(judged(learning)))
        for sentence in sentences(learning):
            said.setdefault(sentence, set()).add(run.config.seed)
    several = len({run.config.seed for run in runs}) > 1
    texts = [
        f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}: {text}" if several else text
        for text, seeds in said.items()
    ]
    if any(len(tasks) > 1 for tasks in judged_by_seed.values()):
        texts.append(
            "Trials differ in which tasks their probes learnt: their mean retentions are over different tasks."
        )
    return texts
