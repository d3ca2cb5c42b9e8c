"""What each stage of the pipeline does, given what it needs. Heavy imports (torch, transformers) start here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.opening import model_files, open_models
from cpift.checkpoints.writing import write_plain
from cpift.config.loading import dump_config
from cpift.config.run import TaskConfig, TrainingConfig
from cpift.data.tasks import read_examples
from cpift.data.use import told
from cpift.devices import device_name
from cpift.disk.artifacts import CARD, Artifact, package_versions, source_commit
from cpift.disk.files import read_json, write_json
from cpift.errors import entry
from cpift.method.groups import group_tasks
from cpift.method.masks import read_summary
from cpift.method.regions import Streaming, write_regions
from cpift.pipeline.fuse import FUSION_RECORD, INPUTS_RECORD, describe_inputs, fuse_models
from cpift.pretrained.tokenizer_files import TEMPLATE, chat_template
from cpift.training.spec import RESULT, STEPS_PER, FitSpec, StageSpec, stages_of

if TYPE_CHECKING:
    from cpift.pipeline.identity import Model
    from cpift.pipeline.pipeline import Pipeline
    from cpift.report.write import ReportData


def _fit_spec(
    run: Pipeline, title: str, model: Model, training: TrainingConfig, stages: tuple[StageSpec, ...], artifact: Artifact
) -> FitSpec:
    return FitSpec(
        title=title,
        model=model.path,
        tasks=run.config.tasks,
        stages=stages,
        training=training,
        seed=run.config.seed,
        threads=run.config.resources.threads,
        export=artifact.work_dir / "export",
        scratch=artifact.work_dir,
        logs=run.root / "logs" / title.replace(" ", "-"),
        tracking=run.config.tracking,
        resources=run.config.resources,
        rows={task: run.artifacts.train_rows(task) for stage in stages for task in stage.tasks},
    )


def check_data(run: Pipeline, base: Model) -> None:
    """What only θ0's tokenizer can tell of the data: raise DataError before the first fine-tune, not after the last."""
    from cpift.evaluation.rows import check_rows
    from cpift.models.sources import load_tokenizer, source_of
    from cpift.pipeline.row_checks import check_train_rows

    in_place = run.artifacts.in_place and source_of(run.config.model).tokenizer()
    tokenizer = in_place or load_tokenizer(base.path)
    check_train_rows(run.config, tokenizer)
    check_rows(tokenizer, [task for task in run.config.tasks if task.source("test") is not None], run.config.evaluation)


def loadable(run: Pipeline, model: Model, artifact: Artifact) -> Path:
    """The folder that an evaluation loads: the model's own; in the work folder of the scores an adapter as the model it
    makes of θ0, and a given model with the run's chat template where that is not its own."""
    from cpift.models.sources import configured_template

    template, adapter = configured_template(run.config.model), (model.path / ADAPTER_CONFIG).is_file()
    other = template is not None and chat_template(model.path) != template
    if not adapter and not other:
        return model.path
    folder = artifact.work_dir / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if adapter:
        pretrained, opened = open_models(run.artifacts.base.path, {model.title: model.path})
        write_plain(opened[model.title], pretrained, folder)
    else:
        for file in (file for file in model_files(model.path) if file.name != TEMPLATE):
            (folder / file.name).symlink_to(file.resolve())
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    return folder


def probe_specs(run: Pipeline, base: Model) -> list[FitSpec]:
    """One single-stage fine-tune from θ0 a task."""
    specs = []
    for task, artifact in run.artifacts.probes.items():
        spec = _fit_spec(run, f"probe {task}", base, run.config.probe_training, (StageSpec((task,)),), artifact)
        own = run.config.resources.overridden(run.config.task(task).resources)
        specs.append(replace(spec, resources=own, threads=own.threads))
    return specs


def backbone_spec(run: Pipeline, base: Model, groups: Sequence[Sequence[str]], artifact: Artifact) -> FitSpec:
    """Multi-stage SFT from θ0, group after group, nothing frozen."""
    spec = _fit_spec(run, "backbone", base, run.config.backbone_training, stages_of(groups, None), artifact)
    return replace(spec, threads=run.artifacts.threads_alone)


