"""Before anything runs: all of a config that can be checked cheaply, in one message. Nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cpift.config.needs import NEEDS, missing, trained_in
from cpift.config.paths import texts
from cpift.config.run import RunConfig, TaskConfig, TrainingConfig
from cpift.disk.locks import check_lock
from cpift.disk.top_files import RUN_FILES, SWEEP_FILES, check_top
from cpift.errors import CheckpointError, ConfigError, DataError, Problem

if TYPE_CHECKING:
    from cpift.pipeline.row_checks import RowChecks


def preflight(
    config: RunConfig, *, stage: str | None = None, download: bool = True, writes: Sequence[str] | None = None
) -> list[str]:
    """Check everything that can be checked cheaply: what `stage` needs, data rows, model files, the output folder.

    Returns what is worth knowing and no problem; see `examined`.
    """
    return examined(config, stage=stage, download=download, writes=writes).notes


def examined(
    config: RunConfig, *, stage: str | None = None, download: bool = True, writes: Sequence[str] | None = None
) -> RowChecks:
    """`preflight`, and what was seen of the rows.

    Hub data sets are downloaded to look at their rows, unless `download` is False. `writes`: the files that the command
    writes at the top of the output folder, if not those of its stage. Raises ConfigError with every problem found.
    """
    from cpift.data.kept_rows import kept_rows
    from cpift.data.shared_rows import SharedRows
    from cpift.evaluation.checks import check_task
    from cpift.merging.on_device import check_device
    from cpift.merging.planning import check_budget, check_given, check_methods
    from cpift.models.sources import check_model, read_ahead
    from cpift.pipeline.row_checks import RowChecks, ask_ahead, check_written
    from cpift.pipeline.stages.parents import check_parent
    from cpift.training.tracking import check_trackers

    problems, models = [*missing(config, stage), *check_methods(config, stage)], check_model(config.model)
    problems += _check_names(config) + check_device(config)
    if not problems and not models:
        models += check_given(config)
    problems += models
    if not models:  # these open what was looked at
        problems += check_budget(config) if stage not in _BEFORE_FUSION else []
        problems += _check_class(config, stage)
    if not problems:
        problems += _check_space(config, stage)
    problems += [] if problems else _check_moments(config, stage)
    problems += check_trackers(config.tracking) + _check_machine(config)
    folder = _check_store(config) or _check_output(config.output_dir)
    problems += _check_backbone(config) + folder
    if not folder:
        problems += check_top(config.output_dir, _written(config, stage) if writes is None else writes)
        problems += check_lock(config.output_dir)
    reading = None if problems or config.merges_only else read_ahead(config.model)  # while rows are looked at
    if not problems:
        problems += check_parent(config, stage)
    if not problems:
        ask_ahead(config, stage)
    shared = SharedRows()
    with kept_rows():
        for split in ("test", "train"):
            for task in config.every_task:
                problems += check_task(task, download=download, splits=(split,), see=shared.see)
        for task in config.every_task:
            problems += check_task(task, download=download, splits=("validation",))
            problems += [] if problems else _check_held_out(config, task, stage, download)
        written = RowChecks() if problems else check_written(config, stage, download)
    if problems := [*problems, *written.problems]:
        raise ConfigError(f"run {config.name}", problems)
    if reading is not None:
        reading.join()
    written.notes = [*written.notes, *shared.notes()]
    return written


def field_problems(config: RunConfig, stage: str | None) -> list[Problem]:
    """What of a run's fields cannot be done, whatever its rows hold: asked of every point of a sweep and every method
    of a comparison, whose run itself was `examined`."""
    from cpift.checkpoints.opening import at_hand
    from cpift.merging.on_device import check_device
    from cpift.merging.planning import check_budget, check_methods
    from cpift.training.tracking import check_trackers

    problems = [*missing(config, stage), *check_methods(config, stage), *check_device(config)]
    if not problems:
        problems += check_budget(config) if stage not in _BEFORE_FUSION else []
        problems += [*_check_space(config, stage), *_check_moments(config, stage)]
    problems += _check_trained(config, at_hand(config.model))
    return problems + check_trackers(config.tracking) + _check_machine(config) + _check_backbone(config)


def _check_held_out(config: RunConfig, task: TaskConfig, stage: str | None, download: bool) -> Iterator[Problem]:
    """Whether a task has as many rows as its fine-tunes hold out, and others."""
    from cpift.data.tasks import read_examples

    for section, training in trained_in(config, task, stage).items():
        source = task.watched_rows(training) if task.validation is None and task.train is not None else None
        if source is None or (source.hub is not None and not download):
            continue
        try:
            next(read_examples(source), None)
        except DataError as error:
            for problem in error.problems:
                where = f"{section}.{problem.where}".replace("holdout.", "validation.")
                yield Problem(f"{where} of task {task.name}", problem.what, problem.remedy)


def _check_names(config: RunConfig) -> list[Problem]:
    """Paths are written into records, which are UTF-8; a name that is none could be read, and not be written down."""
    fields = {name: str(section[key]) for section, key, name in texts(config.model_dump(mode="json"))}
    fields["output"] = str(config.output_dir)
    what = "has a name that is no UTF-8, and records of the run would hold it"
    remedy = "rename the folder, or set a locale with UTF-8 (LC_ALL=C.UTF-8) if it was typed in UTF-8"
    return [
        Problem(field, f"{value!a} {what}", remedy)
        for field, value in fields.items()
        if any("\ud800" <= sign <= "\udfff" for sign in value)
    ]


_BEFORE_FUSION = ("probe", "regions", "group")
_WRITES = {
    "report": RUN_FILES,
    "run": RUN_FILES,
    "sweep fused": SWEEP_FILES,
    "sweep final": SWEEP_FILES,
}


def _written(config: RunConfig, stage: str | None) -> tuple[str, ...]:
    """The files that a stage writes at the top of the output folder; of a plan, those of the run it is for."""
    if stage is None:
        ends = config.integration is not None and all(task.train and task.source("test") for task in config.tasks)
        return RUN_FILES if ends else ()
    return _WRITES.get(stage, ())


def _check_class(config: RunConfig, stage: str | None) -> list[Problem]:
    """Whether transformers loads θ0 and can train it; one on the hub once it has been downloaded."""
    from cpift.checkpoints.checkpoint import Checkpoint
    from cpift.checkpoints.layout import unloadable, unwritable
    from cpift.checkpoints.opening import at_hand
    from cpift.pretrained.architecture import untrainable

    integrates = NEEDS[stage or "evaluate"].integrates_of(config)
    where, trains = f"model.{config.model.kind}", integrates or not config.merges_only
    folder = at_hand(config.model)
    if folder is None or (stage in _BEFORE_FUSION and not trains):
        return _check_trained(config, folder) if trains else []
    try:
        model = Checkpoint(folder)
    except CheckpointError:
        return []  # `check_model` and `check_given` say what is wrong with it
    problems = [*untrainable(model.folder, where), *_check_trained(config, model.folder)] if trains else []
    problems = problems or unloadable(model, where)
    return problems or (unwritable(model, where) if trains else [])


def _check_machine(config: RunConfig) -> list[Problem]:
    from cpift.training.possible import missing_here

    asked, tasks = config.resources, [config.resources.overridden(task.resources) for task in config.tasks]
    on_gpus = all(resources.gpus_per_worker for resources in (asked, *tasks))
    return missing_here(trainings(config), "cuda" if on_gpus else "cpu")


def _check_trained(config: RunConfig, folder: Path | None) -> list[Problem]:
    """What the class of θ0 does not do in a fine-tune. folder: θ0's; None where it is made, or not here yet."""
    from cpift.models.scratch import write_scratch_config
    from cpift.training.possible import impossible

    fits = {"probe": config.probe, "backbone": config.backbone.training, "integration": config.integration}
    asking = {section: training for section, training in fits.items() if training is not None}
    with TemporaryDirectory() as made:
        asks = [training for training in asking.values() if training.lora or training.attention != "auto"]
        if folder is None and config.model.scratch is not None and asks:  # of all else it is known to do it
            folder = Path(made)
            write_scratch_config(config.model.scratch, folder)
        return [
            problem
            for section, training in asking.items()
            for problem in (impossible(folder, training, section) if folder is not None else [])
        ]


