"""Before a merge of given checkpoints: everything that their headers tell. No weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from cpift.checkpoints.checkpoint import Checkpoint, differences, first_problems
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_files import require_plain
from cpift.checkpoints.opening import (
    at_hand,
    backbone_apart,
    describe,
    folders_at_hand,
    has_apart,
    open_checkpoint,
    open_merged,
)
from cpift.checkpoints.towers.tower import open_tower
from cpift.checkpoints.uniting import united_notes
from cpift.checkpoints.vocabulary import FittedCheckpoint, resized
from cpift.config.needs import NEEDS, absent_extra
from cpift.config.run import FusionConfig, RunConfig, TaskConfig
from cpift.errors import ConfigError, CpiftError, Problem, ProblemsError
from cpift.formats.safetensors import DTYPES, TensorInfo
from cpift.merging.adapters.planning import field_problems, opened_problems
from cpift.merging.conflicts import conflict_named
from cpift.merging.registry import METHODS, method_named, reads_moments
from cpift.merging.settings import Settings
from cpift.merging.stacks.inputs import slice_problems
from cpift.merging.stacks.planning import check_stack, open_stack, stack_notes
from cpift.method.measures import measure_named
from cpift.method.moments import moments_at_hand
from cpift.pretrained.architecture import vocabulary_size
from cpift.pretrained.fields import computing_problems, setting_notes
from cpift.pretrained.loading import code_problems
from cpift.pretrained.tokenizer_files import other_tokenizer, template_note
from cpift.text.units import show_size

_BYTES_A_SECOND = 1e9  # assumed of the disk
_BACKBONE = "backbone.source"
_TIMES = {1: "once", 2: "twice", 3: "three times", 4: "four times", 5: "five times"}
_OF_CORES = ("regions", "group")  # commands
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


def check_given(config: RunConfig) -> list[Problem]:
    """Every problem of the given checkpoints that are at hand: files, layout against θ0, architecture.

    Weights are read only where a file holds a tied tensor twice: the two have to be equal.
    """
    folder = at_hand(config.model)
    if folder is None:
        return [problem for where, folder in _given(config) for problem in _opened(folder, None, where)[1]]
    base, problems = _opened(folder, None, f"model.{config.model.kind}")
    if base is None:
        return problems
    pretrained, whole = laid_out(base, config), not config.fusion.slices
    for where, folder in _given(config):
        into = _module_of(config, where)
        opened, more = _opened(folder, pretrained, where, config.fusion.fitted, whole, into)
        problems += more
        if opened is not None and whole and not config.fusion.by_tokens and not into:
            problems += _misfits(pretrained, opened, where)
    if problems or not (config.fusion.slices or config.fusion.by_tokens):
        return problems or (opened_problems(config) if config.fusion.as_lora else [])
    return check_stack(config) if config.fusion.slices else _check_by_tokens(config)


def _check_by_tokens(config: RunConfig) -> list[Problem]:
    """Of models that are at hand, once all have one vocabulary."""
    if (folders := folders_at_hand(config)) is None:
        return []
    try:
        pretrained, tuned = open_merged(*folders, config.fusion)
    except ProblemsError as error:
        return list(error.problems)
    return [p for task, model in tuned.items() for p in _misfits(pretrained, model, f"tasks.{task}.checkpoint")]


def check_methods(config: RunConfig, stage: str | None) -> list[Problem]:
    """What methods that a stage (a key of `NEEDS`) merges by say against the run, or need and is not installed."""
    need, tasks = NEEDS[stage], [task.name for task in config.tasks]
    problems = []
    if stage in _OF_CORES and (config.fusion.slices or config.fusion.by_tokens):
        what = f"makes other layers or tokens, and `cpift {need.command}` is of the elements that models share"
        problems.append(Problem(f"fusion.{'slices' if config.fusion.slices else 'vocabulary'}", what, "leave it out"))
    if need.fuses or stage is None:
        try:
            method = method_named(config.fusion.method)
            if config.fusion.isolates:
                conflict_named(config.fusion.conflict)
        except ConfigError as error:
            return list(error.problems)
        if config.fusion.slices:
            problems += slice_problems(config.fusion)
        else:
            problems += Settings(config.fusion, _tensors(config)).problems(method.asked, tasks)
        problems += absent_extra(method.extra, config.fusion.method_name, "fusion.method")
        problems += field_problems(config, stage, _tensors(config))
    problems += _of_towers(config, stage)
    merges = stage == "fuse" or (stage is None and config.integration is None)
    problems += _twice(config.tasks) if merges and config.merges_only else []
    if config.baselines is not None and (need.scores or stage is None):
        for name in (name for name in config.baselines.chosen if name in METHODS):
            problems += absent_extra(METHODS[name].extra, name, f"baselines.{name}")
    return problems


def _twice(tasks: Sequence[TaskConfig]) -> Iterator[Problem]:
    """Models that are given under two names: they would count twice, unasked."""
    first: dict[tuple[str, str | None], str] = {}
    for task in tasks:
        if (source := task.checkpoint) is not None:
            place = os.path.realpath(source.path) if source.path is not None else str(source.hub)
            same = first.setdefault((place, source.revision), task.name)
            if same != task.name:
                what = f"is the same model as {same} ({place})"
                remedy = "give each model once; fusion.weights, --weights NAME=2 makes one count twice"
                yield Problem(f"tasks.{task.name}.checkpoint", what, remedy)


def _module_of(config: RunConfig, where: str) -> str:
    """The module of θ0 that a checkpoint named at a place in the config is; "" for all of θ0."""
    return config.fusion.into.get(where.removeprefix("tasks.").removesuffix(".checkpoint"), "")


def _of_towers(config: RunConfig, stage: str | None) -> Iterator[Problem]:
    """What text-only models of a part of θ0 may not be asked for with."""
    fusion, where = config.fusion, "fusion.into"
    given = {task.name for task in config.tasks if task.checkpoint is not None}
    for task in fusion.into.keys() - given:
        yield Problem(f"{where}.{task}", "is no task with a checkpoint", "name one of tasks")
    if not fusion.into:
        return
    if fusion.isolates or stage in _OF_CORES:
        what = "is of tasks that share a part of θ0 alone, and core regions are of all of it"
        yield Problem(where, what, "set fusion.method: task_arithmetic, or another that has no cores")
    if fusion.slices or fusion.by_tokens or fusion.vocabulary != "error" or fusion.as_lora:
        yield Problem(where, "goes with no slices, other vocabulary or adapter", "leave one of the two out")
    if config.integration is not None or config.baselines is not None:
        yield Problem(where, "is for merges of checkpoints alone", "leave integration and baselines out")


def _tensors(config: RunConfig) -> list[str]:
    """The names of θ0's tensors, where it is at hand and can be read."""
    try:
        folder = at_hand(config.model)
        return list(Checkpoint(folder).tensors) if folder is not None else []
    except (CpiftError, OSError):
        return []  # `check_given` says what is wrong with it


