"""Python: what the commands do, as functions. Names here are `cpift`'s own: `cpift.regions`, `cpift.merge`, ….

Nothing prints unless `progress` is set, no signal handler is installed, and no process is ended: scripts, notebooks and
servers keep theirs. Every error is a `CpiftError` that names field, value and remedy.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config import loading as config_loading
from cpift.config.code import code_lines
from cpift.config.loading import Fields
from cpift.config.paths import is_path
from cpift.config.run import RunConfig
from cpift.console.view import View, quiet
from cpift.disk.files import folder_made
from cpift.errors import ConfigError, Problem
from cpift.merge_folder import MergeResult, merge_config, merge_into, place_of, work_of
from cpift.merging.options import MergeFields, MethodFields, RegionFields
from cpift.method.cores import Cores, Origin, write_origin
from cpift.pipeline.plan import Plan

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from cpift.checkpoints.lora_extraction import Extraction
    from cpift.merging.engine import Merging
    from cpift.model_diff import ModelDiff
    from cpift.pipeline.engine import Engine

StrPath = str | os.PathLike[str]
ShowProgress = bool | View  # False: nothing is shown; True: a view on standard error


@dataclass(frozen=True)
class RunResult:
    """What a run made. `scores`: by model and task, each with `loss`, `metric`, `score` and more."""

    scores: Mapping[str, Mapping[str, Any]] = field(repr=False)
    model: Path  # the final model, a folder that transformers loads
    report: Path  # one HTML page
    models: Mapping[str, Path] = field(repr=False)  # θ0, every probe, backbone, fused and final model
    output: Path
    cached: bool  # whether nothing had to be made


def load_config(config: StrPath, **overrides: Any) -> RunConfig:
    """A run's YAML file, read and checked; `overrides` are fields of it.

    A section's fields are given as a mapping (`regions={"p": 0.02}`) or by dotted name (`**{"regions.p": 0.02}`).
    Relative paths in the file start from its folder, those of overrides from the working directory. Raises ConfigError.
    """
    if not isinstance(config, (str, os.PathLike)):
        what = f"is a {type(config).__name__}, not a path"
        raise ConfigError("config", [Problem("config", what, "give a run's YAML file")])
    return config_loading.load_config(Path(config), changes=given_changes(overrides))


def plan(config: StrPath | RunConfig, **overrides: Any) -> Plan:
    """What `run` would do and cost: every stage, what is cached, memory, disk. Nothing is written.

    Raises ConfigError with everything that would stop the run.
    """
    loaded = _loaded(config, overrides)
    from cpift.compare.run_baselines import plan_all
    from cpift.pipeline.identity import StageArtifacts
    from cpift.pipeline.preflight import examined

    seen = examined(loaded, stage=None, download=False)
    return plan_all(StageArtifacts(loaded), seen.notes, seen.rows)


def run(
    config: StrPath | RunConfig, *, progress: ShowProgress = False, in_process: bool = False, **overrides: Any
) -> RunResult:
    """Make every stage of a run that is not there yet, and its report; `overrides` as in `load_config`.

    Fine-tunes run on Ray, started here or at RAY_ADDRESS; in_process: one after another in this process, without Ray.
    Interrupted or failed, the same call goes on. Raises ConfigError before anything starts, StageError if one fails.
    """
    loaded = _loaded(config, overrides)
    from cpift.compare.run_baselines import OF_RUNS
    from cpift.pipeline.pipeline import Pipeline
    from cpift.pipeline.preflight import preflight
    from cpift.pipeline.report import report
    from cpift.pipeline.session import at_work

    view = _view(progress)
    for line in code_lines(loaded):
        view.note(line)
    preflight(loaded, stage="run")
    with _undisturbed(in_process):
        pipeline = Pipeline(loaded, _engine(loaded, in_process), view, baselines=OF_RUNS)
        with at_work(pipeline, "run"):
            page = report(pipeline).page
            models = {model.title: model.path for model in pipeline.models()}
            scores = pipeline.evaluate()
    return RunResult(scores, models["final"], page, models, pipeline.root, not pipeline.worked)


def regions(
    base: StrPath,
    models: Mapping[str, StrPath],
    *,
    out: StrPath | None = None,
    **fields: Unpack[RegionFields],
) -> Cores:
    """Core regions of fine-tunes of `base`: the ⌊p·D⌋ elements that each moved most (p = 0.01 if not given).

    base, models: model folders, LoRA adapters' folders, or hub ids (`org/name@revision`), by task name. out: a new
    folder that the masks are streamed into, for models whose masks (D/8 bytes a task) are not to be held in memory.
    Raises ConfigError and CheckpointError for inputs that do not fit.
    """
    place = None if out is None else Path(out).expanduser().absolute()
    if place is not None and os.path.lexists(place):
        raise ConfigError("regions", [Problem("out", f"{place} exists already", "give a folder that is not there")])
    where = (place or Path(tempfile.gettempdir()) / "cpift").with_suffix(".regions")
    config = merge_config(base, models, where, fields)
    from cpift.checkpoints.checkpoint import Checkpoint
    from cpift.checkpoints.opening import open_models
    from cpift.merging.on_device import device_merging
    from cpift.method.measures import measure_named
    from cpift.method.moments import open_moments
    from cpift.method.regions import Streaming, select_regions, write_regions
    from cpift.pipeline.identity import StageArtifacts
    from cpift.pipeline.preflight import preflight
    from cpift.pipeline.stages.probe import moments as moment_files

    preflight(config, stage="regions")
    artifacts = StageArtifacts(config)
    folders = {task: model.path for task, model in artifacts.tuned.items()}
    pretrained, tuned = open_models(artifacts.base.path, folders, config.fusion.fitted)
    shapes = {info.name: tuple(info.shape) for info in pretrained.tensors.values()}
    fingerprints = {task: model.fingerprint for task, model in artifacts.tuned.items()}
    origin = Origin(artifacts.base.fingerprint, fingerprints, config.regions, shapes)
    models_read: list[Checkpoint] = [pretrained, *tuned.values()]
    merging = device_merging(config.resources)
    needed = measure_named(config.regions.measure).needs_moments
    moments = open_moments(moment_files(artifacts) if needed else {}, pretrained)
    models_read += moments.values()
    mark = merging.mark if merging else None
    streaming = Streaming(budget=config.resources.memory_budget, mark=mark, moments=moments)
    if place is None:
        selected = Cores(select_regions(pretrained, tuned, config.regions, streaming), origin)
        for model in models_read:
            model.require_unchanged()
        return selected
    with folder_made(place) as partial:
        write_regions(pretrained, tuned, config.regions, {config.regions.p: partial}, streaming)
        for model in models_read:
            model.require_unchanged()
        write_origin(origin, partial)
    return Cores.load(place)


def merge(
    base: StrPath,
    models: Mapping[str, StrPath],
    out: StrPath,
    *,
    cores: Cores | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: ShowProgress = False,
    **fields: Unpack[MergeFields],
) -> MergeResult:
    """Merge fine-tunes of `base` into a model folder at `out`, with tokenizer, chat template and generation config.

    base, models: as in `regions`. method: `cpift` transplants core regions into the backbone and SLERPs the rest (the
    paper); or `linear`, `task_arithmetic`, `slerp`, `ties`, `dare`. cores: of the same models, selected before.
    settings: any field of a run by its dotted name. What exists at `out` is never replaced; the same merge again finds
    itself there. Partial work lies beside it in `.NAME.merge`, and the same call goes on from it after a kill.
    """
    place = place_of(out)
    config = merge_config(base, models, work_of(place), _with_cores(dict(fields), cores), settings)
    return merge_into(config, place, _view(progress), _merging(config), cores)


def extract_lora(
    base: StrPath, tuned: StrPath, out: StrPath, *, rank: int = 32, progress: ShowProgress = False
) -> Extraction:
    """What a fine-tune changed as a PEFT adapter of `rank` at `out`; the result says what the rank lost, by module.

    base, tuned: model folders or hub ids. What exists at `out` is never replaced. Raises ConfigError and
    CheckpointError.
    """
    from cpift.adapter_folder import extract_into

    return extract_into(base, tuned, out, rank, _view(progress))


def diff(base: StrPath, tuned: StrPath, *, vocabulary: str = "error", progress: ShowProgress = False) -> ModelDiff:
    """What a fine-tune changed: by tensor and by layer × module how many elements, the largest |Δ|, its L2.

    base: a model folder or hub id; tuned: the same, or a LoRA adapter. vocabulary: `base` compares the tokens that
    `base` has where `tuned` has others. Both are read once, in slices. Raises ConfigError and CheckpointError.
    """
    from cpift.model_diff import model_diff

    return model_diff(base, tuned, vocabulary, _view(progress))


def merge_state_dicts(
    base: Mapping[str, torch.Tensor],
    models: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    backbone: Mapping[str, torch.Tensor] | None = None,
    **fields: Unpack[MethodFields],
) -> dict[str, torch.Tensor]:
    """`merge` in memory: state dicts in, a new state dict out, with the names, dtypes and devices of `base`.

    The same bytes as `merge` writes. backbone: what cores are transplanted into, if not `base`. Tensors that share
    storage in every model are merged once, and share it again. Computed on the CPU. Raises CheckpointError for models
    that do not fit, ConfigError for fields that do not.
    """
    from cpift.merging.state_dicts import merge_dicts

    return merge_dicts(base, models, backbone, fields)


def _with_cores(fields: Fields, cores: Cores | None) -> Fields:
    """The fields of a merge with those that its cores were selected by. Raises ConfigError where they contradict."""
    if cores is None:
        return fields
    if not isinstance(cores, Cores):
        what = f"is a {type(cores).__name__}, not the Cores of several models"
        raise ConfigError("merge", [Problem("cores", what, "give what cpift.regions returns")])
    selected = cores.origin.fields.model_dump(mode="json")
    problems = [
        Problem(name, f"is {fields[name]!r}, and the cores were selected with {value!r}", "leave it out, or `cores`")
        for name, value in selected.items()
        if name in fields and _listed(fields[name]) != value
    ]
    if fields.get("method", "cpift") != "cpift":
        problems.append(Problem("cores", f"are not used by method {fields['method']}", "leave them out"))
    if problems:
        raise ConfigError("merge", problems)
    return fields | selected


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _loaded(config: StrPath | RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    if isinstance(config, RunConfig):
        return config_loading.with_fields(config, given_changes(overrides), config.name) if overrides else config
    return load_config(config, **overrides)


def given_changes(overrides: Mapping[str, Any], before: str = "") -> Fields:
    """Fields by dotted name; a mapping sets fields of its section, and paths are meant from the working directory."""
    changes: Fields = {}
    for name, value in overrides.items():
        field = f"{before}{name}"
        if isinstance(value, Mapping) and field not in _MAPPINGS:
            changes |= given_changes(value, f"{field}.")
        elif isinstance(value, os.PathLike) or (isinstance(value, str) and is_path(field)):
            path = Path(os.fspath(value)).expanduser()
            changes[field] = str(path.absolute()) if isinstance(value, os.PathLike) or path.exists() else value
        else:
            changes[field] = list(value) if isinstance(value, tuple) else value
    return changes


_MAPPINGS = {
    "fusion.weights",
    "fusion.into",
    "fusion.densities",
    "model.chat_template_kwargs",
}  # whose keys are no fields


def _view(progress: ShowProgress) -> View:
    return progress if isinstance(progress, View) else View() if progress else quiet()


def _engine(config: RunConfig, in_process: bool) -> Engine:
    if in_process:
        from cpift.merging.on_device import device_merging
        from cpift.pipeline.inprocess import InProcessEngine

        return InProcessEngine(device_merging(config.resources))
    from cpift.cluster.engine import RayEngine

    return RayEngine(config)


def _merging(config: RunConfig) -> Merging | None:
    from cpift.cluster.choice import merging_for

    return merging_for(config.resources)


@contextmanager
def _undisturbed(in_process: bool) -> Iterator[None]:
    """Around training in the caller's process: torch's threads are its own again after it, libraries print nothing."""
    if not in_process:
        yield
        return
    import torch
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' own, of arguments that are to be renamed
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()
