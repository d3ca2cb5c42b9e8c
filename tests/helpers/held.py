"""What a real forward pass keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from cpift.config.training import TrainingConfig


def held(model: Any, training: TrainingConfig) -> int:
    """Bytes of different storages that a real forward pass keeps, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros((training.batch_size, training.max_length), dtype=torch.long)
    packed = {"position_ids": torch.arange(training.max_length).remainder(7).expand(ids.shape)}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        products = torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bfloat16")
        with products:
            model(input_ids=ids, labels=ids, use_cache=False, **(packed if training.packing else {}))
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
