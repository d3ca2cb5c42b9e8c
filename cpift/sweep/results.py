"""A sweep's results, read from the manifests and scores of its artifacts: what the report and the terminal show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cpift.config.loading import Fields, describe, dump_config, dump_fields, shown
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import json_text
from cpift.evaluation.estimates import Estimate, estimates
from cpift.evaluation.retention import DEFINITION
from cpift.method.groups import Grouping
from cpift.pipeline.outcomes import (
    benchmark_figures,
    benchmarked,
    own_models,
    scored_models,
    scores_of,
    shared_models,
    trial_models,
)
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import evaluate, order
from cpift.pipeline.stages.names import ModelRef
from cpift.pipeline.stages.regions import wanted
from cpift.report.index import SWEEP, write_page
from cpift.sweep.config import Sweep
from cpift.sweep.files import sweep_md, trials_csv
from cpift.sweep.judging import learning_said
from cpift.sweep.objectives import figures
from cpift.sweep.record import Attempt
from cpift.sweep.scores import Overlaps, Reuse, SweepData, TrialRow, best_trial, judged, pareto_front
from cpift.sweep.verdict import values_of

_STAGES = ("model", "probe", "regions", "backbone", "fuse", "integrate", "evaluate")


@dataclass(frozen=True)
class _Tried:
    """An attempt with its runs, one a seed."""

    attempt: Attempt
    runs: list[Pipeline]


def gather(sweep: Sweep, attempts: Sequence[Attempt], pipeline: Callable[[RunConfig], Pipeline]) -> SweepData:
    """Everything the report shows. Reads the store; makes nothing."""
    tried = [
        _Tried(attempt, [pipeline(sweep.run(attempt.points[0], seed)) for seed in sweep.seeds]) for attempt in attempts
    ]
    rows = [_row(sweep, number, trial) for number, trial in enumerate(tried, start=1)]
    done = [trial for trial in tried if trial.attempt.status == "done"]
    base = sweep.base
    data = SweepData(
        name=sweep.name,
        sweep_yaml=_sweep_yaml(sweep),
        best_yaml="",
        keep=sweep.config.keep,
        space=_space(sweep, attempts),
        method=sweep.config.search.method,
        seeds=list(sweep.seeds),
        confidence=sweep.config.confidence,
        model=sweep.config.model,
        objectives=[(objective.figure, objective.sign) for objective in sweep.config.objectives],
        tasks=[task.name for task in base.tasks],
        metrics={task.name: task.metric_name for task in base.tasks},
        trials=rows,
        references=_references(sweep, done[0].runs) if done else {},
        overlaps=_overlaps(done),
        reuse=_reuse(sweep, done),
        points=sum(len(attempt.points) for attempt in attempts),
        learning=learning_said([run for trial in done for run in trial.runs]),
        started=min((_started(sweep, run) for trial in done for run in trial.runs), default=""),
    )
    best = best_trial(data)
    if best is None:
        return data
    chosen = sweep.plain(best.points[0], sweep.seeds[0])
    model = own_models(pipeline(sweep.run(best.points[0], sweep.seeds[0])), sweep.config.model)[sweep.config.model]
    return replace(data, best_yaml=dump_config(chosen), best_model=str(model.path) if model.has_weights else "")


def _row(sweep: Sweep, number: int, tried: _Tried) -> TrialRow:
    attempt, done = tried.attempt, tried.attempt.status == "done"
    grouped = [run for run in tried.runs if wanted(run.config)]
    own = {artifact.path: artifact for run in tried.runs for artifact in own_artifacts(sweep, run)} if done else {}
    return TrialRow(
        number=number,
        points=attempt.points,
        status=attempt.status,
        reason=attempt.reason,
        groups=[[list(group) for group in run.group().groups] for run in grouped] if done else [],
        figures=_figures(sweep, tried.runs, lambda run: trial_models(run, sweep.config.model)) if done else {},
        seconds=sum(artifact.manifest()["seconds"] for artifact in own.values()),
    )


def _started(sweep: Sweep, run: Pipeline) -> str:
    """When the first artifact of a trial was begun, but for its fine-tunes: its core regions, or what it judges."""
    first = run.artifacts.regions if wanted(run.config) else own_models(run, sweep.config.model)[sweep.config.model]
    return str(first.manifest()["started"])


def own_artifacts(sweep: Sweep, run: Pipeline) -> list[Artifact]:
    """What a trial makes and no other one asks for, as a rule: fused and final model and their scores."""
    models = own_models(run, sweep.config.model)
    return [
        *models.values(),
        *(run.artifacts.evaluate(ModelRef.of(title, artifact)) for title, artifact in models.items()),
        *_benchmarked(sweep, run),
    ]


def _benchmarked(sweep: Sweep, run: Pipeline) -> list[Artifact]:
    wanted = sweep.benchmarks
    return [] if wanted is None else [benchmarked(run, sweep.config.model, wanted)]


def all_there(sweep: Sweep, attempts: Sequence[Attempt], pipeline: Callable[[RunConfig], Pipeline]) -> bool:
    """Whether everything that finished trials and their shared work made is still in the store."""
    done = [attempt for attempt in attempts if attempt.status == "done"]
    runs = [pipeline(sweep.run(attempt.points[0], seed)) for attempt in done for seed in sweep.seeds]
    first = [
        [*run.artifacts.probes.values(), *([run.artifacts.regions, run.artifacts.group] if wanted(run.config) else [])]
        for run in runs
    ]
    # Without groups the later ones have no name.
    if not all(artifact.complete for artifacts in first for artifact in artifacts):
        return False
    return all(artifact.complete for run in runs for artifact in _made(sweep, run))


def _made(sweep: Sweep, run: Pipeline) -> Iterator[Artifact]:
    """Every artifact of a run that took part in the sweep."""
    artifacts = order.outputs(run.artifacts, run.known(), *order.FIRST).values()
    yield from (artifact for artifact in artifacts if artifact.stage in _STAGES)
    models = scored_models(run, sweep.config.model)
    yield from (*own_models(run, sweep.config.model).values(), *evaluate.outputs(run.artifacts, models).values())
    yield from _benchmarked(sweep, run)


def _figures(
    sweep: Sweep, runs: Sequence[Pipeline], models: Callable[[Pipeline], list[ModelRef]]
) -> dict[str, dict[str, Estimate]]:
    """Every figure of these models, over the seeds."""
    by_model: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        chosen = models(run)
        scores = scores_of(run, [*shared_models(run), *chosen])
        for model in chosen:
            tasks = [task.name for task in run.config.tasks]
            found = figures(scores, tasks, model.title)
            if model.title == sweep.config.model:
                found |= benchmark_figures(run, model.title, sweep.benchmarks)
            by_model.setdefault(model.title, []).append(found)
    return {title: estimates(repeats, sweep.config.confidence) for title, repeats in by_model.items()}


def _references(sweep: Sweep, runs: Sequence[Pipeline]) -> dict[str, dict[str, Estimate]]:
    return _figures(sweep, runs, shared_models)


def _overlaps(tried: Sequence[_Tried]) -> list[Overlaps]:
    """One a distinct regions artifact, in the order of p and seed, with every absolute τ that was tried on it."""
    by_folder: dict[Path, tuple[float, int, Grouping, set[float]]] = {}
    for trial in tried:
        for run in (run for run in trial.runs if wanted(run.config)):
            grouping, p = run.group(), run.config.regions.p
            entry = by_folder.setdefault(run.artifacts.regions.path, (p, run.config.seed, grouping, set()))
            entry[3].update(_threshold(point, grouping) for point in trial.attempt.points)
    return [
        Overlaps(
            title=f"p = {shown(p)}, seed {seed}",
            tasks=list(grouping.tasks),
            jaccard=grouping.jaccard.tolist(),
            chance=grouping.chance,
            taus=sorted(taus),
        )
        for p, seed, grouping, taus in sorted(by_folder.values(), key=lambda entry: entry[:2])
    ]


def _threshold(point: Fields, grouping: Grouping) -> float:
    if "groups.tau_chance" in point:
        return float(point["groups.tau_chance"]) * grouping.chance
    return float(point.get("groups.tau", grouping.tau))


def _reuse(sweep: Sweep, tried: Sequence[_Tried]) -> list[Reuse]:
    """What a separate run of every point with every seed would have made, beside what was made."""
    needed: dict[str, list[float]] = {stage: [] for stage in _STAGES}
    seconds_by_stage: dict[str, dict[Path, float]] = {stage: {} for stage in _STAGES}
    for trial in tried:
        for artifact in (artifact for run in trial.runs for artifact in _made(sweep, run)):
            seconds = seconds_by_stage[artifact.stage].get(artifact.path) or float(artifact.manifest()["seconds"])
            seconds_by_stage[artifact.stage][artifact.path] = seconds
            needed[artifact.stage] += [seconds] * len(trial.attempt.points)
    return [
        Reuse(
            stage,
            len(needed[stage]),
            len(seconds_by_stage[stage]),
            sum(needed[stage]),
            sum(seconds_by_stage[stage].values()),
        )
        for stage in _STAGES
        if needed[stage]
    ]


def _space(sweep: Sweep, attempts: Sequence[Attempt]) -> dict[str, list[Any]]:
    space = {}
    for name in sweep.config.space:
        values = list(dict.fromkeys(point[name] for attempt in attempts for point in attempt.points))
        numbers = all(isinstance(value, (int, float)) for value in values)
        space[name] = sorted(values) if numbers else values
    return space


def _sweep_yaml(sweep: Sweep) -> str:
    return dump_fields(sweep.config.model_dump(mode="json", exclude_none=True, exclude_defaults=True))


def write_results(data: SweepData, folder: Path) -> Path:
    """The report as a page and as Markdown, the figures as JSON and as a table, and the best run's config; returns the
    page's path."""
    from cpift.sweep.page import sweep_page

    beside = {
        "best.yaml": data.best_yaml,
        "sweep.json": json_text(summary(data)),
        "trials.csv": trials_csv(data) if data.trials else "",
        "sweep.md": sweep_md(data),
    }
    return write_page(folder, SWEEP, sweep_page(data), {name: text for name, text in beside.items() if text})