# `integration.stages` → the groups that are trained one after the other
STAGES: dict[str, Callable[[Sequence[Sequence[str]]], Sequence[Sequence[str]]]] = {
    "groups": lambda groups: groups,
    "mixed": lambda groups: [tuple(task for group in groups for task in group)],
}


def integration_spec(run: Pipeline, fused: Model, groups: Sequence[Sequence[str]], artifact: Artifact) -> FitSpec:
    """Multi-stage SFT of the fused model on balanced samples, cores frozen; or one stage of the same length."""
    settings = run.config.integration_training
    stages = stages_of(entry(STAGES, settings.stages, "integration.stages")(groups), settings.freeze)
    each = entry(STEPS_PER, settings.steps_per, "steps_per")
    times = sum(map(each, groups)) // sum(each(stage.tasks) for stage in stages)
    training = settings.model_copy(update={"steps": settings.steps and settings.steps * times})
    spec = _fit_spec(run, "integration", fused, training, stages, artifact)
    return replace(
        spec,
        threads=run.artifacts.threads_alone,
        regions=run.artifacts.regions.path,
        penalty=settings.penalty,
        samples_per_task=settings.samples_per_task,
        balanced=True,
    )


def build_regions(run: Pipeline, out: Path) -> None:
    """Select every task's core region and keep masks, summaries and intersections."""
    select_core_regions(run, {run.config.regions.p: out})


def select_core_regions(run: Pipeline, outputs: Mapping[float, Path]) -> None:
    """Core regions for every p of `outputs`, each into its folder, from one pass over the checkpoints."""
    folders = {task: model.path for task, model in run.artifacts.tuned.items()}
    pretrained, tuned = open_models(run.artifacts.base.path, folders, run.config.fusion.vocabulary)
    mark = run.merging.mark if run.merging else None
    streaming = Streaming(budget=run.config.resources.memory_budget, mark=mark)
    write_regions(pretrained, tuned, run.config.regions, outputs, streaming)
    described = describe_inputs(run.artifacts, None, hashed=run.config.resources.verify)
    for out in outputs.values():
        write_json(out / INPUTS_RECORD, described)


def build_groups(run: Pipeline, regions: Artifact, out: Path) -> None:
    """Group the tasks by their cores' overlaps."""
    found, tasks = read_summary(regions.path), [task.name for task in run.config.tasks]
    places = [found["tasks"].index(task) for task in tasks]  # another order of tasks may have made the regions
    overlaps = np.array(found["overlaps"])[np.ix_(places, places)]
    grouping = group_tasks(tasks, overlaps, run.config.regions.p, run.config.groups, run.config.seed)
    write_json(out / "groups.json", asdict(grouping) | {"jaccard": grouping.jaccard.tolist()})


def build_fusion(run: Pipeline, groups: Sequence[Sequence[str]], backbone: Model, out: Path) -> None:
    """Fuse, check the result and keep the record beside it."""
    artifact = run.artifacts.fuse(groups, backbone)
    fuse_models(run.config, run.artifacts, artifact, groups, backbone, out, run.view.progress, run.merging)
    add_card(run, "fused", groups, artifact, out)


def add_card(run: Pipeline, kind: str, groups: Sequence[Sequence[str]], artifact: Artifact, out: Path) -> None:
    """Write the model card of a fused or final model beside it."""
    from cpift.report.model_card import write_model_card

    known = {"fingerprint": artifact.fingerprint, "versions": package_versions(), "commit": source_commit()}
    write_model_card(out, kind, run.config, groups, known | {"device": device_name()}, run.artifacts.base.path)


def tell_verdict(run: Pipeline, sentence: str) -> None:
    """Put the verdict into the final model's card, but for one that a manifest holds the hash of, as they once did."""
    from cpift.report.model_card import write_model_card

    artifact = artifacts_of(run)["integrate"]
    if CARD not in (manifest := artifact.manifest())["outputs"]:
        groups, base = run.group().groups, run.artifacts.base.path
        write_model_card(artifact.path, "final", run.config, groups, manifest, base, sentence)


