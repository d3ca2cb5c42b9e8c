"""θ0 from wherever it comes, as one directory of safetensors with its tokenizer.

Every later stage reads that directory and nothing else, so sources differ here only. Pickled weights are never read and
no code from a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import locate, model_files
from cpift.config.run import ModelConfig
from cpift.data.chat_templates import TEMPLATES, check_template
from cpift.data.chat_templates import decided_by as template_decided_by
from cpift.disk.files import file_sha256
from cpift.errors import CheckpointError, CpiftError, Problem, entry
from cpift.formats.gguf import read_gguf
from cpift.formats.sizes import gguf_problems, memory_problem
from cpift.hub import cached_folder, download, resolve_revision
from cpift.models.base import Source
from cpift.models.checks import check_checkpoint, check_dense, check_gguf, gguf_path
from cpift.models.loading import load_directory, load_gguf, load_model, torch_dtype
from cpift.models.tokenizer import (
    checked_tokenizer,
    for_rows,
    load_row_tokenizer,
    load_tokenizer,
    read_gguf_tokenizer,
)
from cpift.pretrained import loading as pretrained
from cpift.text.escaping import code
from cpift.text.redaction import is_template

__all__ = [
    "SOURCES",
    "Source",
    "check_model",
    "configured_template",
    "load_model",
    "load_tokenizer",
    "materialise",
    "model_fingerprint",
    "read_ahead",
    "source_files",
    "source_of",
]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_fingerprint(model: ModelConfig) -> str:
    """sha256 (hex) of what decides θ0: file contents, hub id and commit, or the scratch fields; and the dtype kept."""
    digest = hashlib.sha256(f"dtype={model.dtype}\n".encode())
    for line in (*source_of(model).decided_by(), *template_decided_by(model)):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def source_files(model: ModelConfig) -> list[Path]:
    """The files on this machine that decide θ0; of a model on the hub none, for its commit names it."""
    name = model.chat_template
    template = [Path(name)] if name and name not in TEMPLATES and not is_template(name) else []
    return [*source_of(model).files(), *template]


def check_model(model: ModelConfig) -> list[Problem]:
    """What can be found wrong with θ0 without reading its weights; empty if nothing is. Needs no network."""
    return [*source_of(model).check(), *check_template(model)]


def materialise(model: ModelConfig, out: Path, chats: bool = True) -> None:
    """Write θ0 into the directory `out`: safetensors, configs, tokenizer and its chat template.

    chats: whether it is trained on conversations; a merge needs no chat template.

    Tensors have the names and the dtype that fine-tunes of it are saved with, tied tensors are there once. GGUF weights
    are dequantised. `out` is filled in place; who calls it renames it when it is complete.

    Raises:
        CheckpointError: a tensor is missing, of another shape than config.json says, or not finite; the tokenizer has
            no chat template and `chats`; the weights are pickled or quantised.
        HubError: the hub does not answer.
    """
    problems = check_model(model)
    if problems:
        raise CheckpointError("model", problems)
    network, tokenizer = source_of(model).load(chats)
    check_dense(network)
    out.mkdir(parents=True, exist_ok=True)
    with pretrained.no_progress_bars():
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)


def configured_template(model: ModelConfig) -> str | None:
    """The chat template of every output where the config says one or sets its variables; None where it says nothing.

    Raises CheckpointError where it cannot be read.
    """
    if model.chat_template is None and not model.chat_template_kwargs:
        return None
    tokenizer = source_of(model).tokenizer()
    return None if tokenizer is None else str(tokenizer.chat_template)


def read_ahead(model: ModelConfig) -> threading.Thread:
    """Hash the files of a model's folder beside what the caller does, for `model_fingerprint`; join it before that.

    Of other sources nothing is read. What cannot be read here is told to who asks for the fingerprint.
    """

    def read() -> None:
        with contextlib.suppress(OSError, CpiftError):
            for file in source_of(model).files() if model.path is not None else ():
                file_sha256(file)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


class _Folder(Source):
    in_place = True

    def decided_by(self) -> Iterator[str]:
        return (f"file {file.name} {file_sha256(file)}" for file in self.files())

    def check(self) -> list[Problem]:
        return check_checkpoint(self.value, "model.path")

    def files(self) -> list[Path]:
        return model_files(self.value)

    def folder(self) -> Path:
        return Path(self.value)

    def load(self, chats: bool) -> tuple[Any, PreTrainedTokenizerBase]:
        return load_directory(self.value, self.model, chats)

    def names(self) -> list[str]:
        return [info.name for info in Checkpoint(self.value).tensors.values() if info.floating]

    def parameters(self) -> int:
        return Checkpoint(self.value).numel

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.value, self.model)

    def row_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_row_tokenizer(self.value, self.model)

    def stated(self, relative: Callable[[Path], str]) -> str:
        return relative(self.value)

    @property
    def description(self) -> str:
        return str(self.value)

    @property
    def elsewhere(self) -> str:
        return "a local folder"

    @property
    def origin(self) -> str:
        return f"A local checkpoint, {code(self.value.name)}."


class _Hub(Source):
    in_place = True

    @property
    def repository(self) -> str:  # type: ignore[override]  # a field of the others
        return str(self.value)

    def decided_by(self) -> Iterator[str]:
        yield f"hub {self.value} {resolve_revision('model', self.value, self.model.revision)}"

    def fetched(self) -> list[Path]:
        return model_files(locate(self.model))

    def folder(self) -> Path | None:
        return cached_folder(self.value, self.model.revision)

    def load(self, chats: bool) -> tuple[Any, PreTrainedTokenizerBase]:
        folder = download(self.value, self.model.revision)
        if problems := check_checkpoint(folder, "model.hub"):
            raise CheckpointError(f"model {self.value}", problems)
        return load_directory(folder, self.model, chats)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        folder = self.folder()
        return None if folder is None else load_tokenizer(folder, self.model)

    def row_tokenizer(self) -> PreTrainedTokenizerBase | None:
        folder = self.folder()
        return None if folder is None else load_row_tokenizer(folder, self.model)

    def stated(self, relative: Callable[[Path], str]) -> str:
        return str(self.value)

    @property
    def description(self) -> str:
        return str(self.value)

    @property
    def origin(self) -> str:
        return f"{code(self.value)}, revision {code(self.model.revision or 'main')}."


class _Gguf(Source):
    auto = "bfloat16"

    def decided_by(self) -> Iterator[str]:
        yield f"gguf {file_sha256(gguf_path(self.value))}"

    def check(self) -> list[Problem]:
        return check_gguf(self.value) or gguf_problems(gguf_path(self.value), "model.gguf.file")

    def files(self) -> list[Path]:
        return [gguf_path(self.value)]

    def load(self, chats: bool) -> tuple[Any, PreTrainedTokenizerBase]:
        return load_gguf(gguf_path(self.value), self.model, self.dtype, chats)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        file = gguf_path(self.value)
        return checked_tokenizer(self.raw_tokenizer(file.parent), str(file), self.model)

    def raw_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        return read_gguf_tokenizer(gguf_path(self.value))

    def parameters(self) -> int:
        return read_gguf(gguf_path(self.value)).parameters

    def stated(self, relative: Callable[[Path], str]) -> dict[str, str]:
        package = self.value.package
        return {"file": self.value.file, "package": package} if package else {"file": relative(Path(self.value.file))}

    @property
    def description(self) -> str:
        return f"GGUF {self.value.file}"

    @property
    def elsewhere(self) -> str:
        return str(self.value.file)

    @property
    def origin(self) -> str:
        package = f" of the Python package {code(self.value.package)}" if self.value.package else ""
        return f"The GGUF file {code(Path(self.value.file).name)}{package}, dequantised."


class _Scratch(Source):
    auto = "float32"

    def check(self) -> list[Problem]:
        problem = memory_problem(self.value.parameters, 4, "model.scratch")
        return [problem] if problem else []

    def decided_by(self) -> Iterator[str]:
        yield f"scratch {json.dumps(self.value.model_dump(), sort_keys=True)}"

    def load(self, chats: bool) -> tuple[Any, PreTrainedTokenizerBase]:
        from cpift.models.scratch import make_scratch_model

        tokenizer = self.tokenizer()
        network: Any = make_scratch_model(self.value, tokenizer)
        return network.to(dtype=torch_dtype(self.dtype)), tokenizer

    def names(self) -> list[str]:
        import torch

        from cpift.models.scratch import make_scratch_model

        with torch.device("meta"):
            return [name for name, _ in make_scratch_model(self.value, self.tokenizer()).named_parameters()]

    def parameters(self) -> int:
        return int(self.value.parameters)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from cpift.models.scratch import make_scratch_tokenizer

        return checked_tokenizer(make_scratch_tokenizer(self.value), "model.scratch", self.model)

    def row_tokenizer(self) -> PreTrainedTokenizerBase:
        from cpift.models.scratch import scratch_row_tokenizer

        return checked_tokenizer(for_rows(scratch_row_tokenizer()), "model.scratch", self.model)

    def stated(self, relative: Callable[[Path], str]) -> dict[str, int]:
        return dict(self.value.model_dump())

    @property
    def description(self) -> str:
        return "random weights"

    @property
    def origin(self) -> str:
        return "A small Llama with random weights, made on the spot. It is of use for tests only."


SOURCES: dict[str, type[Source]] = {"path": _Folder, "hub": _Hub, "gguf": _Gguf, "scratch": _Scratch}


def source_of(model: ModelConfig) -> Source:
    return entry(SOURCES, model.kind, "model")(model)