def _check_space(config: RunConfig, stage: str | None) -> list[Problem]:
    """Whether the patterns leave any parameter of θ0, where its names are known before it is made."""
    from cpift.method.regions import chosen_names
    from cpift.models.sources import source_of

    selects = (
        stage in ("regions", "group") or config.fusion.isolates or NEEDS[stage or "evaluate"].integrates_of(config)
    )
    if stage == "probe" or not selects or (config.regions.include, config.regions.exclude) == (("*",), ()):
        return []
    try:
        source = source_of(config.model)
        if names := source.names():
            chosen_names(names, config.regions, source.description)
    except CheckpointError as error:
        return list(error.problems)
    return []


def _check_moments(config: RunConfig, stage: str | None) -> Iterator[Problem]:
    """Whether second moments are there, or will be, where something reads them; those at hand have to be of θ0."""
    from cpift.checkpoints.checkpoint import Checkpoint
    from cpift.checkpoints.opening import MOMENTS, at_hand
    from cpift.merging.planning import laid_out
    from cpift.method.moments import Moments

    if stage == "probe" or not (reader := _reads_moments(config, stage)):
        return
    yield from _other_tensors(config, reader)
    base = at_hand(config.model)
    for task in config.tasks:
        if task.checkpoint is None:
            if not config.probe_training.keep_moments:
                yield Problem("probe.keep_moments", f"is false, and {reader} reads second moments", "set it to true")
                return
            continue
        folder = at_hand(task.checkpoint)
        file = task.moments or (folder and folder / MOMENTS)
        if file is not None and not file.is_file():
            remedy = "give the file that the fine-tune wrote with keep_moments: true"
            what = f"{file} is a folder" if file.is_dir() else f"there is no {file}"
            yield Problem(f"tasks.{task.name}.moments", f"{what}, and {reader} reads it", remedy)
        elif file is not None and base is not None:
            try:
                Moments(file, laid_out(Checkpoint(base), config))
            except CheckpointError as error:
                for one in error.problems:
                    yield Problem(f"tasks.{task.name}.moments: {one.where}", one.what, one.remedy)


