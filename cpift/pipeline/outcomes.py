"""What becomes of a run that is one of several: the models and scores it ends with, made or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cpift.disk.artifacts import Artifact
from cpift.disk.files import MANIFEST, digest, file_sha256, read_json, write_json
from cpift.errors import entry
from cpift.evaluation.scores import Score, read_scores
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import order
from cpift.pipeline.stages.names import NOTHING, ModelRef

if TYPE_CHECKING:
    from cpift.evaluation.standard import Benchmarks

_BENCHMARKS = "benchmarks.json"
INTEGRATES = {"final": True, "fused": False}  # the judged model → whether a run integrates for it


def _own(model: str) -> tuple[str, ...]:
    """The stages that a trial goes through for itself."""
    return order.LAST if entry(INTEGRATES, model, "model") else order.LAST[:1]


def outcome(run: Pipeline, model: str) -> Artifact:
    """The scores of a run's final (or fused) model: an artifact that names everything they depend on."""
    return run.artifacts.evaluate(ModelRef.of(model, own_models(run, model)[model]))


def own_models(run: Pipeline, model: str) -> dict[str, Artifact]:
    """The models that a trial makes for itself, made or not: fused, and where `model` says so final."""
    known = run.known()
    titles = [own.title for own in order.models(run.artifacts, known, *_own(model))]
    return dict(zip(titles, order.outputs(run.artifacts, known, *_own(model)).values(), strict=True))


def shared_models(run: Pipeline) -> list[ModelRef]:
    """θ0 and the probes."""
    return order.models(run.artifacts, NOTHING, "model", "probe")


def trial_models(run: Pipeline, model: str) -> list[ModelRef]:
    """The models that differ from trial to trial: the backbone, the fused and, where `model` says so, the final one."""
    return order.models(run.artifacts, run.known(), "backbone", *_own(model))


def scored_models(run: Pipeline, model: str) -> list[ModelRef]:
    """Every model that a trial with this judged model scores, in the report's order, made or not."""
    return shared_models(run) + trial_models(run, model)


def scores_of(run: Pipeline, models: Sequence[ModelRef]) -> dict[str, dict[str, Score]]:
    """Scores by model and task, which must be there."""
    return {model.title: read_scores(run.artifacts.evaluate(model).path) for model in models}


def known_scores(run: Pipeline, model: str) -> dict[str, dict[str, Score]] | None:
    """Scores by model and task of a trial that has made them all, be its models' weights there or dropped."""
    models = scored_models(run, model)
    needed = [*own_models(run, model).values(), *map(run.artifacts.evaluate, models)]
    return scores_of(run, models) if all(artifact.complete for artifact in needed) else None


# ---- standard benchmarks ---------------------------------------------------------------------------------------------


def benchmarked(run: Pipeline, model: str, wanted: Benchmarks) -> Artifact:
    """lm-eval's figures of a run's final (or fused) model, made or not: named by the model, what is run of it, and
    lm-eval's release, for that decides prompts and metrics. Finished figures of an earlier cpift, which named none,
    count for every release; where lm-eval is not installed, those of any release do."""
    fields = asdict(wanted) | {"tasks": list(wanted.tasks), "folder": None}
    inputs = {"model": own_models(run, model)[model].fingerprint}
    if wanted.folder is not None:
        files = sorted(path for path in wanted.folder.rglob("*") if path.is_file())
        inputs["task files"] = digest([[str(path.relative_to(wanted.folder)), file_sha256(path)] for path in files])

    def of(**release: str) -> Artifact:
        return run.artifacts.artifact("evaluate", 1, inputs, fields | release, f"{model}-benchmarks")

    try:
        named, others = of(lm_eval=metadata.version("lm_eval")), [of()]
    except metadata.PackageNotFoundError:
        named = of()
        others = [of(lm_eval=release) for release in _releases(named.path.parent)]
    return next((one for one in (named, *others) if one.complete), named)


def _releases(folder: Path) -> list[str]:
    """The releases of lm-eval that figures in a folder are of, the last first."""
    fields = [read_json(manifest)["fields"] for manifest in folder.glob(f"[!.]*/{MANIFEST}")]
    return sorted({one["lm_eval"] for one in fields if "lm_eval" in one}, reverse=True)


def benchmark_figures(run: Pipeline, model: str, wanted: Benchmarks | None) -> dict[str, float]:
    """By name, `benchmark.TASK.METRIC`, the figures that are there; none where no benchmark is wanted."""
    scored = None if wanted is None else benchmarked(run, model, wanted)
    if scored is None or not scored.complete:
        return {}
    found: dict[str, dict[str, float | None]] = read_json(scored.path / _BENCHMARKS)
    return {
        f"benchmark.{task}.{name}": value
        for task, figures in found.items()
        for name, value in figures.items()
        if value is not None
    }


def score_benchmarks(run: Pipeline, model: str, wanted: Benchmarks) -> None:
    """Make lm-eval's figures of a run's model, which is made for it where its weights are not there."""
    from cpift.evaluation.standard import standard_scores

    scored = benchmarked(run, model, wanted)
    if scored.complete:
        return
    made = run.integrate() if entry(INTEGRATES, model, "model") else run.fuse()

    def build(out: Path) -> None:
        write_json(out / _BENCHMARKS, standard_scores({model: made.path}, wanted)[model])

    run.make(scored, "benchmarks", build, [made.path])
