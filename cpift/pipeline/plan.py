"""Before anything runs: what a run of a config will do and cost. Nothing is written here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpift.config.run import RunConfig
from cpift.data.use import RowFacts
from cpift.errors import entry
from cpift.models.sources import source_of
from cpift.pipeline.checks.idle import idle_notes
from cpift.pipeline.costs import FitCost, fit_costs, total_seconds
from cpift.pipeline.identity import StageArtifacts
from cpift.pipeline.preflight import trainings
from cpift.pipeline.stages import order
from cpift.pipeline.stages.step import Step

# Training state a parameter: float32 weight, gradient and AdamW's two moments.
TRAINING_BYTES = 16
# Of these the optimizer's, at most: two moments, in 8 bits each, of rows and columns alone.
_OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "adamw_8bit": 2, "adafactor": 0}
KEPT_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}  # of a parameter, by `model.dtype`


@dataclass(frozen=True)
class Plan:
    """What a run will do. Bytes; None where θ0 has not been seen yet."""

    steps: tuple[Step, ...]
    parameters: int | None
    core_size: int | None
    disk_needed: int | None
    disk_free: int
    memory_per_worker: int | None
    notes: tuple[str, ...]
    device: str = ""
    fits: tuple[FitCost, ...] = ()  # fine-tunes of the run itself
    rows: tuple[RowFacts, ...] = ()  # of each task in each fine-tune
    seconds: float | None = None  # of the fine-tunes that are to do; None where that was never measured here


def plan(
    artifacts: StageArtifacts, notes: Sequence[str] = (), beside: Iterable[Step] = (), rows: Sequence[RowFacts] = ()
) -> Plan:
    """The steps of a run in order, what is cached, and what it costs.

    notes, rows: of `preflight`. beside: the steps of what is made to compare with (see `compare.run_baselines`).
    """
    from cpift.method.regions import core_size

    config = artifacts.config
    from cpift.merging.planning import given_notes

    parameters = count_parameters(artifacts)
    steps = (*order.plan(artifacts), *beside)
    models = [name for name in _MODEL_STAGES if name != "fuse" or not config.fusion.as_lora]
    todo = sum(1 for step in steps if step.state not in ("cached", "given") and step.stage in models)
    width = entry(KEPT_BYTES, source_of(config.model).dtype, "model.dtype")
    parallel = config.resources.parallel or len(config.tasks)
    saves = any(training.checkpoint_every or training.checkpoint_minutes for training in trainings(config))
    checkpoints = parallel * _checkpoint_bytes(config) if saves else 0
    fits = fit_costs(artifacts, rows, parameters)
    return Plan(
        steps=steps,
        parameters=parameters,
        core_size=None if parameters is None else core_size(config.regions.p, parameters),
        disk_needed=None if parameters is None else parameters * (todo * width + (checkpoints if todo else 0)),
        disk_free=shutil.disk_usage(next(p for p in [artifacts.root, *artifacts.root.parents] if p.exists())).free,
        memory_per_worker=None if parameters is None or config.merges_only else _training_memory(config, parameters),
        notes=(*_notes(config), *given_notes(config), *notes),
        device=_device(config),
        fits=tuple(fits),
        rows=tuple(rows),
        seconds=total_seconds(config, [fit for fit in fits if _waits(steps, fit)]),
    )


def _waits(steps: Iterable[Step], fit: FitCost) -> bool:
    """Whether a fine-tune is still to be done."""
    done = ("cached", "given")
    return not any(step.state in done for step in steps if (step.stage, step.label) == (fit.stage, fit.label))


def _device(config: RunConfig) -> str:
    asked = config.resources
    share = (
        f"{asked.gpus_per_worker:g} GPU"
        if asked.gpus_per_worker
        else f"CPU, {asked.threads} thread{'s' * (asked.threads != 1)}"
    )
    return f"{share} a worker, {asked.workers} worker{'s' * (asked.workers != 1)} a fine-tune"


def _training_memory(config: RunConfig, parameters: int) -> int:
    """Bytes a worker, in the fine-tune that takes most; FSDP2 shares them out."""
    shards = config.resources.workers if config.resources.sharded else 1
    each = [
        TRAINING_BYTES - 8 + entry(_OPTIMIZER_BYTES, fit.optimizer, "optimizer") + (4 if fit.ema else 0)
        for fit in trainings(config)
    ]
    return parameters * max(each, default=TRAINING_BYTES) // shards


def _checkpoint_bytes(config: RunConfig) -> int:
    """Of a parameter, where most is kept: weights and moments in float32, an average, the best weights."""
    return max((12 + 4 * bool(fit.ema) + 4 * (fit.keep == "best") for fit in trainings(config)), default=12)


_MODEL_STAGES = ("model", "probe", "backbone", "fuse", "integrate")


def _notes(config: RunConfig) -> Iterator[str]:
    from cpift.merging.on_device import foretold
    from cpift.method.groups import chance_level

    if config.fusion.isolates or not config.merges_only:  # else nothing is grouped
        chance, tau = chance_level(config.regions.p), config.groups.tau
        yield f"chance level of the Jaccard overlap at this p: {chance:.4g}"
        if tau is not None and tau <= chance:
            yield f"τ = {tau:g} is not above it: unrelated tasks will be grouped"
    yield from idle_notes(config)
    if said := foretold(config):
        yield said
    if loose := list(dict.fromkeys(_unpinned(config))):
        yield f"`revision` is no commit hash for {', '.join(loose)}: a later run may get something else; pin it"


def _unpinned(config: RunConfig) -> Iterator[str]:
    """Hub repositories of which whatever is newest would be taken."""
    from cpift.hub import is_commit

    inputs = [config.model, *(origin for task in config.tasks for origin in (task.checkpoint, *task.sources))]
    yield from (origin.hub for origin in inputs if origin is not None and origin.hub and not is_commit(origin.revision))
    source = config.backbone.source
    if source not in ("staged", "pretrained") and not Path(source).is_dir() and not is_commit(config.backbone.revision):
        yield source


def count_parameters(artifacts: StageArtifacts) -> int | None:
    """Number of parameters of θ0, or of a merged model with other layers or tokens, tied tensors once, from headers
    alone; None if that needs a download."""
    from cpift.checkpoints.checkpoint import Checkpoint
    from cpift.merging.stacks.planning import merged_numel

    if artifacts.config.fusion.slices or artifacts.config.fusion.by_tokens:
        return merged_numel(artifacts.config)
    if not artifacts.in_place and artifacts.model.complete:
        return Checkpoint(artifacts.model.path).numel
    return source_of(artifacts.config.model).parameters()
