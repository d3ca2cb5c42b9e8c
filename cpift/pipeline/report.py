"""The report of a finished run: what it shows, gathered from the run's outputs, and the page written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.loading import dump_config
from cpift.config.run import TaskConfig
from cpift.data.shared_rows import shared_rows
from cpift.data.tasks import read_examples
from cpift.data.use import use_sentences
from cpift.disk.artifacts import CARD, Artifact
from cpift.disk.files import read_json
from cpift.evaluation.retention import condensed
from cpift.evaluation.verdict import verdict_sentence
from cpift.lineage.history import generations, headline
from cpift.merging.checks import Check
from cpift.method.experts import core_by_expert
from cpift.method.masks import RegionMasks, RegionRecord, read_summary
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages.fuse import FUSION_RECORD
from cpift.pipeline.stages.regions import read_changes
from cpift.report.data import ReportData
from cpift.report.facts import halves, samples, tokens_by_model
from cpift.report.model_card import write_model_card
from cpift.report.places import ExpertRow, expert_rows, moves_of
from cpift.report.write import write_run
from cpift.training.spec import TrainingRecord, read_training

if TYPE_CHECKING:
    import torch

_LONGEST_PROMPT = 240


class Report(NamedTuple):
    """What was found, and the page that a person reads."""

    data: ReportData
    page: Path


def report(run: Pipeline) -> Report:
    """Everything that a run makes, and its page; written anew each time, for it costs nothing."""
    data = gather(run)
    _tell_verdict(run, data.headline)
    with run.view.stage("report"):
        return Report(data, write_run(data, run.root))


def _tell_verdict(run: Pipeline, sentence: str) -> None:
    """Put the verdict into the final model's card, but for one that a manifest holds the hash of, as they once did."""
    artifact = run.outputs()["integrate"]
    if CARD not in (manifest := artifact.manifest())["outputs"]:
        groups, base = run.group().groups, run.artifacts.base.path
        write_model_card(artifact.path, "final", run.config, groups, manifest, base, sentence)


def gather(run: Pipeline) -> ReportData:
    """What the report shows, from the artifacts of a run; made if need be."""
    scores = run.evaluate()
    grouping = run.group()
    regions = read_summary(run.artifacts.regions.path)["regions"]
    model = Checkpoint(run.artifacts.base.path)
    outputs = run.outputs()
    record = read_json(outputs["fuse"].path / FUSION_RECORD)
    fits = {title: read_training(artifact.path) for title, artifact in _fits(outputs).items()}
    rows = [sentence for title, fit in fits.items() for sentence in use_sentences(title, fit.get("rows", ()))]
    tasks, models = [task.name for task in run.config.scored], run.models()
    places = [grouping.tasks.index(task) for task in tasks]
    by_task, means = halves(tasks, scores)  # before the rows of the scores are let go
    return ReportData(
        name=run.config.name,
        config_yaml=dump_config(run.config),
        models=list(scores),
        tasks=tasks,
        scores=condensed(scores),
        jaccard=grouping.jaccard[np.ix_(places, places)].tolist(),
        chance=grouping.chance,
        tau=grouping.tau,
        groups=[list(group) for group in grouping.groups],
        cores={
            task: [
                {"tensor": name, "numel": model.tensors[name].numel, "core": core}
                for name, core in region["cores"].items()
            ]
            for task, region in regions.items()
            if task in tasks
        },
        regions={
            task: {"requested": region["requested"], "count": region["count"], "threshold": region["threshold"]}
            for task, region in regions.items()
        },
        measure=run.config.regions.measure,
        slerp=record["tensors"],
        held_out={title: fit["held_out"] for title, fit in fits.items() if fit.get("held_out")},
        curves={title: fit["log"] for title, fit in fits.items()},
        checks=_checks(record, fits["integration"]),
        provenance=[artifact.manifest() for artifact in outputs.values()],
        warnings=[*_warnings(run, grouping.warnings, regions), *(text for text, warns in rows if warns)],
        rows=[sentence for sentence, _ in rows],
        headline=verdict_sentence(tasks, scores) if run.config.parent is None else headline(run.config, scores),
        model=str(models[-1].path.relative_to(run.root)),
        prompt=_prompt(run.config.scored),
        halves=by_task,
        mean_halves=means,
        experts=_experts(run.artifacts.regions.path, {task: regions[task]["cores"] for task in tasks}, model),
        moves={task: moves_of(tensors) for task, tensors in read_changes(run.artifacts.regions.path).items()},
        tokens=tokens_by_model(
            outputs, {entry.title: entry.fingerprint for entry in models}, run.artifacts.base.fingerprint
        ),
        samples=samples(run.config.scored, scores),
        history=[(str(one.run), one.change) for one in generations(run.config)] if run.config.parent else [],
    )


def _experts(folder: Path, cores: Mapping[str, Mapping[str, int]], model: Checkpoint) -> list[ExpertRow]:
    """What of each expert the core of each task is."""
    masks, shapes = RegionMasks(folder, list(cores)), {name: info.shape for name, info in model.tensors.items()}

    def words(task: str, name: str) -> torch.Tensor:
        return masks.words(task, name, 0, model.tensors[name].numel)

    return expert_rows({task: core_by_expert(own, shapes, partial(words, task)) for task, own in cores.items()})


def _prompt(tasks: Sequence[TaskConfig]) -> str:
    """The shortest prompt among the tasks' first test rows, as Python writes it; what is long would hide the code."""
    first = [next(iter(read_examples(task.test_data))) for task in tasks]
    turns = [[{"role": turn.role, "content": turn.content} for turn in example.prompt] for example in first]
    shown = min((repr(turn) for turn in turns), key=len)
    return shown if len(shown) <= _LONGEST_PROMPT else repr([{"role": "user", "content": "Hello"}])


def _fits(outputs: Mapping[str, Artifact]) -> dict[str, Artifact]:
    fits = {title: artifact for title, artifact in outputs.items() if artifact.stage in ("probe", "backbone")}
    return fits | {"integration": outputs["integrate"]}


def _checks(record: Mapping[str, Any], integration: TrainingRecord) -> list[Check]:
    """What the run verified of itself, with figures."""
    checks: list[Check] = list(record["checks"])
    for held in integration["frozen"]:
        checks.append(
            {
                "name": f"integration stage {held['stage'] + 1}: no frozen element moved",
                "passed": held["moved"] == 0 if held["elements"] else None,
                "detail": f"{held['elements']:,} elements compared before and after, {held['moved']:,} moved"
                if held["elements"]
                else "nothing to compare: no element is frozen",
            }
        )
    return checks


def _warnings(run: Pipeline, grouping: Sequence[str], regions: Mapping[str, RegionRecord]) -> list[str]:
    texts = [*grouping, *shared_rows(run.config)]
    for task, region in regions.items():
        if region["count"] < region["requested"]:
            share = region["count"] / region["space"]
            measure = run.config.regions.measure
            some = "moved at all" if measure == "update" else f"have a {measure} above 0"
            texts.append(
                f"task {task}: only {share:.3%} of the elements {some}, fewer than p = {run.config.regions.p:g}; "
                "its core region holds those. Train the probe longer, or keep checkpoints in float32"
            )
    return texts
