"""The fusion of a run: its models opened, merged shard by shard, and what came out checked against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpift.artifacts import Artifact, link_or_copy, write_json
from cpift.checkpoints import Checkpoint
from cpift.config import RunConfig
from cpift.fusion import Fusion, FusionInputs
from cpift.given import open_checkpoint
from cpift.merging import Progress, merge
from cpift.stage_artifacts import Model, StageArtifacts
from cpift.verify import verify

FUSION_RECORD = "fusion.json"
OnProgress = Callable[[dict[str, Any]], None]


def open_inputs(artifacts: StageArtifacts, groups: Sequence[Sequence[str]], backbone: Model) -> FusionInputs:
    """Every model of a fusion, opened for reading."""
    base = artifacts.base
    pretrained = Checkpoint(base.path)
    return FusionInputs(
        pretrained=pretrained,
        backbone=pretrained if backbone.path == base.path else open_checkpoint(backbone.path, pretrained),
        tuned={task: open_checkpoint(model.path, pretrained) for task, model in artifacts.tuned.items()},
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
) -> None:
    """Write the fused model into `out`, with the record of what happened and of what was checked.

    Shards are made in the artifact's work folder and stay there if this is interrupted. Raises CheckpointError for
    models that do not fit, StageError if the result is not what it has to be.
    """
    inputs = open_inputs(artifacts, groups, backbone)
    inputs.check()
    method = Fusion(inputs, config.fusion)
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
    )
    for path in sorted(shards.iterdir()):
        if not path.name.startswith("."):
            link_or_copy(path, out / path.name)
    checks = []
    if config.resources.verify:
        checks = verify(method, out, _counted(on_progress, "verification", inputs.backbone.numel))
    write_json(out / FUSION_RECORD, {"tensors": records, "checks": checks})


def _counted(on_progress: OnProgress, title: str, elements: int) -> Progress:
    """Progress of work that goes over so many elements."""
    done = 0

    def on_elements(count: int, name: str) -> None:
        nonlocal done
        done += count
        on_progress({"title": title, "done": min(done / max(elements, 1), 1.0), "task": name})

    return on_elements
