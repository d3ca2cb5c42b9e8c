"""LoRA fine-tunes: adapters are trained, whole models are kept.

Core regions, fusion and evaluation see the merged weights only: |θi − θ0| of a LoRA probe is the full-rank update that
its adapters imply, and zero outside their targets.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpift.config.run import TrainingConfig
from cpift.config.training import LoraConfig
from cpift.devices import Device, resolved
from cpift.disk.facts import remembered
from cpift.errors import CheckpointError, Problem, first_line
from cpift.pretrained.architecture import config_text
from cpift.pretrained.loading import empty_network, load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TARGETS = "name modules of this model"


def check_lora(trainings: Sequence[TrainingConfig]) -> list[Problem]:
    """What is missing for those that ask for LoRA."""
    if any(training.lora for training in trainings) and importlib.util.find_spec("peft") is None:
        return [Problem("lora", "needs peft, which is not installed", "pip install 'cpift[peft]', or leave `lora` out")]
    return []


def not_adapted(folder: Path, lora: LoraConfig, where: str) -> list[Problem]:
    """Why the model in a folder takes no such adapters, as peft says it; empty if it does, or if there is no peft.

    where: the field of the targets. Raises CheckpointError.
    """
    if importlib.util.find_spec("peft") is None:
        return []
    asked = [config_text(folder), lora.model_dump(mode="json", include={"targets"}), version("peft")]
    problems = remembered("no adapters", asked, lambda: _not_adapted(folder, lora))
    return [Problem(where, what, _TARGETS) for what in problems]


def _not_adapted(folder: Path, lora: LoraConfig) -> list[str]:
    import torch

    with torch.device("meta"):
        model = empty_network(folder, dtype=torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of what it sets right by itself
            with_adapters(model, lora, 0)
    except CheckpointError as error:
        return [problem.what for problem in error.problems]
    return []


def load_adapted(
    folder: Path, training: TrainingConfig, device: Device, seed: int, saved: Path | None = None
) -> PreTrainedModel:
    """The model in a folder `with_adapters`; its own weights as they are stored where products are bfloat16."""
    import torch

    from cpift.training.weights.reading import load_whole

    assert training.lora is not None
    narrow = resolved(training.precision, device) == "bfloat16"
    return with_adapters(load_whole(folder, torch.float32, device, narrow), training.lora, seed, saved)


def with_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int, saved: Path | None = None) -> PreTrainedModel:
    """The model with adapters beside its weights, and only these to train: new ones, or those in the folder `saved`;
    in float32, whatever the weights beside them are.

    Raises:
        CheckpointError: no module has a name that ends in one of the targets.
    """
    import peft
    import torch

    from cpift.training.weights.frozen import seen_as_float32

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared int, any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if saved is not None:
        with seen_as_float32(model):
            return load_adapter(model, saved, config)
    with torch.random.fork_rng(), seen_as_float32(model):
        torch.manual_seed(seed)
        try:
            adapted: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise CheckpointError("model", [Problem("lora.targets", first_line(error), _TARGETS)]) from error
    return cast("PreTrainedModel", adapted)


def merge_adapters(model: Any) -> PreTrainedModel:
    """W + (alpha / rank)·B·A in place of W; a model without adapters as it is."""
    merged_model: PreTrainedModel = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return merged_model
