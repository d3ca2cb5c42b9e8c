"""A fused model that is only scored: merged in memory where it is scored, and never written.

Its output is complete without weights, as one whose weights were dropped: files beside them, records, and the hashes
that the weights' files would have. When they are written after all, they are known to be those that were scored, or a
warning says that they are not; only then is every core compared with its donor.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import model_files, open_merged, quick_fingerprint
from cpift.checkpoints.writing import copy_companions, write_index
from cpift.devices import device_name
from cpift.disk.artifacts import Artifact, Unwritten, claimed, require_sound
from cpift.disk.files import digest, link_or_copy, write_json
from cpift.disk.guarded import guarded_reads
from cpift.disk.input_watch import noted
from cpift.evaluation.scores import Evaluation
from cpift.formats.sizes import available_memory
from cpift.merging.in_memory import MergeInMemory, MergeRecord
from cpift.merging.registry import METHODS
from cpift.merging.resident.residents import MAPPED, identity
from cpift.pipeline.engine import Scoring, keep_scores
from cpift.pipeline.run import Run, unless_damaged
from cpift.pipeline.stages import evaluate, fuse, probe
from cpift.pipeline.stages import model as pretrained
from cpift.pipeline.stages.names import ModelRef
from cpift.text.units import show_size

_SCORED_AS = 4  # bytes a weight while it is scored: float32
_MOST_KNOWN = 8
# What the last fusions of this process found out about their models, by what that follows from: points that differ in
# ω alone read them for it once.
_KNOWN: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class ToScore:
    """A run whose fused model is only scored. title: on the screen. remake: the command that writes its weights."""

    run: Run
    title: str
    remake: str


@dataclass(frozen=True)
class _Model:
    """One of them, all that it is made from being there."""

    wanted: ToScore
    sources: fuse.Sources
    scored: Artifact

    @property
    def done(self) -> bool:
        fused = self.sources.fused
        return fused.has_weights or (fused.complete and self.scored.complete)


Merge: TypeAlias = tuple[_Model, MergeInMemory]


def score_fused(run: Run, remake: str) -> None:
    """Have the fused model scored without writing it; what comes before is made if it is not there.

    Nothing is done where it has its scores, or its weights are on the disk already. Where memory has no room for it, it
    is written. remake: the command that writes its weights.
    """
    score_each(run, [ToScore(run, "fused", remake)])


@dataclass(frozen=True)
class Kept:
    """Bytes that a worker may keep of the models of all points, 0 for none; what is taken and why, in a sentence, and
    the reason alone. models, tasks: of all points, where their files decide what they are."""

    held: int = 0
    why: str = ""
    short: str = ""
    models: Sequence[Checkpoint] = ()
    tasks: int = 0


def kept_between_points(runs: Sequence[Run], workers: int) -> Kept:
    """What each of so many workers may keep, where the models are there to be looked at. runs: of each seed."""
    config, models, tasks = runs[0].config, dict[Any, Checkpoint](), 0
    resources, method = config.resources, METHODS.get(config.fusion.method)  # what users bring reads as it likes
    for run in runs if method is not None and not method.needs_moments else ():
        folders = {task: probed.path for task, probed in probe.tuned(run.artifacts).items()}
        base, tasks = pretrained.base(run.artifacts).path, len(folders)
        if not all(one.is_dir() for one in (base, *folders.values())):
            return Kept()
        opened, tuned = open_merged(base, folders, config.fusion)
        models |= {identity(one): one for one in (opened, *tuned.values())}
    if not models:
        return Kept()
    if None in models:
        return Kept(why="Models are read anew for every point: more than their files decides what they are")
    known = Kept(models=list(models.values()), tasks=tasks)
    if resources.device != "cpu" and resources.gpus_per_worker:
        where = "Models stay on the trials' GPUs from point to point, where these have room for them"
        return replace(known, held=1, why=where)
    need, budget, free = MAPPED.needs(known.models, tasks), resources.memory_budget, room_here()
    said = f"{show_size(need)} in each of {workers} workers"
    short = ""
    if need > budget:
        short = f"more than resources.memory_budget ({show_size(budget)})"
    elif need * workers > free:
        short = f"more than half of what is free ({show_size(free)})"
    if short:
        short = f"{said} would be {short}"
        return replace(known, why=f"Models are read anew for every point: {short}", short=short)
    return replace(known, held=budget, why=f"Models stay in memory from point to point: {said}, beside mapped files")


def room_here() -> int:
    """Bytes of this machine's memory that models may take."""
    return available_memory() // 2


def forget() -> None:
    """Drop what this process knows of the models of earlier fusions."""
    _KNOWN.clear()


