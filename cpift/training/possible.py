"""What fine-tunes ask for that this machine, or the class of their model, does not have: said before anything is done,
and by a worker of the model that it was given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cpift.config.training import TrainingConfig
from cpift.devices import Device
from cpift.errors import Problem
from cpift.pretrained.architecture import narrowing, recomputable, skeleton
from cpift.pretrained.attention import check_attention, mixing, not_attending
from cpift.training.adapters import check_lora, not_adapted

# What torch's compiler needs of the machine, by device: a variable that names it, and names that are looked for.
_COMPILERS: dict[Device, tuple[str, tuple[str, ...]]] = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang"))}


def missing_here(trainings: Sequence[TrainingConfig], device: Device) -> list[Problem]:
    """What fine-tunes on such a device need, and is not installed on this machine."""
    return [*check_lora(trainings), *_check_compiler(trainings, device), *check_attention(trainings, device)]


def impossible(folder: Path, training: TrainingConfig, section: str = "") -> list[Problem]:
    """What of a fine-tune the class of the model in a folder does not do; empty if it does all.

    section: of the config, whose fields are named. Raises CheckpointError.
    """
    at = f"{section}." if section else ""
    problems = mixing(folder, f"{at}packing") if training.packing else []
    problems += narrowing(folder, f"{at}gather") if training.gather == "bfloat16" else []
    problems += _not_compiled(folder, f"{at}compile") if training.compile else []
    if training.gradient_checkpointing is True and not recomputable(folder):
        what = "is true, and transformers' class of the model does not compute activations again"
        problems.append(Problem(f"{at}gradient_checkpointing", what, "write false, or auto"))
    problems += not_adapted(folder, training.lora, f"{at}lora") if training.lora is not None else []
    return problems + not_attending(folder, training, f"{at}attention")


def _check_compiler(trainings: Sequence[TrainingConfig], device: Device) -> list[Problem]:
    """What is missing for those that ask for compiled layers."""
    variable, names = _COMPILERS[device]
    names = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(training.compile for training in trainings) or any(shutil.which(name) for name in names):
        return []
    what = f"needs a C compiler, and {' or '.join(names)} is not installed"
    return [Problem("compile", what, f"install one, or name it in {variable}; or write false")]


def _not_compiled(folder: Path, where: str) -> list[Problem]:
    if skeleton(folder)._no_split_modules:
        return []
    return [Problem(where, "is true, and transformers does not say what the model's layers are", "write false")]