def _other_tensors(config: RunConfig, reader: str) -> Iterator[Problem]:
    """What of a fusion goes with no second moments, for these are of θ0's tensors, all of them."""
    fusion = config.fusion
    for field, given in {
        "slices": fusion.slices,
        "into": fusion.into,
        "vocabulary": fusion.vocabulary != "error",
    }.items():
        if given:
            what = f"makes other tensors than θ0's, and {reader} reads second moments of those"
            yield Problem(f"fusion.{field}", what, "leave it out, or name another method or measure")


def _reads_moments(config: RunConfig, stage: str | None) -> str:
    """What of a config reads second moments, in a stage or before it; "" where nothing does."""
    from cpift.merging.registry import reads_moments
    from cpift.method.measures import measure_named

    fusion, need = config.fusion, NEEDS[stage]
    if reads_moments(fusion.method) and (need.fuses or stage is None):
        return f"fusion.method {fusion.method}"
    selects = stage in ("regions", "group") or fusion.isolates or need.integrates_of(config)
    return (
        f"regions.measure {config.regions.measure}"
        if selects and measure_named(config.regions.measure).needs_moments
        else ""
    )


def _check_backbone(config: RunConfig) -> list[Problem]:
    from cpift.models.checks import check_checkpoint

    source = config.backbone.source
    if source in ("staged", "pretrained"):
        return []
    if Path(source).is_dir():
        return check_checkpoint(Path(source), "backbone.source")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        remedy = "write staged, pretrained, a model folder, or a hub id such as org/name"
        return [Problem("backbone.source", f"{source!r} is no folder and no hub id", remedy)]
    return []


def _check_store(config: RunConfig) -> list[Problem]:
    first = config.output.parts[0] if config.output is not None and config.output.parts else ""
    if not first.endswith(":"):  # of s3://bucket/x a path keeps s3:/bucket/x
        return []
    remedy = "give a folder (that every node sees), and copy the finished run there; resources.storage may be a URI"
    return [Problem("output", f"{config.output} is no folder, and results are not written to object stores", remedy)]


def _check_output(output: Path) -> list[Problem]:
    try:
        existing = next(folder for folder in [output, *output.parents] if folder.exists())
    except (OSError, ValueError) as error:  # a name too long, or with a character that none may have
        return [Problem("output", f"{str(output)[:80]!r}… is no folder's name ({error})", "give another with --output")]
    if not existing.is_dir():
        return [Problem("output", f"{existing} is a file", "give another folder with --output")]
    if not os.access(existing, os.W_OK):
        return [Problem("output", f"{existing} cannot be written", "give another folder with --output")]
    return []


def trainings(config: RunConfig) -> tuple[TrainingConfig, ...]:
    """The fine-tunes that a run of this config may do."""
    staged = config.backbone_source == "staged"
    asked = (config.probe, config.backbone.training or config.probe if staged else None, config.integration)
    return tuple(training for training in asked if training is not None)
