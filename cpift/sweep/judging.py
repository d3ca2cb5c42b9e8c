"""What decides what a sweep may say: whether the probes learnt their tasks, and the rows that the search never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from cpift.config.loading import Fields, one_line_yaml
from cpift.config.run import RunConfig
from cpift.console.view import View
from cpift.errors import ConfigError, Problem, StageError, entry
from cpift.evaluation.retention import judged, learning_of, probe_of, sentences
from cpift.evaluation.scores import Score
from cpift.pipeline.outcomes import INTEGRATES, known_scores, own_models, scored_models, scores_of, shared_models
from cpift.pipeline.pipeline import Pipeline
from cpift.scorecard.card import Scorecard
from cpift.sweep.config import KEEPS, Sweep
from cpift.sweep.keep import remake_command
from cpift.sweep.objectives import figure_named, figures
from cpift.sweep.record import pinned, sweep_record
from cpift.sweep.scores import SweepData, best_trial


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


def require_benchmarks(sweep: Sweep, run: Pipeline) -> None:
    """Raise CpiftError where lm-eval does not know a task or has no figure that is an objective: one row of each is
    scored with θ0, before anything is trained."""
    wanted = sweep.benchmarks
    if wanted is None:
        return
    from cpift.evaluation.standard import standard_scores

    found = standard_scores({"base": run.pretrained().path}, replace(wanted, limit=1))["base"]
    known = [
        f"benchmark.{task}.{name}" for task, figures in found.items() for name in figures if "_stderr," not in name
    ]
    problems = [
        Problem("objectives", f"{one.figure!r}: lm-eval has no such figure", f"one of {', '.join(known)}")
        for one in sweep.config.objectives
        if one.figure.startswith("benchmark.") and one.figure not in known
    ]
    if problems:
        raise ConfigError(f"sweep {sweep.name}", problems)


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


def with_report_rows(sweep: Sweep, data: SweepData, view: View) -> SweepData:
    """The results with those on the rows that the search never saw, where the sweep holds some back. On Ray."""
    from cpift.cluster.engine import RayEngine
    from cpift.cluster.session import ray_session

    best = best_trial(data)
    if sweep.config.report is None or best is None:
        return data
    sweep = pinned(sweep)
    maker = sweep_record(sweep).name
    view.note("Scoring the best config, the run as it stands, θ0 and the fine-tunes on rows that the search never saw")
    with ray_session(sweep.base.resources):
        engine = partial(RayEngine, stored=False)
        card = on_report_rows(sweep, best.points[0], lambda run: Pipeline(run, engine(run), view, maker))
    return replace(data, reported=card)


AS_IT_STANDS, BEST = "as it stands", "best"


def on_report_rows(sweep: Sweep, best: Fields, pipeline: Callable[[RunConfig], Pipeline]) -> Scorecard:
    """The best config, the run as it stands, θ0 and the fine-tunes on the rows to report on, with the first seed.

    What is not kept is made again, and what only this asks for is dropped once it is scored.
    """
    seed, tasks = sweep.seeds[0], [task.name for task in sweep.base.tasks]
    runs = {AS_IT_STANDS: pipeline(sweep.reported({}, seed)), BEST: pipeline(sweep.reported(best, seed))}
    scores: dict[str, dict[str, Score]] = {}
    for title, run in runs.items():
        found = known_scores(run, sweep.config.model)
        if found is None:
            (run.integrate if entry(INTEGRATES, sweep.config.model, "model") else run.fuse)()
            found = run.evaluate(scored_models(run, sweep.config.model))
        shared = [model.title for model in shared_models(run)]
        scores |= {model: found[model] for model in shared} | {title: found[sweep.config.model]}
    _drop(sweep, runs, best)
    counts = {task: f"{task}: {scores[BEST][task]['rows']} rows that the search never saw" for task in tasks}
    return Scorecard(
        sweep.name, counts, scores, "base", {task: probe_of(task) for task in tasks}, (), BEST, beside=(AS_IT_STANDS,)
    )


def _drop(sweep: Sweep, runs: Mapping[str, Pipeline], best: Fields) -> None:
    """Drop the weights of models that this sweep made, has scored, and does not keep."""
    keep = entry(KEEPS, sweep.config.keep, "keep")
    own = {title: own_models(run, sweep.config.model).values() for title, run in runs.items()}
    spared = {artifact.path for artifact in own[BEST]} if keep.best else set()
    for title, run in runs.items():
        point = best if title == BEST else _standing(sweep)
        for artifact in own[title]:
            mine = artifact.has_weights and artifact.manifest().get("made_for") == artifact.maker
            if mine and not keep.every and artifact.path not in spared:
                artifact.drop_weights(remake_command(sweep, point, run.config.seed))


def _standing(sweep: Sweep) -> Fields:
    """The values that the run has where the space has others; of a name that it leaves out, of the section."""
    values: Fields = {}
    for name in sweep.config.space:
        node, path = sweep.base.model_dump(mode="json"), list[str]()
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                break
            node, path = node[part], [*path, part]
        values[".".join(path)] = one_line_yaml(node)
    return values