def report_data(run: Pipeline, scores: Mapping[str, Mapping[str, Any]]) -> ReportData:
    """Gather what the report shows from the artifacts of a finished run."""
    from cpift.evaluation.retention import condensed
    from cpift.evaluation.verdict import verdict_sentence
    from cpift.report.facts import halves, samples, tokens_by_model
    from cpift.report.write import ReportData

    grouping = run.group()
    regions = read_summary(run.artifacts.regions.path)["regions"]
    model = Checkpoint(run.artifacts.base.path)
    made = artifacts_of(run)
    record = read_json(made["fuse"].path / FUSION_RECORD)
    fits = {title: read_json(artifact.path / RESULT) for title, artifact in _fits(run, made).items()}
    rows = [one for title, fit in fits.items() for one in told(title, fit.get("rows", ()))]
    tasks, models = [task.name for task in run.config.tasks], run.models()
    by_task, means = halves(tasks, scores)  # before the rows of the scores are let go
    return ReportData(
        name=run.config.name,
        config_yaml=dump_config(run.config),
        models=list(scores),
        tasks=tasks,
        scores=condensed(scores),
        jaccard=grouping.jaccard.tolist(),
        chance=grouping.chance,
        tau=grouping.tau,
        groups=[list(group) for group in grouping.groups],
        cores={
            task: [
                {"tensor": name, "numel": model.tensors[name].numel, "core": core}
                for name, core in one["cores"].items()
            ]
            for task, one in regions.items()
        },
        regions={task: {key: one[key] for key in ("requested", "count", "threshold")} for task, one in regions.items()},
        slerp=record["tensors"],
        curves={title: fit["log"] for title, fit in fits.items()},
        checks=_checks(record, read_json(made["integrate"].path / RESULT)),
        provenance=[artifact.manifest() for artifact in made.values()],
        warnings=[*_warnings(run, grouping.warnings, regions), *(text for text, warns in rows if warns)],
        rows=[sentence for sentence, _ in rows],
        headline=verdict_sentence(tasks, scores),
        model=str(models[-1].path.relative_to(run.root)),
        prompt=_prompt(run.config.tasks),
        halves=by_task,
        mean_halves=means,
        tokens=tokens_by_model(made, {one.title: one.fingerprint for one in models}, run.artifacts.base.fingerprint),
        samples=samples(run.config.tasks, scores),
    )


def _prompt(tasks: Sequence[TaskConfig]) -> str:
    """The shortest prompt among the tasks' first test rows, as Python writes it; what is long would hide the code."""
    first = [next(iter(read_examples(task.test_data))) for task in tasks]
    turns = [[{"role": turn.role, "content": turn.content} for turn in example.prompt] for example in first]
    shown = min((repr(one) for one in turns), key=len)
    return shown if len(shown) <= _LONGEST_PROMPT else repr([{"role": "user", "content": "Hello"}])


_LONGEST_PROMPT = 240


def artifacts_of(run: Pipeline) -> dict[str, Artifact]:
    """Every artifact of a finished run by title."""
    groups, backbone = run.group().groups, run.backbone()
    staged = run.artifacts.backbone(groups)
    fused = run.artifacts.fuse(groups, backbone)
    return {
        **({} if run.artifacts.in_place else {"model": run.artifacts.model}),
        **{f"probe {task}": artifact for task, artifact in run.artifacts.probes.items()},
        "regions": run.artifacts.regions,
        "group": run.artifacts.group,
        **({"backbone": staged} if staged else {}),
        **(run.baselines(run) if run.baselines else {}),
        "fuse": fused,
        "integrate": run.artifacts.integrate(groups, fused),
        **{f"evaluate {model.title}": run.artifacts.evaluate(model) for model in run.models()},
    }


def _fits(run: Pipeline, made: Mapping[str, Artifact]) -> dict[str, Artifact]:
    fits = {title: one for title, one in made.items() if one.stage in ("probe", "backbone")}
    return fits | {"integration": made["integrate"]}


def _checks(record: Mapping[str, Any], integration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the run verified of itself, with figures."""
    checks = list(record["checks"])
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


def _warnings(run: Pipeline, grouping: Sequence[str], regions: Mapping[str, Any]) -> list[str]:
    from cpift.data.shared_rows import shared_rows

    found = [*grouping, *shared_rows(run.config)]
    for task, one in regions.items():
        if one["count"] < one["requested"]:
            share = one["count"] / one["space"]
            found.append(
                f"task {task}: only {share:.3%} of the elements moved at all, fewer than p = {run.config.regions.p:g}; "
                "its core region holds those. Train the probe longer, or keep checkpoints in float32"
            )
    return found
