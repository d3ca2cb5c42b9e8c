"""Checkpoints that exist already: where they lie, and what identifies them. They are read where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from cpift.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, first_problems
from cpift.checkpoints.lora import LoraCheckpoint
from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.lora_files import ADAPTER_WEIGHTS, unties
from cpift.checkpoints.relaid import in_layout_of
from cpift.checkpoints.towers.tower import open_tower
from cpift.checkpoints.uniting import united
from cpift.checkpoints.vocabulary import FittedCheckpoint, resized
from cpift.config.run import CheckpointConfig, FusionConfig, ModelConfig, RunConfig
from cpift.disk.files import digest, file_sha256
from cpift.errors import CheckpointError, CpiftError, Problem, entry
from cpift.hub import HUB_PATTERNS, download, resolve_revision, snapshot
from cpift.pretrained.fields import computing_problems
from cpift.pretrained.loading import require_no_code
from cpift.untrusted.json import ADAPTER, read_object, read_weight_map

MOMENTS = "moments.safetensors"  # beside a model's files, and none of them: see `method.moments`
FITTED = {"error": False, "base": True}  # `fusion.vocabulary` by numbers → whether other rows are fitted to θ0's
_Source = TypeVar("_Source", bound=CheckpointConfig | ModelConfig)


def pinned(source: _Source) -> _Source:
    """The source with the commit that its branch or tag means now: what is downloaded is then what was identified."""
    if source.hub is None:
        return source
    return cast(_Source, source.model_copy(update={"revision": resolve_revision("model", source.hub, source.revision)}))


def locate(source: CheckpointConfig | ModelConfig) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded (safetensors and small files, no code, no pickles).

    Raises HubError, and CheckpointError where what was downloaded cannot be used without code of its own.
    """
    if source.path is not None:
        return source.path
    assert source.hub is not None
    folder = download(source.hub, source.revision)
    require_no_code(folder)
    return folder


def at_hand(source: CheckpointConfig | ModelConfig) -> Path | None:
    """The folder that `locate` would return, if nothing has to be downloaded for it; None for other kinds of source."""
    if source.path is not None or source.hub is None:
        return source.path
    if snapshot(source.hub, source.revision) is None:
        return None
    try:
        folder = snapshot(source.hub, resolve_revision("model", source.hub, source.revision))
    except CpiftError:
        return None  # whoever downloads it says so
    return folder if folder is not None and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Whether all files of a model or adapter are there: a download may have been broken off."""
    if (folder / INDEX_FILE).is_file():
        return all((folder / shard).is_file() for shard in set(read_weight_map(folder / INDEX_FILE).values()))
    return any((folder / name).is_file() for name in (SINGLE_FILE, ADAPTER_WEIGHTS))


def open_models(
    base: Path, others: Mapping[str, Path], vocabulary: str = "error", whole: bool = True
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """θ0 and models that are to be compared with it, all with the same tensors. Raises CheckpointError.

    What θ0 ties is one tensor in every model, unless one of them has it apart: then it is two in every model, in θ0 two
    of the same values. vocabulary, whole: see `open_checkpoint`.
    """
    pretrained = Checkpoint(base)
    problems = [
        Problem(f"{label}: {problem.where}", problem.what, problem.remedy)
        for label, folder in others.items()
        if whole and folder != base and not (folder / ADAPTER_CONFIG).is_file() and pretrained.config
        for problem in computing_problems(base, folder)
    ]
    if problems:
        raise CheckpointError(f"models that do not compute as {base} does", first_problems(problems, 20))
    apart = any(has_apart(pretrained, folder) for folder in others.values() if folder != base)
    pretrained = pretrained.apart() if apart else pretrained
    return pretrained, {
        label: pretrained if folder == base else open_checkpoint(folder, pretrained, vocabulary, whole)
        for label, folder in others.items()
    }


def folders_at_hand(config: RunConfig) -> tuple[Path, dict[str, Path]] | None:
    """θ0's folder, and by task those of given checkpoints; None where one has to be downloaded."""
    base = at_hand(config.model)
    given = {task.name: at_hand(task.checkpoint) for task in config.tasks if task.checkpoint is not None}
    folders = {name: folder for name, folder in given.items() if folder is not None}
    return None if base is None or len(folders) < len(config.tasks) else (base, folders)


