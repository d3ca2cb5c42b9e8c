"""θ0 from wherever it comes, as one directory of safetensors with its tokenizer.

Every later stage reads that directory and nothing else, so sources differ here only. Pickled weights are never read and
no code from a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import key_mapping, require_trainable
from cpift.config.inputs import GgufFile
from cpift.config.run import ModelConfig
from cpift.data.chat_templates import check_template
from cpift.data.chat_templates import decided_by as template_decided_by
from cpift.disk.files import file_sha256
from cpift.errors import CheckpointError, CpiftError, Problem, entry
from cpift.formats.gguf import read_gguf
from cpift.formats.sizes import gguf_problems, memory_problem
from cpift.hub import cached_folder, download, resolve_revision
from cpift.models.checks import check_checkpoint, check_dense, check_gguf, decisive_files, gguf_path
from cpift.models.tokenizer import checked_tokenizer, load_tokenizer, read_gguf_tokenizer
from cpift.pretrained import loading as pretrained
from cpift.text.escaping import code

__all__ = [
    "SOURCES",
    "Source",
    "check_model",
    "configured_template",
    "load_model",
    "load_tokenizer",
    "materialise",
    "model_fingerprint",
    "source_of",
]

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_fingerprint(model: ModelConfig) -> str:
    """sha256 (hex) of what decides θ0: file contents, hub id and commit, or the scratch fields; and the dtype kept."""
    digest = hashlib.sha256(f"dtype={model.dtype}\n".encode())
    for line in (*source_of(model).decided_by(), *template_decided_by(model)):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def check_model(model: ModelConfig) -> list[Problem]:
    """What can be found wrong with θ0 without reading its weights; empty if nothing is. Needs no network."""
    return [*source_of(model).check(), *check_template(model)]


def materialise(model: ModelConfig, out: Path) -> None:
    """Write θ0 into the directory `out`: safetensors, configs, tokenizer and its chat template.

    Tensors have the names and the dtype that fine-tunes of it are saved with, tied tensors are there once. GGUF weights
    are dequantised. `out` is filled in place; who calls it renames it when it is complete.

    Raises:
        CheckpointError: a tensor is missing, of another shape than config.json says, or not finite; the tokenizer has
            no chat template; the weights are pickled or quantised.
        HubError: the hub does not answer.
    """
    problems = check_model(model)
    if problems:
        raise CheckpointError("model", problems)
    network, tokenizer = source_of(model).load()
    check_dense(network)
    out.mkdir(parents=True, exist_ok=True)
    with pretrained.no_progress_bars():
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)


def load_model(path: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a local safetensors directory, in evaluation mode, in its own dtype unless one is given.

    Raises:
        CheckpointError: a tensor is missing or of another shape than config.json says.
    """
    with pretrained.no_progress_bars(), _checkpoint_errors(path):
        loaded: Any = pretrained.load_network(
            path,
            dtype=dtype or "auto",
            key_mapping=key_mapping(path),
            ignore_mismatched_sizes=True,  # so that they are listed; _checked_network refuses them
            output_loading_info=True,
        )
    return _checked_network(loaded, path)


