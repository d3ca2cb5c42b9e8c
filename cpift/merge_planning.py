"""Before a merge of given checkpoints: everything that their headers tell. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cpift.checkpoints import Checkpoint, differences, first_problems
from cpift.config import CheckpointConfig, RunConfig
from cpift.errors import CpiftError, Problem, ProblemsError
from cpift.given import describe, locate, open_checkpoint

_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


def check_given(config: RunConfig) -> list[Problem]:
    """Every problem of the given checkpoints: files, layout against θ0, architecture. Needs no network."""
    if config.model.path is None:
        return [problem for where, folder in _given(config) for problem in _opened(folder, None, where)[1]]
    pretrained, problems = _opened(config.model.path, None, "model.path")
    for where, folder in _given(config):
        found, more = _opened(folder, pretrained, where)
        problems += more
        if found is not None and pretrained is not None:
            problems += _misfits(pretrained, found, where)
    return problems


def given_notes(config: RunConfig) -> Iterator[str]:
    """What is worth knowing of the given checkpoints, and is no problem."""
    if config.model.path is None or not config.merges_only:
        return
    base = Checkpoint(config.model.path)
    for where, folder in _given(config):
        model = open_checkpoint(folder, base)
        dtypes = {str(info.dtype).removeprefix("torch.") for info in model.tensors.values() if info.floating}
        yield f"{where}: {describe(folder)}, {'/'.join(sorted(dtypes))}, {folder}"
        if _differ(base.folder, folder, "tokenizer.json"):
            yield f"{where}: its tokenizer differs from θ0's; the fused model gets the backbone's"


def _given(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Where in the config a local checkpoint is named, and its folder."""
    for task in config.tasks:
        if task.checkpoint is not None and task.checkpoint.path is not None:
            yield f"tasks.{task.name}.checkpoint", task.checkpoint.path
    backbone = Path(config.backbone.source)
    if config.backbone.source not in ("staged", "pretrained") and backbone.is_dir():
        yield "backbone.source", locate(CheckpointConfig(path=backbone, hub=None, revision=None))


def _opened(folder: Path, base: Checkpoint | None, where: str) -> tuple[Checkpoint | None, list[Problem]]:
    try:
        return open_checkpoint(folder, base), []
    except ProblemsError as error:
        return None, [Problem(f"{where}: {problem.where}", problem.what, problem.remedy) for problem in error.problems]
    except (CpiftError, OSError) as error:
        return None, [Problem(where, str(error), "check the path")]


def _misfits(base: Checkpoint, other: Checkpoint, where: str) -> list[Problem]:
    for field in _ARCHITECTURE:
        mine, theirs = base.config.get(field), other.config.get(field)
        if mine is not None and theirs is not None and mine != theirs:
            return [Problem(f"{where}: config.json, {field}", f"is {theirs!r}, θ0 has {mine!r}", "merge one family")]
    found = [Problem(f"{where}: {p.where}", p.what, p.remedy) for p in differences(base, other)]
    return first_problems(found, 8)


def _differ(one: Path, other: Path, name: str) -> bool:
    return (
        (other / name).is_file() and (one / name).is_file() and (one / name).read_bytes() != (other / name).read_bytes()
    )
