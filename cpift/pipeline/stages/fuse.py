"""Stage 5: cores transplanted into θ_base and the rest SLERPed, or another merge, and what came out checked."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cpift.checkpoints.opening import backbone_apart, has_apart, open_checkpoint, open_merged
from cpift.checkpoints.united import UnitedCheckpoint
from cpift.checkpoints.writing import TensorRecord
from cpift.config.identity import identity_of
from cpift.config.run import RunConfig
from cpift.console.progress import counted
from cpift.devices import device_name
from cpift.disk.artifacts import Artifact, package_versions, source_commit
from cpift.disk.files import is_json, link_or_copy, write_json
from cpift.errors import CheckpointError, StageError
from cpift.merging.adapters.inputs import widened_inputs
from cpift.merging.adapters.making import write_adapter
from cpift.merging.adapters.planning import asked_of
from cpift.merging.base import FusionInputs, Materials, MergeMethod
from cpift.merging.checks import Check, CheckedFile, failures
from cpift.merging.conflicts import by_stage
from cpift.merging.engine import Merging, merge
from cpift.merging.registry import method_named, named_also, reads_moments, seeded
from cpift.merging.settings import Largest, write_trimmed
from cpift.merging.stacks.inputs import Part, StackInputs, stack_inputs
from cpift.merging.stacks.method import StackMerge
from cpift.merging.verify import check_loads, check_tokens, verify
from cpift.method.masks import SUMMARY
from cpift.method.moments import open_moments
from cpift.method.regions import Streaming
from cpift.models.sources import configured_template
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import backbone as backbones
from cpift.pipeline.stages import group, model, probe, regions
from cpift.pipeline.stages.inputs import INPUTS_RECORD, Inputs
from cpift.pipeline.stages.names import Groups, Known, ModelRef, Names
from cpift.pipeline.stages.step import Step, step_of
from cpift.pretrained.tokenizer_files import TEMPLATE, shared_template

VERSION = 2
FUSION_RECORD = "fusion.json"


# ---- what names it ---------------------------------------------------------------------------------------------------


def artifact(names: Names, groups: Groups, backbone: ModelRef) -> Artifact:
    """Named by θ0, θ1..θN, their regions, θ_base, and how they are fused; by the groups too where the conflict rule
    depends on stages. Other methods than cpift depend on neither groups nor backbone nor regions."""
    config = names.config
    if not config.fusion.isolates:
        return _merged(names)
    inputs = {"model": model.base(names).fingerprint, "regions": regions.artifact(names).fingerprint}
    inputs |= probe.fingerprints(names) | {"backbone": backbone.fingerprint} | names.code("fusion.conflict")
    fields = identity_of(config.fusion, "fuse") | names.template_fields | {"conflict": config.fusion.conflict_name}
    fields |= identity_of(config.resources, "fuse")
    if config.earlier:
        fields["protected"] = [task.name for task in config.earlier]
    if by_stage(config.fusion.conflict):
        fields["groups"] = [list(group) for group in groups]
    return names.artifact("fuse", VERSION, inputs, fields)


def _merged(names: Names) -> Artifact:
    fusion = names.config.fusion
    fields = identity_of(fusion, "merge") | names.template_fields | {"method": fusion.method_name}
    fields |= identity_of(names.config.resources, "merge")
    fields |= {name: getattr(fusion, name) for name in named_also(fusion.method)}
    if seeded(fusion.method):
        fields["seed"] = names.config.seed
    inputs = {"model": model.base(names).fingerprint} | probe.fingerprints(names) | names.code("fusion.method")
    if reads_moments(fusion.method):
        inputs |= probe.moments_given(names)
    return names.artifact("fuse", VERSION, inputs, fields, re.sub(r"[^\w.-]+", "-", fusion.method_name))


def known_artifact(names: Names, known: Known) -> Artifact | None:
    """`artifact`; None while something that names it is not known yet."""
    if not names.config.fusion.isolates:
        return _merged(names)
    if known.groups is None or known.backbone is None:
        return None
    return artifact(names, known.groups, known.backbone)


# ---- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What a fusion is made from, all of it there. `fused`: what it makes. read: the folders that are read for it."""

    fused: Artifact
    groups: Groups
    backbone: ModelRef
    read: Sequence[Path]


@unless_damaged
def make(run: Run) -> ModelRef:
    """The fused model; or another merge of the probes, which needs no regions and no backbone."""
    sources = prepare(run)
    fused = run.make(sources.fused, title(run.artifacts), lambda out: _build(run, sources, out), sources.read)
    if run.merging:
        run.merging.publish(fused.path, fused.fingerprint)
    return ModelRef.of("fused", fused)


