"""Before a merge of given checkpoints: everything that their headers tell. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cpift.checkpoints import Checkpoint, differences, first_problems
from cpift.config import CheckpointConfig, RunConfig
from cpift.errors import CpiftError, Problem, ProblemsError
from cpift.given import describe, locate, open_checkpoint
from cpift.pretrained import code_problems
from cpift.units import show_size
from cpift.vocabulary import FittedCheckpoint, resized

_BYTES_A_SECOND = 1e9  # assumed of the disk
_TIMES = {1: "once", 2: "twice", 3: "three times"}
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


def check_given(config: RunConfig) -> list[Problem]:
    """Every problem of the given checkpoints: files, layout against θ0, architecture. Needs no network."""
    if config.model.path is None:
        return [problem for where, folder in _given(config) for problem in _opened(folder, None, where)[1]]
    pretrained, problems = _opened(config.model.path, None, "model.path")
    for where, folder in _given(config):
        found, more = _opened(folder, pretrained, where, config.fusion.vocabulary)
        problems += more
        if found is not None and pretrained is not None:
            problems += _misfits(pretrained, found, where)
    return problems


def given_notes(config: RunConfig) -> Iterator[str]:
    """What is worth knowing of the given checkpoints, and is no problem."""
    if config.model.path is None or not config.merges_only:
        return
    base = Checkpoint(config.model.path)
    given = {
        where: (folder, open_checkpoint(folder, base, config.fusion.vocabulary)) for where, folder in _given(config)
    }
    for where, (folder, model) in given.items():
        dtypes = {str(info.dtype).removeprefix("torch.") for info in model.tensors.values() if info.floating}
        rows = ", other vocabulary: θ0's is kept" if isinstance(model, FittedCheckpoint) else ""
        yield f"{where}: {describe(folder)}, {'/'.join(sorted(dtypes))}{rows}, {folder}"
        if _differ(base.folder, folder, "tokenizer.json"):
            yield f"{where}: its tokenizer differs from θ0's; the fused model gets the backbone's"
    tied = "tied: one tensor" if base.config.get("tie_word_embeddings") else "not tied"
    yield f"Embeddings: {base.config.get('vocab_size', '?')} tokens, input and output {tied}"
    yield _costs(config, [base, *(model for _, model in given.values())])


def _costs(config: RunConfig, models: list[Checkpoint]) -> str:
    """Reads, buffers and time of a merge."""
    size = sum(model.nbytes for model in models)
    reads = (config.fusion.method in ("cpift", "ties")) + 1 + config.resources.verify
    written = models[0].nbytes * (1 + config.resources.verify)
    seconds = (reads * size + written) / _BYTES_A_SECOND
    why = " (the last time to verify)" if config.resources.verify else ""
    rate, budget = show_size(_BYTES_A_SECOND), show_size(config.resources.memory_budget)
    return (
        f"Reads {show_size(size)} {_TIMES[reads]}{why}, about {seconds:.0f} s at {rate}/s; holds at most {budget} "
        "beside the page cache (resources.memory_budget)"
    )


def _given(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Where in the config a local checkpoint is named, and its folder."""
    for task in config.tasks:
        if task.checkpoint is not None and task.checkpoint.path is not None:
            yield f"tasks.{task.name}.checkpoint", task.checkpoint.path
    backbone = Path(config.backbone.source)
    if config.backbone.source not in ("staged", "pretrained") and backbone.is_dir():
        yield "backbone.source", locate(CheckpointConfig(path=backbone, hub=None, revision=None))


def _opened(
    folder: Path, base: Checkpoint | None, where: str, vocabulary: str = "error"
) -> tuple[Checkpoint | None, list[Problem]]:
    try:
        return open_checkpoint(folder, base, vocabulary), code_problems(folder, where)
    except ProblemsError as error:
        return None, [Problem(f"{where}: {problem.where}", problem.what, problem.remedy) for problem in error.problems]
    except (CpiftError, OSError) as error:
        return None, [Problem(where, str(error), "check the path")]


def _misfits(base: Checkpoint, other: Checkpoint, where: str) -> list[Problem]:
    for field in _ARCHITECTURE:
        mine, theirs = base.config.get(field), other.config.get(field)
        if mine is not None and theirs is not None and mine != theirs:
            return [Problem(f"{where}: config.json, {field}", f"is {theirs!r}, θ0 has {mine!r}", "merge one family")]
    other_rows = resized(base, other)
    remedy = "use fine-tunes of one model, or set fusion.vocabulary: base to keep θ0's tokens"
    found = [
        Problem(f"{where}: {p.where}", p.what, remedy if p.where in other_rows else p.remedy)
        for p in differences(base, other)
    ]
    return first_problems(found, 8)


def _differ(one: Path, other: Path, name: str) -> bool:
    return (
        (other / name).is_file() and (one / name).is_file() and (one / name).read_bytes() != (other / name).read_bytes()
    )