@unless_damaged
def score_each(lead: Run, wanted: Sequence[ToScore]) -> None:
    """`score_fused` of several, no two the same, side by side as the engine of `lead` scores and memory has room."""
    models = [model for model in map(_model, wanted) if not model.done]
    if not models:
        return
    large = list[_Model]()
    with claimed((one for model in models for one in (model.sources.fused, model.scored)), lead.view.warn):
        models = [model for model in models if not model.done]  # others were made while this one waited
        for model in models:
            require_sound(model.sources.read, model.wanted.run.root, lead.view.warn)
        for batch in _batches([(model, _merge(model.wanted.run, model.sources)) for model in models], large):
            _score(lead, batch)
    for model in large:
        fuse.make(model.wanted.run)


def _model(wanted: ToScore) -> _Model:
    run, sources = wanted.run, fuse.prepare(wanted.run)
    return _Model(wanted, sources, evaluate.artifact(run.artifacts, ModelRef.of("fused", sources.fused)))


def _batches(merges: Iterable[Merge], large: list[_Model]) -> Iterator[dict[str, Merge]]:
    """By title, as many as memory holds at once; `large` is given those that it has no room for."""
    batch: dict[str, Merge] = {}
    room = available = available_memory()
    for model, merge in merges:
        need = _SCORED_AS * merge.like.numel + merge.nbytes
        if need > available:
            large.append(model)
            continue
        if need > room:
            yield batch
            batch, room = {}, available
        batch[model.wanted.title] = model, merge
        room -= need
    if batch:
        yield batch


def _merge(run: Run, sources: fuse.Sources) -> MergeInMemory:
    inputs = fuse.open_inputs(run.artifacts, sources.groups, sources.backbone)
    method = fuse.method_of(run.config, inputs, sources.fused.work_dir, run.merging)
    method.known_as, method.statistics = _known_of(sources.fused, method.late)
    place, config = run.merging.placing(method) if run.merging else None, run.config
    return MergeInMemory(method, place, inputs.backbone, config.fusion.shard_size, config.resources.verify)


def _known_of(fused: Artifact, late: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What is known already, or will be, of models that are fused with other values of `late` fields alone; and a name
    of that."""
    fields = {name: value for name, value in fused.fields.items() if name not in late}
    key = digest([dict(fused.inputs), fields])
    known = _KNOWN[key] = _KNOWN.pop(key, {})
    while len(_KNOWN) > _MOST_KNOWN:
        del _KNOWN[next(iter(_KNOWN))]
    return key, known


def _score(lead: Run, batch: Mapping[str, Merge]) -> None:
    folders = {title: _beside_weights(model, merge) for title, (model, merge) in batch.items()}
    scorings = [_scoring(title, model, merge, folders[title]) for title, (model, merge) in batch.items()]
    changes = {title: noted(model_files(folder)) for title, folder in folders.items()}

    def keep(title: str, result: Evaluation) -> None:
        model, problems = batch[title][0], changes[title]()  # before the folder goes
        _complete(model, folders[title], result["merged"])
        keep_scores(model.scored, result, lambda: problems)

    titles = []
    for model, _ in batch.values():
        titles.append(fuse.title(model.wanted.run.artifacts))
        model.wanted.run.begin(titles[-1])
    files = {file for model, _ in batch.values() for read in model.sources.read for file in model_files(read)}
    said = f"{titles[0]} and its scores" if len(batch) == 1 else f"{len(batch)} fusions and their scores"
    try:
        with lead.view.stage(said, list(batch)), guarded_reads(", ".join(batch), sorted(files)):
            lead.engine.evaluate(scorings, keep, lead.view.progress)
    except BaseException:
        forget()  # maybe what a file was before it changed
        raise


def _scoring(title: str, model: _Model, merge: MergeInMemory, folder: Path) -> Scoring:
    """What a kill leaves of its rows is named by what the model is made of."""
    made_of = [model.sources.fused.fingerprint, *map(quick_fingerprint, model.sources.read)]
    kept = model.scored.work_dir / "results" / digest(made_of)[:16]
    return replace(evaluate.scoring(model.wanted.run, title, folder, kept), merge=merge)


def _beside_weights(model: _Model, merge: MergeInMemory) -> Path:
    """All that the model's folder has beside its weights."""
    run, sources = model.wanted.run, model.sources
    folder = sources.fused.work_dir / "beside"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_index(merge.shards(), folder)
    copy_companions(merge.like, folder)
    fuse.write_beside(run.artifacts, sources, merge.method, folder)
    return folder


def _complete(model: _Model, folder: Path, made: MergeRecord) -> None:
    run, sources = model.wanted.run, model.sources
    fused, unwritten = sources.fused, Unwritten(made.files, model.wanted.remake)
    with fused.compared(run.view.warn), fused.build(device_name(), made.seconds, unwritten) as out:
        for path in sorted(folder.iterdir()):
            link_or_copy(path, out / path.name)
        write_json(out / fuse.FUSION_RECORD, {"tensors": made.tensors, "checks": made.checks})
        fuse.add_card(run, "fused", sources.groups, fused, out)
