"""`cpift init` looks at θ0: where it comes from, its tokenizer, whether it lacks a chat template, how large it is."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.config.inputs import GgufFile
from cpift.config.run import ModelConfig
from cpift.data.chat_templates import proposed
from cpift.errors import CheckpointError, CpiftError, Problem
from cpift.hub import HubError, cached_folder, fetch_small_files, resolve_revision
from cpift.models.checks import check_checkpoint
from cpift.models.sources import check_model, source_of
from cpift.models.tokenizer import checked_tokenizer
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL = 2 * 10**9  # parameters of a model that is kept in float32 for short fine-tunes


@dataclass(frozen=True)
class BaseModel:
    """θ0 as a run will have it, and its tokenizer with the template that was chosen."""

    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    parameters: int | None
    places: int | None  # tokens that its positions are made for
    added: str | None  # the template that was chosen for a model without one


def base_model(name: str) -> BaseModel:
    """Look at a model folder, a GGUF file or a hub id. Raises CheckpointError, HubError."""
    model, folder = _source(name)
    if problems := check_model(model):
        raise CheckpointError("model", problems)
    tokenizer = source_of(model).raw_tokenizer(folder)
    added = None if tokenizer.chat_template is not None else proposed(tokenizer.get_vocab())
    parameters = source_of(model).parameters()
    wide = parameters is not None and parameters <= _SMALL and not _is_float32(model, folder)
    model = ModelConfig.model_validate(
        model.model_dump(exclude_none=True) | {"chat_template": added, "dtype": "float32" if wide else "auto"}
    )
    return BaseModel(model, checked_tokenizer(tokenizer, name, model), parameters, _places(folder), added)


def _source(name: str) -> tuple[ModelConfig, Path]:
    """The config of a name, and the folder of its small files."""
    path = Path(name).expanduser()
    if path.is_dir():
        if problems := check_checkpoint(path, "--model"):
            raise CheckpointError(f"model {name}", problems)
        return ModelConfig(path=path.resolve()), path
    if path.is_file() and path.suffix.lower() == ".gguf":
        return ModelConfig(gguf=GgufFile(file=str(path.resolve()))), path.parent
    if (path.parent / "config.json").is_file() and path.is_file():
        remedy = f"give its folder: --model {path.parent}"
        raise CheckpointError("init", [Problem("--model", f"{name!r} is one file of a model", remedy)])
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        what = f"{name!r} is no model folder, no .gguf file and no hub id"
        raise CheckpointError("init", [Problem("--model", what, _like(path) or "give one of these, such as org/name")])
    commit = _commit(name)
    folder = cached_folder(name, commit) or fetch_small_files(name, commit)
    return ModelConfig(hub=name, revision=commit), folder


def _commit(name: str) -> str:
    """The hub's newest commit of a model. Raises HubError; CheckpointError where a folder of another name was meant."""
    try:
        return resolve_revision("model", name, None)
    except HubError:
        if not (meant := _like(Path(name))):
            raise
    raise CheckpointError(
        "init", [Problem("--model", f"there is no folder {name!r}, and no such id on the hub", meant)]
    )


def _like(path: Path) -> str:
    """The remedy where a model's folder beside a path has nearly its name."""
    folders = [file.parent.name for file in path.parent.glob("*/config.json")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, folders, n=1)
    return f"did you mean {path.with_name(close[0])}?" if close else ""


def _is_float32(model: ModelConfig, folder: Path) -> bool:
    from cpift.checkpoints.checkpoint import Checkpoint

    if model.path is None:
        return False
    return all(info.kind == "F32" for info in Checkpoint(folder).tensors.values() if info.floating)


def _places(folder: Path) -> int | None:
    """`max_position_embeddings` or what the class calls it; None where nothing says so."""
    try:
        from cpift.pretrained.architecture import model_config

        places: Any = getattr(model_config(folder), "max_position_embeddings", None)
    except CpiftError:
        places = _stated(folder)
    return places if isinstance(places, int) and places > 0 else None


def _stated(folder: Path) -> Any:
    try:
        return read_object(folder / "config.json", MODEL_CONFIG).get("max_position_embeddings")
    except (UnreadableError, OSError):
        return None