def _load_directory(path: Path, model: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    network = load_model(path, None if model.dtype == "auto" else _torch_dtype(model.dtype, "float32"))
    require_trainable(path)  # of a hub's repository it shows only now
    return network, load_tokenizer(path, model)


def _load_gguf(gguf: GgufFile, model: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    file = gguf_path(gguf)
    with pretrained.no_progress_bars(), _checkpoint_errors(file):
        loaded, tokenizer = pretrained.load_gguf(file, _torch_dtype(model.dtype, "bfloat16"))
    network = _checked_network(loaded, file)
    # The weights are dense now; transformers refuses to save a model that still says it is quantised.
    for holder, name in ((network.config, "quantization_config"), (network, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    return network, checked_tokenizer(tokenizer, str(file), model)


def _torch_dtype(name: str, auto: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, auto if name == "auto" else name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checked_network(loaded: tuple[PreTrainedModel, Any], path: Path) -> PreTrainedModel:
    """The model of `from_pretrained(..., output_loading_info=True)`, if every tensor of it came from the file."""
    network, info = loaded
    problems = [Problem(str(path), f"tensor {name} is missing", "restore it") for name in sorted(info["missing_keys"])]
    problems += [
        Problem(str(path), f"tensor {name} has shape {tuple(found)}, config.json says {tuple(wanted)}", "restore it")
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise CheckpointError(f"model {path}", problems)
    network.eval()
    return network


@contextlib.contextmanager
def _checkpoint_errors(path: Path) -> Iterator[None]:
    """What loads a model reads files of others and raises whatever it meets in them."""
    try:
        yield
    except CpiftError:
        raise
    except Exception as error:
        what = str(error).strip() or type(error).__name__
        raise CheckpointError(f"model {path}", [Problem(str(path), what, "restore the file")]) from error


def configured_template(model: ModelConfig) -> str | None:
    """The chat template of every output where the config says one or sets its variables; None where it says nothing.

    Raises CheckpointError where it cannot be read.
    """
    if model.chat_template is None and not model.chat_template_kwargs:
        return None
    tokenizer = source_of(model).tokenizer()
    return None if tokenizer is None else str(tokenizer.chat_template)


class Source(ABC):
    """Everything that differs by which of `model.path`, `hub`, `gguf` and `scratch` is given."""

    def __init__(self, model: ModelConfig):
        self.model, self.given = model, getattr(model, model.kind)

    @abstractmethod
    def decided_by(self) -> Iterator[str]:
        """What decides the weights, as lines."""

    @abstractmethod
    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The network and its tokenizer."""

    @property
    @abstractmethod
    def told(self) -> str:
        """In a word or two."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """A sentence for the model card."""

    def check(self) -> list[Problem]:
        return []

    def parameters(self) -> int | None:
        """How many, tied ones once; None where only a download can tell."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, where it is at hand before θ0 is made. Raises CheckpointError where it cannot be used."""
        return None


class _Folder(Source):
    def decided_by(self) -> Iterator[str]:
        return (f"file {file.name} {file_sha256(file)}" for file in decisive_files(self.given))

    def check(self) -> list[Problem]:
        return check_checkpoint(self.given, "model.path")

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        return _load_directory(self.given, self.model)

    def parameters(self) -> int:
        return Checkpoint(self.given).numel

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.given, self.model)

    @property
    def told(self) -> str:
        return str(self.given)

    @property
    def origin(self) -> str:
        return f"A local checkpoint, {code(self.given.name)}."


class _Hub(Source):
    def decided_by(self) -> Iterator[str]:
        yield f"hub {self.given} {resolve_revision('model', self.given, self.model.revision)}"

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        folder = download(self.given, self.model.revision)
        if problems := check_checkpoint(folder, "model.hub"):
            raise CheckpointError(f"model {self.given}", problems)
        return _load_directory(folder, self.model)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        folder = cached_folder(self.given, self.model.revision)
        return None if folder is None else load_tokenizer(folder, self.model)

    @property
    def told(self) -> str:
        return str(self.given)

    @property
    def origin(self) -> str:
        return f"{code(self.given)}, revision {code(self.model.revision or 'main')}."


class _Gguf(Source):
    def decided_by(self) -> Iterator[str]:
        yield f"gguf {file_sha256(gguf_path(self.given))}"

    def check(self) -> list[Problem]:
        return check_gguf(self.given) or gguf_problems(gguf_path(self.given), "model.gguf.file")

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        return _load_gguf(self.given, self.model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        file = gguf_path(self.given)
        return checked_tokenizer(read_gguf_tokenizer(file), str(file), self.model)

    def parameters(self) -> int:
        return read_gguf(gguf_path(self.given)).parameters

    @property
    def told(self) -> str:
        return f"GGUF {self.given.file}"

    @property
    def origin(self) -> str:
        package = f" of the Python package {code(self.given.package)}" if self.given.package else ""
        return f"The GGUF file {code(Path(self.given.file).name)}{package}, dequantised."


class _Scratch(Source):
    def check(self) -> list[Problem]:
        problem = memory_problem(self.given.parameters, 4, "model.scratch")
        return [problem] if problem else []

    def decided_by(self) -> Iterator[str]:
        yield f"scratch {json.dumps(self.given.model_dump(), sort_keys=True)}"

    def load(self) -> tuple[Any, PreTrainedTokenizerBase]:
        from cpift.models.scratch import make_scratch_model

        tokenizer = self.tokenizer()
        network: Any = make_scratch_model(self.given, tokenizer)
        return network.to(dtype=_torch_dtype(self.model.dtype, "float32")), tokenizer

    def parameters(self) -> int:
        return int(self.given.parameters)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from cpift.models.scratch import make_scratch_tokenizer

        return checked_tokenizer(make_scratch_tokenizer(self.given), "model.scratch", self.model)

    @property
    def told(self) -> str:
        return "random weights"

    @property
    def origin(self) -> str:
        return "A small Llama with random weights, made on the spot. It is of use for tests only."


SOURCES: dict[str, type[Source]] = {"path": _Folder, "hub": _Hub, "gguf": _Gguf, "scratch": _Scratch}


def source_of(model: ModelConfig) -> Source:
    return entry(SOURCES, model.kind, "model")(model)