def laid_out(base: Checkpoint, config: RunConfig) -> Checkpoint:
    """θ0 as a merge reads it: with tied tensors apart where a task's checkpoint has them so."""
    given = _given(config)
    tasks = [folder for where, folder in given if where != _BACKBONE and not _module_of(config, where)]
    return base.apart() if any(_has_apart(base, folder) for folder in tasks) else base


def _has_apart(base: Checkpoint, folder: Path) -> bool:
    try:
        return has_apart(base, folder)
    except (CpiftError, OSError):
        return False  # `_opened` says what is wrong with it


def check_budget(config: RunConfig) -> list[Problem]:
    """Whether a slice of the largest tensor of every model fits into the memory budget, where θ0 is at hand."""
    from cpift.checkpoints.slices import pieces
    from cpift.merging.engine import buffers_within

    try:
        parts = list(_merges(config))
    except (CpiftError, OSError):
        return []  # `check_given` says what is wrong with it
    if not parts:
        return []
    every = [(method_named(fusion.method), fusion, tasks, info) for fusion, tasks, infos in parts for info in infos]
    held = [(method.held(fusion, info, tasks), info.name) for method, fusion, tasks, info in every if info.floating]
    first = [(pieces(info.numel, method.row_width(fusion, info))[:1], info) for method, fusion, _, info in every]
    largest = max(((stop - start) * info.itemsize for piece, info in first for start, stop in piece), default=0)
    beside = config.backbone_source != "pretrained" or bool(config.fusion.slices)  # of a stack, the names that it gets
    moments = len(config.tasks) if method_named(config.fusion.method).needs_moments else 0
    models = 1 + max(tasks for _, tasks, _ in parts) + beside + moments
    most = max(held, key=itemgetter(0), default=(0, ""))
    try:
        buffers_within(config.resources.memory_budget, largest, models, *most)
    except CpiftError as error:
        where, _, what = str(error).partition(": ")
        return [Problem(where, *what.split(" → "))]
    return []


