"""A fused model that is only scored: merged in memory where it is scored, and never written.

Its output is complete without weights, as one whose weights were dropped: files beside them, records, and the hashes
that the weights' files would have. When they are written after all, they are known to be those that were scored, or a
warning says that they are not; only then is every core compared with its donor.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpift.checkpoints.opening import model_files
from cpift.checkpoints.writing import copy_companions, write_index
from cpift.devices import device_name
from cpift.disk.artifacts import Artifact, Unwritten, claimed, require_sound
from cpift.disk.files import digest, link_or_copy, write_json
from cpift.disk.guarded import guarded_reads
from cpift.disk.input_watch import noted
from cpift.evaluation.scores import Evaluation
from cpift.formats.sizes import available_memory
from cpift.merging.in_memory import MergeInMemory, MergeRecord
from cpift.pipeline.engine import keep_scores
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import evaluate, fuse
from cpift.pipeline.stages.names import ModelRef

_SCORED_AS = 4  # bytes a weight while it is scored: float32
_MOST_KNOWN = 8
# What the last fusions of this process found out about their models, by what that follows from: points that differ in
# ω alone read them for it once.
_KNOWN: dict[str, dict[str, Any]] = {}


@unless_damaged
def score_fused(run: Run, remake: str) -> None:
    """Have the fused model scored without writing it; what comes before is made if it is not there.

    Nothing is done where it has its scores, or its weights are on the disk already. Where memory has no room for it, it
    is written. remake: the command that writes its weights.
    """
    sources = fuse.prepare(run)
    fused, scored = sources.fused, evaluate.artifact(run.artifacts, ModelRef.of("fused", sources.fused))
    if _done(fused, scored):
        return
    with claimed([fused, scored], run.view.warn):
        if _done(fused, scored):  # another process made them while this one waited
            return
        require_sound(sources.read, run.root, run.view.warn)
        merge = _merge(run, sources)
        fits = _SCORED_AS * merge.like.numel + merge.nbytes <= available_memory()
        if fits:
            _score(run, sources, merge, scored, remake)
    if not fits:
        fuse.make(run)


def _done(fused: Artifact, scored: Artifact) -> bool:
    return fused.has_weights or (fused.complete and scored.complete)


def _merge(run: Run, sources: fuse.Sources) -> MergeInMemory:
    inputs = fuse.open_inputs(run.artifacts, sources.groups, sources.backbone)
    method = fuse.method_of(run.config, inputs, sources.fused.work_dir, run.merging)
    method.statistics = _known_of(sources.fused, method.late)
    place, config = run.merging.placing(method) if run.merging else None, run.config
    return MergeInMemory(method, place, inputs.backbone, config.fusion.shard_size, config.resources.verify)


def _known_of(fused: Artifact, late: Sequence[str]) -> dict[str, Any]:
    """What is known already, or will be, of models that are fused with other values of `late` fields alone."""
    fields = {name: value for name, value in fused.fields.items() if name not in late}
    key = digest([dict(fused.inputs), fields])
    known = _KNOWN[key] = _KNOWN.pop(key, {})
    while len(_KNOWN) > _MOST_KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    return known


def _score(run: Run, sources: fuse.Sources, merge: MergeInMemory, scored: Artifact, remake: str) -> None:
    fused, title = sources.fused, fuse.title(run.artifacts)
    folder = _beside_weights(run, sources, merge)
    scoring = replace(evaluate.scoring(run, "fused", folder), merge=merge)
    changes = noted(model_files(folder))

    def keep(_: str, result: Evaluation) -> None:
        problems = changes()  # before the folder goes
        _complete(run, sources, folder, result["merged"], remake)
        keep_scores(scored, result, lambda: problems)

    run.begin(title)
    files = [file for read in sources.read for file in model_files(read)]
    try:
        with run.view.stage(f"{title} and its scores"), guarded_reads(fused.title, files):
            run.engine.evaluate([scoring], keep, run.view.progress)
    except BaseException:
        _KNOWN.clear()  # maybe of a file that changed meanwhile
        raise


def _beside_weights(run: Run, sources: fuse.Sources, merge: MergeInMemory) -> Path:
    """All that the model's folder has beside its weights."""
    folder = sources.fused.work_dir / "beside"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_index(merge.shards(), folder)
    copy_companions(merge.like, folder)
    fuse.write_beside(run.artifacts, sources, merge.method, folder)
    return folder


def _complete(run: Run, sources: fuse.Sources, folder: Path, made: MergeRecord, remake: str) -> None:
    fused, unwritten = sources.fused, Unwritten(made.files, remake)
    with fused.compared(run.view.warn), fused.build(device_name(), made.seconds, unwritten) as out:
        for path in sorted(folder.iterdir()):
            link_or_copy(path, out / path.name)
        write_json(out / fuse.FUSION_RECORD, {"tensors": made.tensors, "checks": made.checks})
        fuse.add_card(run, "fused", sources.groups, fused, out)
