"""The fusion of a run: its models opened, merged shard by shard, and what came out checked against them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cpift.checkpoints.opening import backbone_apart, has_apart, model_files, open_checkpoint, open_models
from cpift.config.run import RegionsConfig, RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import file_sha256, is_json, link_or_copy, read_json, write_json
from cpift.errors import ChangedInput, CheckpointError, Problem, StageError
from cpift.merging.base import FusionInputs, Materials, MergeMethod
from cpift.merging.checks import Progress, failures
from cpift.merging.engine import Merging, merge
from cpift.merging.registry import method_named
from cpift.merging.verify import check_loads, verify
from cpift.method.masks import SUMMARY
from cpift.method.regions import Streaming, write_regions
from cpift.models.sources import configured_template
from cpift.pipeline.identity import Model, StageArtifacts
from cpift.pretrained.tokenizer_files import TEMPLATE, shared_template

FUSION_RECORD, INPUTS_RECORD = "fusion.json", "inputs.json"
OnProgress = Callable[[dict[str, Any]], None]


def open_inputs(artifacts: StageArtifacts, groups: Sequence[Sequence[str]], backbone: Model) -> FusionInputs:
    """Every model of a fusion, opened for reading; `regions` is of use for CPI-FT's own method only."""
    base, vocabulary = artifacts.base, artifacts.config.fusion.vocabulary
    folders = {task: model.path for task, model in artifacts.tuned.items()}
    pretrained, tuned = open_models(base.path, folders, vocabulary)
    if backbone.path != base.path and not pretrained.is_apart and has_apart(pretrained, backbone.path):
        raise CheckpointError(f"backbone {backbone.path}", [backbone_apart("config.json, tie_word_embeddings")])
    return FusionInputs(
        pretrained=pretrained,
        backbone=pretrained if backbone.path == base.path else open_checkpoint(backbone.path, pretrained, vocabulary),
        tuned=tuned,
        regions=artifacts.regions.path,
        priority=[task for group in groups for task in group],
    )


def fuse_models(
    config: RunConfig,
    artifacts: StageArtifacts,
    artifact: Artifact,
    groups: Sequence[Sequence[str]],
    backbone: Model,
    out: Path,
    on_progress: OnProgress,
    merging: Merging | None = None,
) -> None:
    """Write the fused model into `out`, with the record of what happened and of what was checked.

    Shards are made in the artifact's work folder and stay there if this is interrupted. Raises CheckpointError for
    models that do not fit, StageError if the result is not what it has to be: it is then beside `out`, set aside.
    """
    inputs = open_inputs(artifacts, groups, backbone)
    inputs.check()
    method = method_of(config, inputs, artifact.work_dir, merging)
    shards = artifact.work_dir / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    records = merge(
        method,
        inputs.backbone,
        shards,
        artifact.fingerprint,
        shard_size=config.fusion.shard_size,
        budget=config.resources.memory_budget,
        progress=_counted(on_progress, "fusion", inputs.backbone.numel),
        shards_by=merging.merge_shards if merging else None,
    )
    for path in sorted(shards.iterdir()):
        if not path.name.startswith("."):
            link_or_copy(path, out / path.name)
    tunes = [model.path for model in artifacts.tuned.values()]
    if template := configured_template(config.model) or shared_template(backbone.path, tunes):
        (out / TEMPLATE).write_text(template, encoding="utf-8")
    described = describe_inputs(artifacts, backbone, hashed=config.resources.verify)
    _require_same_bytes(artifacts.regions.path / INPUTS_RECORD, described, artifact)
    write_json(out / INPUTS_RECORD, described)
    checks = []
    if config.resources.verify:
        checks = verify(method, inputs.backbone, out, _counted(on_progress, "verification", inputs.backbone.numel))
        checks.append(check_loads(out, config.resources.memory_budget))
    write_json(out / FUSION_RECORD, {"tensors": records, "checks": checks})
    if failed := failures(checks):
        aside = _set_aside(out, artifact)
        raise StageError(
            "the fused model is not what it has to be; it is kept as "
            + "\n  - ".join([f"{aside}, with the checks in {FUSION_RECORD}", *failed])
        )


def _set_aside(out: Path, artifact: Artifact) -> Path:
    """Move a model that failed a check to a name that says so; one of an earlier attempt keeps its own."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (artifact.path.with_name(f"{artifact.name}.failed-checks{number}") for number in numbers)
    aside = next(path for path in paths if not path.exists())
    os.rename(out, aside)
    return aside


def _require_same_bytes(record: Path, described: Mapping[str, Any], artifact: Artifact) -> None:
    """Raise ChangedInput if core regions were selected from other bytes than those of files of the same name now."""
    selected = read_json(record) if record.is_file() else {}
    problems = [
        Problem(f"{label}: {name}", "is not the file that core regions were selected from", _TOUCH)
        for label, model in selected.items()
        for name, now in described.get(label, {"files": {}})["files"].items()
        if None not in (hashes := {now["sha256"], model["files"].get(name, now)["sha256"]}) and len(hashes) > 1
    ]
    if problems:
        raise ChangedInput(artifact.title, problems)


_TOUCH = "it has the size and time of the other: `touch` it, so that regions are selected anew, and run again"


def describe_inputs(artifacts: StageArtifacts, backbone: Model | None, hashed: bool) -> dict[str, Any]:
    """Every model that was read: its fingerprint, and the size and, if `hashed`, sha256 of each of its files."""
    models = {"pretrained": artifacts.base, **({"backbone": backbone} if backbone else {}), **artifacts.tuned}
    files = list(dict.fromkeys(file for model in models.values() for file in model_files(model.path)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = dict(zip(files, pool.map(file_sha256, files) if hashed else [None] * len(files), strict=True))
    return {
        label: {
            "fingerprint": model.fingerprint,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": hashes[file]} for file in model_files(model.path)
            },
        }
        for label, model in models.items()
    }


def method_of(config: RunConfig, inputs: FusionInputs, work: Path, merging: Merging | None = None) -> MergeMethod:
    """The method that `fusion.method` names, over these models."""
    trimmed = partial(_trimmed, config, inputs, work / "trimmed", merging)
    return method_named(config.fusion.method).make(Materials(inputs, config.fusion, config.seed, trimmed))


def _trimmed(config: RunConfig, inputs: FusionInputs, folder: Path, merging: Merging | None) -> Path:
    """The masks of what TIES keeps: the largest updates, as core regions are found; made if they are not there."""
    if not is_json(folder / SUMMARY):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kept = RegionsConfig(p=config.fusion.density, scope=config.fusion.trim)
        mark = merging.mark if merging else None
        streaming = Streaming(budget=config.resources.memory_budget, mark=mark)
        write_regions(inputs.pretrained, inputs.tuned, kept, {kept.p: folder}, streaming)
    return folder


def _counted(on_progress: OnProgress, title: str, elements: int) -> Progress:
    """Progress of work that goes over so many elements."""
    done = 0

    def on_elements(count: int, name: str) -> None:
        nonlocal done
        done += count
        on_progress({"title": title, "done": min(done / max(elements, 1), 1.0), "task": name})

    return on_elements