def open_merged(
    base: Path, others: Mapping[str, Path], config: FusionConfig
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """`open_models` as a merge reads them: with one vocabulary where it goes by tokens, parts of θ0 where asked for."""
    plain = {task: folder for task, folder in others.items() if task not in config.into}
    pretrained, opened = open_models(base, plain, config.fitted, whole=not config.slices)
    opened |= {task: open_tower(others[task], pretrained, module) for task, module in config.into.items()}
    tuned = {task: opened[task] for task in others}
    return united(pretrained, tuned, config) if config.by_tokens else (pretrained, tuned)


def has_apart(base: Checkpoint, folder: Path) -> bool:
    """Whether a model's embedding and output layer are tied otherwise than θ0's. Raises CheckpointError."""
    if (folder / ADAPTER_CONFIG).is_file():
        return unties(folder, base)
    return len(Checkpoint(folder).ties) != len(base.ties)


def backbone_apart(where: str) -> Problem:
    """The problem of a backbone that alone `has_apart`: core regions are then those of tied tensors."""
    what = "has its embedding and output layer apart, while θ0 and all tunes have one tensor for both"
    return Problem(where, what, "give a backbone that ties them, or a θ0 that does not")


def open_checkpoint(
    folder: Path, base: Checkpoint | None = None, vocabulary: str = "error", whole: bool = True
) -> Checkpoint:
    """A model folder, or an adapter's folder as the model it makes of `base`; under the names that `base` has for the
    same model. Raises CheckpointError.

    vocabulary: `base` fits a model with another number of tokens to `base`, `error` opens it as it is. Where `base`
    ties nothing, or has tied tensors apart, what is opened has them apart too. whole: all of its layers are `base`'s;
    else it has its own names, and any number of layers.
    """
    if base is not None and (folder / ADAPTER_CONFIG).is_file():
        model: Checkpoint = LoraCheckpoint(folder, base)
    else:
        model = Checkpoint(folder)
        model = model.apart() if base is not None and (base.is_apart or not base.ties) else model
        model = model if base is None or not whole else in_layout_of(base, model)
    fits = base is None or not entry(FITTED, vocabulary, "fusion.vocabulary") or not resized(base, model)
    return model if fits or base is None else FittedCheckpoint(model, base)


def given_fingerprint(source: CheckpointConfig | ModelConfig) -> str:
    """What identifies a checkpoint without reading its weights: hub id and commit, or `quick_fingerprint`."""
    if source.hub is not None:
        return digest(["hub", source.hub, resolve_revision("model", source.hub, source.revision)])
    assert source.path is not None
    return quick_fingerprint(source.path)


def as_read(fingerprint: str, folder: Path, base: Path | None = None) -> str:
    """The fingerprint of a given model, where versions that were published before would have read other values.

    What is merged from it is then made anew, and nothing else is. base: θ0's folder, which an adapter is read with.
    """
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            otherwise = base is not None and _adapter_otherwise(folder, Checkpoint(base))
        else:
            otherwise = Checkpoint(folder).tied_by_class
    except (CpiftError, OSError):
        return fingerprint  # whoever opens it says what is wrong
    return digest([fingerprint, "as its class has it"]) if otherwise else fingerprint


def _adapter_otherwise(folder: Path, base: Checkpoint) -> bool:
    return unties(folder, base) or LoraCheckpoint(folder, base).stored_by_class


def quick_fingerprint(folder: Path) -> str:
    """sha256 (hex) over a folder's files: weights by name, size, modification time and header, small files by content.

    It tells whether files were replaced or rewritten, at no cost; a verified merge looks at all bytes (inputs.json).
    """
    return digest([[file.name, *_state(file)] for file in model_files(folder)])


def file_fingerprint(file: Path) -> str:
    """sha256 (hex) of a safetensors file's name, size, modification time and header, as `quick_fingerprint` has it."""
    return digest([file.name, *_state(file)])


def model_files(folder: Path) -> list[Path]:
    """Every file of a folder that decides its weights, tokens or text, by name."""
    files = {file for pattern in HUB_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(files - {folder / "README.txt", folder / MOMENTS}, key=lambda file: file.name)


def _state(file: Path) -> list[Any]:
    if file.suffix != ".safetensors":
        return [file_sha256(file)]
    status = file.stat()
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, 1 << 20))
    return [status.st_size, status.st_mtime_ns, digest(header.hex())]


def describe(folder: Path) -> str:
    """What a folder holds, in a word."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return "full model"
    config = read_object(folder / ADAPTER_CONFIG, ADAPTER)
    return f"{config.get('peft_type', 'adapter')} adapter, rank {config.get('r', '?')}"
