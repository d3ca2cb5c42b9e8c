"""Networks from files, with all of their tensors, whoever wrote the files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.layout import key_mapping, require_trainable
from cpift.config.run import ModelConfig
from cpift.errors import CheckpointError, CpiftError, Problem
from cpift.models.tokenizer import checked_tokenizer, load_tokenizer
from cpift.pretrained import loading as pretrained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: Path, dtype: torch.dtype | None = None, tensors: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """The model in a local safetensors directory, in evaluation mode, in its own dtype unless one is given.

    tensors: by the names of files, in the place of the directory's; its files beside them decide what is made of them.

    Raises:
        CheckpointError: a tensor is missing or of another shape than config.json says.
    """
    with pretrained.no_progress_bars(), _checkpoint_errors(path):
        loaded: Any = pretrained.load_network(
            path,
            tensors,
            dtype=dtype or "auto",
            key_mapping=key_mapping(path) if tensors is None else None,  # merged ones have the names of the class
            ignore_mismatched_sizes=True,  # so that they are listed; _checked_network refuses them
            output_loading_info=True,
        )
    return _checked_network(loaded, path)


def load_directory(path: Path, model: ModelConfig, chats: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """θ0 in a local directory, in the dtype that the config says, and its tokenizer (`load_tokenizer`)."""
    network = load_model(path, None if model.dtype == "auto" else torch_dtype(model.dtype))
    require_trainable(path)  # of a hub's repository it shows only now
    return network, load_tokenizer(path, model, chats)


def load_gguf(
    file: Path, model: ModelConfig, dtype: str, chats: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """θ0 in a GGUF file, dequantised, and its tokenizer."""
    with pretrained.no_progress_bars(), _checkpoint_errors(file):
        loaded, tokenizer = pretrained.load_gguf(file, torch_dtype(dtype))
    network = _checked_network(loaded, file)
    # The weights are dense now; transformers refuses to save a model that still says it is quantised.
    for holder, name in ((network.config, "quantization_config"), (network, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    return network, checked_tokenizer(tokenizer, str(file), model, chats)


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by its name in a config."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checked_network(loaded: tuple[PreTrainedModel, Any], path: Path) -> PreTrainedModel:
    """The model of `from_pretrained(..., output_loading_info=True)`, if every tensor of it came from the file."""
    network, info = loaded
    problems = [Problem(str(path), f"tensor {name} is missing", "restore it") for name in sorted(info["missing_keys"])]
    problems += [
        Problem(str(path), f"tensor {name} has shape {tuple(shape)}, config.json says {tuple(wanted)}", "restore it")
        for name, shape, wanted in sorted(info["mismatched_keys"])
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