def _merges(config: RunConfig) -> Iterator[tuple[FusionConfig, int, list[TensorInfo]]]:
    """How tensors are merged, of how many tasks, and which: θ0's, with other tokens if asked for, or each slice's."""
    fusion, folder = config.fusion, at_hand(config.model)
    if fusion.slices:
        stack = open_stack(config)
        for part in stack.parts if stack is not None else ():
            yield part.config, len(part.inputs.tuned), list(part.inputs.pretrained.tensors.values())
    elif folder is not None:
        folders = folders_at_hand(config) if fusion.by_tokens else None
        base = Checkpoint(folder) if folders is None else open_merged(*folders, fusion)[0]
        yield fusion, len(config.tasks), list(base.tensors.values())


def given_notes(config: RunConfig) -> Iterator[str]:
    """What is worth knowing of the given checkpoints, and is no problem."""
    folder = at_hand(config.model)
    if folder is None or not config.merges_only:
        return
    base = Checkpoint(folder)
    pretrained = laid_out(base, config)
    fitted, whole = config.fusion.fitted, not config.fusion.slices
    opened = {
        where: (folder, open_checkpoint(folder, pretrained, fitted, whole))
        for where, folder in _given(config)
        if not _module_of(config, where)
    }
    for where, (folder, model) in opened.items():
        dtypes = {DTYPES[info.kind] for info in model.tensors.values() if info.floating}
        rows = ", other vocabulary: θ0's is kept" if isinstance(model, FittedCheckpoint) else ""
        yield f"{where}: {describe(folder)}, {'/'.join(sorted(dtypes))}{rows}, {folder}"
        if base.ties and pretrained.is_apart and has_apart(base, folder):
            yield f"{where}: its embedding and output layer are two tensors, which θ0 ties: the fused model has two"
        if not base.ties and model.ties:
            yield f"{where}: ties its output layer to its embedding, θ0 does not; read as two equal tensors"
        for note in _differences(base.folder, folder):
            yield f"{where}: {note}"
        if not config.fusion.by_tokens and other_tokenizer(base.folder, folder):
            yield f"{where}: its tokenizer differs from θ0's; the fused model gets the backbone's"
    towers = {where: _module_of(config, where) for where, _ in _given(config)}
    for where, folder in ((where, folder) for where, folder in _given(config) if towers[where]):
        tower = open_tower(folder, pretrained, towers[where])
        yield f"{where}: text model, {len(tower.replaced_alone or ())} of θ0's {len(base.tensors)} tensors, {folder}"
        opened[where] = (folder, tower)
    tied = "not tied" if not base.ties else "tied in θ0, apart here" if pretrained.is_apart else "tied: one tensor"
    yield f"Embeddings: {_tokens(base)} tokens, input and output {tied}"
    if config.fusion.by_tokens and all(f"tasks.{task.name}.checkpoint" in opened for task in config.tasks):
        tuned = {task.name: opened[f"tasks.{task.name}.checkpoint"][1] for task in config.tasks}
        yield from united_notes(pretrained, tuned, config.fusion)
    if config.fusion.slices:
        yield from stack_notes(config)
    yield _costs(config, [pretrained, *(model for _, model in opened.values())])


