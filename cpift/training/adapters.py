"""LoRA fine-tunes: adapters are trained, whole models are kept.

Core regions, fusion and evaluation see the merged weights only: |θi − θ0| of a LoRA probe is the full-rank update that
its adapters imply, and zero outside their targets.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
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
    import torch
    from transformers import PreTrainedModel

    from cpift.checkpoints.checkpoint import Checkpoint
    from cpift.checkpoints.layout import Layout

_TARGETS = "name modules of this model"


def check_lora(trainings: Sequence[TrainingConfig]) -> list[Problem]:
    """What is missing for those that ask for LoRA."""
    asked, problems = [training.lora for training in trainings if training.lora], []
    if asked and importlib.util.find_spec("peft") is None:
        remedy = "pip install 'cpift[peft]', or leave `lora` out"
        problems.append(Problem("lora", "needs peft, which is not installed", remedy))
    if any(lora.in_four_bits for lora in asked) and importlib.util.find_spec("bitsandbytes") is None:
        remedy = "pip install 'cpift[qlora]', or write base: stored"
        problems.append(Problem("lora.base", "nf4 needs bitsandbytes, which is not installed", remedy))
    return problems


def not_adapted(folder: Path, lora: LoraConfig, where: str) -> list[Problem]:
    """Why the model in a folder takes no such adapters, as peft says it, or is not held in 4 bits beside them; empty
    if it does and is, or if there is no peft.

    where: the section. Raises CheckpointError.
    """
    from cpift.training.weights.quantised import not_quantised

    if importlib.util.find_spec("peft") is None:
        return []
    if lora.in_four_bits and (problems := not_quantised(folder, f"{where}.base")):
        return problems
    asked = [config_text(folder), lora.model_dump(mode="json", include={"targets"}), version("peft")]
    reasons = remembered("no adapters", asked, lambda: _not_adapted(folder, lora))
    return [Problem(f"{where}.targets", what, _TARGETS) for what in reasons]


def _not_adapted(folder: Path, lora: LoraConfig) -> list[str]:
    import torch

    with torch.device("meta"):
        model = empty_network(folder, dtype=torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of what it sets right by itself
            adapted: Any = with_adapters(model, lora, 0)
    except CheckpointError as error:
        return [problem.what for problem in error.problems]
    holders = Counter(id(parameter) for _, parameter in adapted.named_parameters(remove_duplicate=False))
    return [
        f"{name} shares its weights with another layer, which a merged adapter would change too"
        for name, layer in adapted.get_base_model().named_modules()
        if hasattr(layer, "get_delta_weight") and holders[id(layer.weight)] > 1
    ]


def load_adapted(
    folder: Path, training: TrainingConfig, device: Device, seed: int, saved: Path | None = None
) -> PreTrainedModel:
    """The model in a folder `with_adapters`; its own weights as they are stored where products are bfloat16, or in 4
    bits where `lora.base` says so."""
    import torch

    from cpift.training.weights.reading import load_whole

    assert training.lora is not None
    narrow = resolved(training.precision, device) == "bfloat16"
    how: dict[str, Any] = {"as_stored": narrow}
    if training.lora.in_four_bits:
        how = {"nf4": torch.bfloat16 if narrow else torch.float32}
    model = load_whole(folder, torch.float32, device, **how, attention=training.attention)
    return with_adapters(model, training.lora, seed, saved)


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


def merged_weights(model: Any, layout: Layout, origin: Checkpoint) -> torch.nn.Module:
    """What a fine-tune of `origin` keeps: `merge_adapters`, on θ0 as it is stored where 4 bits stood in for it."""
    from cpift.training.weights.quantised import Merged

    if getattr(model, "is_loaded_in_4bit", False):
        return Merged(model, layout, origin)
    return merge_adapters(model)


def merge_adapters(model: Any) -> PreTrainedModel:
    """W + (alpha / rank)·B·A in place of W; a model without adapters as it is."""
    merged_model: PreTrainedModel = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return merged_model