def summary(data: SweepData) -> dict[str, Any]:
    """The sweep in figures, for machines."""
    best = best_trial(data)
    return {
        "name": data.name,
        "retention": {"definition": DEFINITION, "said": data.learning},
        "points": data.points,
        "seeds": data.seeds,
        "confidence": data.confidence,
        "tasks": data.metrics,
        "references": _plain(data.references),
        "trials": [
            {
                "number": trial.number,
                "points": trial.points,
                "status": trial.status,
                "reason": trial.reason,
                "groups": trial.groups,
                "seconds": trial.seconds,
                "figures": _plain(trial.figures),
            }
            for trial in data.trials
        ],
        "best": best.number if best else None,
        "best_model": data.best_model or None,
        "pareto": [trial.number for trial in pareto_front(data)],
        "reported": None if data.reported is None else data.reported.summary(),
        "reuse": [stage.__dict__ for stage in data.reuse],
    }


def _plain(figures: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {
        model: {name: estimate.__dict__ for name, estimate in by_name.items()} for model, by_name in figures.items()
    }


def results_table(data: SweepData, rows: int = 12) -> Table:
    """The best trials by the first objective for the terminal, and every one that failed."""
    title = (
        f"{data.name}: {len(data.trials)} trials of {data.points} points, {len(data.seeds)} seeds, {data.model} model"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", justify="right")
    for name in data.space:
        table.add_column(name, justify="right")
    for figure, _ in data.objectives:
        table.add_column(figure, justify="right")
    (figure, sign), failed = data.objectives[0], [trial for trial in data.trials if trial.status == "failed"]
    ranked = [
        (estimate.mean * sign, trial) for trial in data.trials if (estimate := judged(data, trial, figure)) is not None
    ]
    for _, trial in sorted(ranked, key=lambda pair: -pair[0])[:rows]:
        cells = [_cell(judged(data, trial, name)) for name, _ in data.objectives]
        table.add_row(str(trial.number), *(values_of(trial, name) for name in data.space), *cells)
    for trial in failed:
        values = (values_of(trial, name) for name in data.space)
        table.add_row(Text(str(trial.number), "red"), *values, Text("failed", "red"))
    return table


def _cell(estimate: Estimate | None) -> str | Text:
    if estimate is None:
        return "–"
    return Text.assemble(
        f"{estimate.mean:.4f}", ("" if estimate.low is None else f" ±{estimate.mean - estimate.low:.3f}", "dim")
    )


def failures(data: SweepData) -> list[str]:
    """One line a failed trial: its point and the last line of the reason."""
    return [
        f"{describe(trial.points[0])}: {(trial.reason.strip() or 'no reason given').splitlines()[-1]}"
        for trial in data.trials
        if trial.status == "failed"
    ]