def _tokens(base: Checkpoint) -> str:
    size = vocabulary_size(base.folder) if base.config else None
    return f"{size:,}" if size is not None else "?"


def _differences(base: Path, folder: Path) -> Iterator[str]:
    """Differences in small files that may be meant."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield from setting_notes(base, folder)
    if note := template_note(base, folder):
        yield note


def _costs(config: RunConfig, models: list[Checkpoint]) -> str:
    """Reads, buffers and time of a merge."""
    size, moments, once = sum(model.nbytes for model in models), _moments(config), 1 + config.resources.verify
    reads = method_named(config.fusion.method).reads + once
    seconds = (reads * size + once * (models[0].nbytes + moments)) / _BYTES_A_SECOND
    why = " (the last time to verify)" if config.resources.verify else ""
    why += f" and {show_size(moments)} of second moments {_TIMES[once]}" if moments else ""
    rate, budget = show_size(_BYTES_A_SECOND), show_size(config.resources.memory_budget)
    return (
        f"Reads {show_size(size)} {_TIMES[reads]}{why}, about {seconds:.0f} s at {rate}/s; holds at most {budget} "
        "beside the page cache (resources.memory_budget)"
    )


def _moments(config: RunConfig) -> int:
    """Bytes of the second moments that a merge reads, of files that are at hand."""
    fusion, measure = config.fusion, measure_named(config.regions.measure)
    reads = measure.needs_moments if fusion.isolates else reads_moments(fusion.method)
    return sum(file.stat().st_size for file in moments_at_hand(config.tasks)) if reads else 0


def _given(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Where in the config a checkpoint is named that is at hand, and its folder."""
    for task in config.tasks:
        if task.checkpoint is not None and (folder := at_hand(task.checkpoint)) is not None:
            yield f"tasks.{task.name}.checkpoint", folder
    backbone = Path(config.backbone.source)
    if config.backbone.source not in ("staged", "pretrained") and backbone.is_dir():
        yield _BACKBONE, backbone


def _opened(
    folder: Path, base: Checkpoint | None, where: str, vocabulary: str = "error", whole: bool = True, into: str = ""
) -> tuple[Checkpoint | None, list[Problem]]:
    if problems := code_problems(folder, where):
        return None, problems
    try:
        if base is None and (folder / ADAPTER_CONFIG).is_file():
            require_plain(folder)
            return None, []
        model = open_tower(folder, base, into) if into and base else open_checkpoint(folder, base, vocabulary, whole)
        unequal = [
            Problem(f"{where}: {problem.where}", problem.what, problem.remedy) for problem in model.unequal_copies()
        ]
        return model, unequal
    except ProblemsError as error:
        return None, [Problem(f"{where}: {problem.where}", problem.what, problem.remedy) for problem in error.problems]
    except (CpiftError, OSError) as error:
        return None, [Problem(where, str(error), "check the path")]


def _misfits(base: Checkpoint, other: Checkpoint, where: str) -> list[Problem]:
    for field in _ARCHITECTURE:
        mine, theirs = base.config.get(field), other.config.get(field)
        if mine is not None and theirs is not None and mine != theirs:
            return [Problem(f"{where}: config.json, {field}", f"is {theirs!r}, θ0 has {mine!r}", "merge one family")]
    if base.ties and not base.is_apart and where == _BACKBONE and _has_apart(base, other.folder):
        return [backbone_apart(f"{where}: config.json, tie_word_embeddings")]
    if not (other.folder / ADAPTER_CONFIG).is_file() and (problems := computing_problems(base.folder, other.folder)):
        return first_problems([Problem(f"{where}: {p.where}", p.what, p.remedy) for p in problems], 8)
    other_rows = resized(base, other)
    remedy = "use fine-tunes of one model, or set fusion.vocabulary: base to keep θ0's tokens"
    problems = [
        Problem(f"{where}: {p.where}", p.what, remedy if p.where in other_rows else p.remedy)
        for p in differences(base, other)
    ]
    return first_problems(problems, 8)
