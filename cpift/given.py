"""Checkpoints that exist already: where they lie, and what identifies them. They are read where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpift.checkpoints import Checkpoint
from cpift.config import CheckpointConfig, ModelConfig
from cpift.files import digest, file_sha256
from cpift.hub import HUB_PATTERNS, download, resolve_revision
from cpift.lora import LoraCheckpoint
from cpift.lora_config import ADAPTER_CONFIG
from cpift.pretrained import require_no_code
from cpift.untrusted import ADAPTER, read_object
from cpift.vocabulary import FittedCheckpoint, resized


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


def open_checkpoint(folder: Path, base: Checkpoint | None = None, vocabulary: str = "error") -> Checkpoint:
    """A model folder, or an adapter's folder as the model it makes of `base`. Raises CheckpointError.

    vocabulary: `base` fits a model with another number of tokens to `base`, `error` opens it as it is.
    """
    if base is not None and (folder / ADAPTER_CONFIG).is_file():
        return LoraCheckpoint(folder, base)
    model = Checkpoint(folder)
    fits = base is None or vocabulary == "error" or not resized(base, model)
    return model if fits or base is None else FittedCheckpoint(model, base)


def given_fingerprint(source: CheckpointConfig | ModelConfig) -> str:
    """What identifies a checkpoint without reading its weights: hub id and commit, or `quick_fingerprint`."""
    if source.hub is not None:
        return digest(["hub", source.hub, resolve_revision("model", source.hub, source.revision)])
    assert source.path is not None
    return quick_fingerprint(source.path)


def quick_fingerprint(folder: Path) -> str:
    """sha256 (hex) over a folder's files: weights by name, size, modification time and header, small files by content.

    It tells whether files were replaced or rewritten, at no cost. Full hashes are in the manifest of a verified merge.
    """
    return digest([[file.name, *_state(file)] for file in model_files(folder)])


def model_files(folder: Path) -> list[Path]:
    """Every file of a folder that decides its weights, tokens or text, by name."""
    found = {file for pattern in HUB_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(found - {folder / "README.txt"}, key=lambda file: file.name)


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
