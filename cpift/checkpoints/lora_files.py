"""What an adapter's files hold: by module, the factors and the parameters that were trained whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora_config import adapter_settings, setting_problems
from cpift.disk.mapped import MappedFile
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import FormatError, TensorInfo, read_header
from cpift.pretrained.architecture import tied_names

if TYPE_CHECKING:
    pass

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<part>[AB])(\.weight)?")
_TRAINING_ONLY = (".lora_velora_embed",)  # VeLoRA's, for the backward pass


def require_plain(folder: Path) -> None:
    """Raise CheckpointError for what can be told of an adapter that is no plain LoRA, or unreadable, without its θ0."""
    problems = list(setting_problems(adapter_settings(folder)))
    if not problems:
        tensors_of(folder, problems)
    if problems:
        raise CheckpointError(f"adapter {folder}", problems)


def unties(folder: Path, base: Checkpoint) -> bool:
    """Whether an adapter makes two tensors of one that θ0 ties: it changes them apart, as PEFT computes it.

    What was trained whole (`modules_to_save`) or has factors is a change to its own name alone; a tensor that is only
    kept in the file, for it was resized or is a target, goes into the one tensor of both names.
    """
    if not base.ties:
        return False
    settings = adapter_settings(folder)
    changes = changes_in(tensors_of(folder, []))
    own = {
        module: change
        for module, change in changes.items()
        if change.factors or (change.full and own_copy(settings, module))
    }
    pairs = [(one.rpartition(".")[0], other.rpartition(".")[0]) for one, other in tied_names(base.folder).items()]
    return any(
        (one in own or other in own) and not same_change(changes.get(one), changes.get(other)) for one, other in pairs
    )


@dataclass(frozen=True)
class Change:
    """What an adapter's file holds of one module."""

    full: dict[str, TensorInfo]  # by parameter: weight, bias
    factors: dict[str, TensorInfo]  # A [K, inputs] and B [outputs, K]
    unknown: list[str]


def changes_in(parts: Mapping[str, TensorInfo]) -> dict[str, Change]:
    """The tensors of an adapter's file by the module that they change."""
    changes: dict[str, Change] = {}
    for key, info in parts.items():
        if key.endswith(_TRAINING_ONLY) or ".original_module." in key:  # beside its trained copy, which is used
            continue
        name = key.removeprefix(ADAPTER_PREFIX)
        part = _PART.fullmatch(name)
        # PEFT keeps an adapted embedding beside its factors (base_layer); the product is added to that.
        module, _, parameter = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".").rpartition(".")
        change = changes.setdefault(part["module"] if part else module, Change({}, {}, []))
        if part:
            change.factors[part["part"]] = info
        elif "lora_" in name or "token_adapter" in name:
            change.unknown.append(key)
        else:
            change.full[parameter] = info
    return changes


def same_change(one: Change | None, other: Change | None) -> bool:
    """Whether tied modules get the same values: PEFT writes both where it keeps them tied."""
    if one is None or other is None or one.factors.keys() != other.factors.keys():
        return False
    if ("weight" in one.full) != ("weight" in other.full):
        return False
    swapped = {"A": "B", "B": "A"}  # of an embedding and a linear layer, whose products are each other's transpose
    pairs = [(info, other.factors[swapped[part]]) for part, info in one.factors.items()]
    stored = [(info, other.full[name]) for name, info in one.full.items() if name in other.full]
    return all(_equal(mine, theirs, transposed=True) for mine, theirs in pairs) and all(
        _equal(mine, theirs) for mine, theirs in stored
    )


def _equal(one: TensorInfo, other: TensorInfo, transposed: bool = False) -> bool:
    import torch

    mine, theirs = (
        MappedFile(info.file).view(info.start, info.dtype, info.numel).reshape(info.shape) for info in (one, other)
    )
    return torch.equal(mine.T if transposed else mine, theirs)


def own_copy(settings: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT has a copy of its own of a module that is in the file: `modules_to_save`."""
    saved: Sequence[str] = settings.get("modules_to_save") or ()
    return any(module == name or module.endswith(f".{name}") for name in saved)


def tensors_of(folder: Path, problems: list[Problem]) -> dict[str, TensorInfo]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "is pickled (adapter_model.bin), which can run code when loaded" if pickled else "is not there"
        problems.append(Problem(ADAPTER_WEIGHTS, what, "save the adapter again with PEFT, which writes safetensors"))
        return {}
    try:
        return {info.name: info for info in read_header(file)}
    except (FormatError, OSError) as error:
        problems.append(Problem(file.name, f"cannot be read ({error})", "download or copy it again"))
        return {}
