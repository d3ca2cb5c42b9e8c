"""The weights that are trained, kept beside a fine-tune: their average, and copies of them on disk.

Of a sharded model every worker has its share, in memory and on disk; any number of workers can read the copies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.pretrained.sharded_state import read_state
from cpift.training.weights.workers import in_step, rank_here

Weights = Mapping[str, torch.Tensor]
_FILE = "model.safetensors"


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an optimizer moves, by name: the parameters themselves, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_weights(weights: Weights, folder: Path) -> None:
    """Keep a copy; `folder` has its name when it is whole. Collective: the first worker writes whole tensors."""
    partial = folder.with_name(f".{folder.name}.partial")
    if rank_here() == 0:
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    in_step()
    if any(isinstance(tensor, DTensor) for tensor in weights.values()):
        save(dict(weights), checkpoint_id=partial)
    elif rank_here() == 0:
        save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, partial / _FILE)
    in_step()
    if rank_here() == 0:
        os.rename(partial, folder)
    in_step()


def read_weights(weights: Weights, folder: Path) -> None:
    """Give `weights` the values of a copy, in place and bit for bit. Collective.

    Raises:
        CheckpointError: the copy cannot be read.
    """
    if any(isinstance(tensor, DTensor) for tensor in weights.values()):
        read_state(dict(weights), folder)
        return
    kept = Checkpoint(folder)
    for name, tensor in weights.items():
        tensor.copy_(kept.tensor(name))


class Average:
    """The exponential moving average of what is trained, in its dtype: a ← a + (1 − d)·(θ − a) after every step t,
    with d = min(decay, (1 + t) / (10 + t)), so that a short fine-tune does not remember its first weights for long
    (the rule of TensorFlow's ExponentialMovingAverage).

    An element that never moves has its own value, bit for bit: θ − a is 0 there.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self._trained, self._decay = trained(model), decay
        self.values = {name: tensor.clone() for name, tensor in self._trained.items()}

    def add(self, step: int) -> None:
        """Take in the weights after a step, which counts from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for own, tensor in self._pairs():
            own.lerp_(tensor, 1 - decay)

    def swap(self) -> None:
        """The average into the model and the model's weights here; once more, and all is as it was."""
        for own, tensor in self._pairs():
            held = tensor.clone()
            tensor.copy_(own)
            own.copy_(held)

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What this worker holds of each tensor: of the average, of the model."""
        return [(_local(self.values[name]), _local(tensor)) for name, tensor in self._trained.items()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