def prepare(run: Run) -> Sources:
    """Everything that comes before, made if it is not there."""
    tuned = probe.make(run)
    if run.config.fusion.isolates:
        groups, backbone = group.make(run).groups, backbones.make(run)
    else:
        groups, backbone = (), model.make(run)
    read = [model.base(run.artifacts).path, backbone.path, *(probed.path for probed in tuned.values())]
    return Sources(artifact(run.artifacts, groups, backbone), groups, backbone, read)


def _build(run: Run, sources: Sources, out: Path) -> None:
    """Fuse, check the result and keep the record beside it."""
    fuse_models(run, sources, out)
    add_card(run, "fused", sources.groups, sources.fused, out)


def add_card(run: Run, kind: str, groups: Groups, artifact: Artifact, out: Path) -> None:
    """Write the model card of a fused or final model beside it."""
    from cpift.report.model_card import write_model_card

    known = {"fingerprint": artifact.fingerprint, "versions": package_versions(), "commit": source_commit()}
    write_model_card(out, kind, run.config, groups, known | {"device": device_name()}, model.base(run.artifacts).path)


def open_inputs(names: Names, groups: Groups, backbone: ModelRef) -> FusionInputs:
    """Every model of a fusion, opened for reading; `regions` is of use for CPI-FT's own method only.

    Raises CheckpointError for models that do not fit.
    """
    base, fusion = model.base(names), names.config.fusion
    folders = {task: probed.path for task, probed in probe.tuned(names).items()}
    pretrained, tuned = open_merged(base.path, folders, fusion)
    if fusion.slices:
        stacked = stack_inputs(fusion, pretrained, tuned)
        stacked.check()
        return stacked
    if backbone.path != base.path and not pretrained.is_apart and has_apart(pretrained, backbone.path):
        raise CheckpointError(f"backbone {backbone.path}", [backbone_apart("config.json, tie_word_embeddings")])
    inputs = FusionInputs(
        pretrained=pretrained,
        backbone=pretrained
        if backbone.path == base.path
        else open_checkpoint(backbone.path, pretrained, fusion.fitted),
        tuned=tuned,
        regions=regions.artifact(names).path,
        priority=[task for group in groups for task in group if task in tuned],
        protected=[task.name for task in names.config.earlier],
        moments=open_moments(probe.moments_merged(names), pretrained),
    )
    inputs.check()
    return inputs


def fuse_models(run: Run, sources: Sources, out: Path) -> None:
    """Write the fused model into `out`, with the record of what happened and of what was checked.

    Shards are made in the artifact's work folder and stay there if this is interrupted. Raises CheckpointError for
    models that do not fit, StageError if the result is not what it has to be: it is then beside `out`, set aside.
    """
    config, fused, merging, said = run.config, sources.fused, run.merging, run.view.progress
    inputs = open_inputs(run.artifacts, sources.groups, sources.backbone)
    if config.fusion.as_lora:
        _fuse_adapter(run, sources, inputs, out)
        return
    method = method_of(config, inputs, fused.work_dir, merging)
    shards = fused.work_dir / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    checked: dict[str, CheckedFile] = {}
    with _read(run.artifacts, sources, method).looked_at():
        records = merge(
            method,
            inputs.backbone,
            shards,
            fused.fingerprint,
            shard_size=config.fusion.shard_size,
            budget=config.resources.memory_budget,
            progress=counted(said, "fusion", inputs.backbone.numel),
            shards_by=merging.merge_shards if merging else None,
            checked=checked if config.resources.verify else None,
        )
    for path in sorted(shards.iterdir()):
        if not path.name.startswith("."):
            link_or_copy(path, out / path.name)
    write_beside(run.artifacts, sources, method, out)
    checks = []
    if config.resources.verify:
        looking = counted(said, "verification", inputs.backbone.numel)
        checks = verify(method, inputs.backbone, out, looking, checked)
        checks.append(check_loads(out, config.resources.memory_budget))
        if isinstance(inputs.pretrained, UnitedCheckpoint):
            checks.append(check_tokens(out, inputs.pretrained.tokens))
    _keep_record(out, fused, records, checks)


def _fuse_adapter(run: Run, sources: Sources, inputs: FusionInputs, out: Path) -> None:
    """Write what the merge adds to θ0 as an adapter into `out`; factors that singular values gave lie in the artifact's
    work folder if this is interrupted."""
    config, fused, wide = run.config, sources.fused, widened_inputs(inputs)
    method = method_of(config, wide, fused.work_dir, run.merging)
    asked = asked_of(config, [model.folder for model in inputs.tuned.values()], fused.work_dir / "factors")
    made = write_adapter(method, out, asked, counted(run.view.progress, "fusion", inputs.backbone.numel))
    write_beside(run.artifacts, sources, method, out)
    _keep_record(out, fused, made.records, made.checks)


def _keep_record(out: Path, fused: Artifact, records: Sequence[TensorRecord], checks: Sequence[Check]) -> None:
    """Write what happened and what was checked beside the result. Raises StageError where a check failed."""
    write_json(out / FUSION_RECORD, {"tensors": records, "checks": checks})
    if failed := failures(checks):
        aside = _set_aside(out, fused)
        raise StageError(
            "the fused model is not what it has to be; it is kept as "
            + "\n  - ".join([f"{aside}, with the checks in {FUSION_RECORD}", *failed])
        )


def write_beside(names: Names, sources: Sources, method: MergeMethod, out: Path) -> None:
    """Write into `out` what a fused model has beside its weights and their companions: its chat template, and what it
    was made from.

    Raises ChangedInput where core regions were selected from other bytes.
    """
    tuned, config = probe.tuned(names), names.config
    if template := configured_template(config.model) or shared_template(
        sources.backbone.path, [probed.path for probed in tuned.values()]
    ):
        (out / TEMPLATE).write_text(template, encoding="utf-8")
    inputs = _read(names, sources, method)
    described = inputs.described()
    inputs.require_as_recorded(regions.artifact(names).path / INPUTS_RECORD, described, sources.fused)
    write_json(out / INPUTS_RECORD, described)


def _read(names: Names, sources: Sources, method: MergeMethod) -> Inputs:
    """What is merged, by label."""
    models = {"pretrained": model.base(names), "backbone": sources.backbone, **probe.tuned(names)}
    unread = () if method.reads_base else ("pretrained", "backbone")  # without `needs_base` the two are one
    return Inputs.of(models, names.config.resources, probe.moments_merged(names), unread)


def _set_aside(out: Path, artifact: Artifact) -> Path:
    """Move a model that failed a check to a name that says so; one of an earlier attempt keeps its own."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (artifact.path.with_name(f"{artifact.name}.failed-checks{number}") for number in numbers)
    aside = next(path for path in paths if not path.exists())
    os.rename(out, aside)
    return aside


def method_of(config: RunConfig, inputs: FusionInputs, work: Path, merging: Merging | None = None) -> MergeMethod:
    """The method that `fusion.method` names, over these models."""

    def trimmed(part: Part, wanted: Largest) -> list[Path]:
        return _trimmed(config, part, work / part.folder, merging, wanted)

    if isinstance(inputs, StackInputs):
        return StackMerge.of(inputs, config.seed, trimmed)
    whole = Part(config.fusion, inputs)
    return method_named(config.fusion.method).make(
        Materials(inputs, config.fusion, config.seed, partial(trimmed, whole))
    )


def _trimmed(config: RunConfig, part: Part, folder: Path, merging: Merging | None, wanted: Largest) -> list[Path]:
    """The masks of the elements that a method wants, a folder a share; made if they are not all there."""
    folders = [folder / str(number) for number in range(len(wanted.shares))]
    if not all(is_json(one / SUMMARY) for one in folders):
        shutil.rmtree(folder, ignore_errors=True)
        for one in folders:
            one.mkdir(parents=True)
        mark = merging.mark if merging else None
        streaming = Streaming(budget=config.resources.memory_budget, mark=mark)
        write_trimmed(wanted, part.config, folders, streaming, part.inputs.first_layer)
    return folders


# ---- what is said of it ----------------------------------------------------------------------------------------------


def title(names: Names) -> str:
    fusion = names.config.fusion
    return "fusion" if fusion.isolates else f"merge: {fusion.method_name}"


def plan(names: Names, known: Known) -> Iterator[Step]:
    fused, config = known_artifact(names, known), names.config
    if not config.fusion.isolates:
        yield step_of(_merged(names), f"{config.fusion.method_name} of {len(config.tasks)} models")
    elif fused is not None:
        yield step_of(fused, _settings(config))
    elif known.groups is None:
        yield Step("fuse", "", "after group", "its groups decide the stages")
    else:
        yield Step("fuse", "", "after backbone", _settings(config))


def _settings(config: RunConfig) -> str:
    fusion = config.fusion
    return f"{fusion.space}, a vector is one {fusion.granularity}, ω {fusion.omega}, conflict {fusion.conflict_name}"


def outputs(names: Names, known: Known) -> dict[str, Artifact]:
    fused = known_artifact(names, known)
    return {} if fused is None else {"fuse": fused}


def models(names: Names, known: Known) -> list[ModelRef]:
    return [ModelRef.of("fused", fused) for fused in outputs(names, known).values()]
