"""AdamW's second moments of a fine-tune, kept beside the model that it exports (`probe.keep_moments`).

They are in the optimizer when the last step is done; of a model that FSDP2 shares out, every worker has its share of
them, and they are gathered one parameter at a time, as the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cpift.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from cpift.checkpoints.layout import Layout
from cpift.checkpoints.opening import MOMENTS
from cpift.checkpoints.writing import Shard, write_index
from cpift.formats.safetensors import FileWriter, read_header
from cpift.training.spec import MomentsRecord
from cpift.training.weights.workers import full_tensor

_KIND = "BF16"  # has the exponents of float32: no moment that AdamW divides by becomes 0


@dataclass(frozen=True)
class SecondMoments:
    """`exp_avg_sq` by the names of the model's parameters, as the optimizer has them: whole, or this worker's share.

    Parameters that no gradient reached have none."""

    values: Mapping[str, torch.Tensor]
    shapes: Mapping[str, torch.Size]
    record: MomentsRecord

    def whole(self, name: str) -> torch.Tensor:
        """All of a parameter's in bf16, on the CPU; 0 where it has none. Collective."""
        if name in self.values:
            return full_tensor(self.values[name].to(torch.bfloat16)).cpu()
        return torch.zeros(self.shapes[name], dtype=torch.bfloat16)


def second_moments(model: torch.nn.Module, optimizer: Any) -> SecondMoments:
    """Those of AdamW after its last step. optimizer: torch's, or accelerate's around it."""
    adamw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    states = {name: adamw.state[one] for name, one in parameters.items() if "exp_avg_sq" in adamw.state.get(one, {})}
    steps = max((int(state["step"]) for state in states.values()), default=0)
    return SecondMoments(
        {name: state["exp_avg_sq"] for name, state in states.items()},
        {name: parameter.shape for name, parameter in parameters.items()},
        {"beta2": float(adamw.param_groups[0]["betas"][1]), "steps": steps},
    )


def write_moments(moments: SecondMoments, layout: Layout, origin: Checkpoint, out: Path, main: bool) -> None:
    """Write them as one file in the folder `out`: bf16, names and shapes of `origin`, which has this layout, of its
    floating-point tensors; 0 for what the class does not take. Collective."""
    infos = [replace(info, kind=_KIND) for info in origin.tensors.values() if info.floating]
    gathered = lru_cache(maxsize=2)(moments.whole)
    writer = FileWriter(out / MOMENTS, infos) if main else None
    for info in infos:
        if writer is None:  # gather with the main worker
            for holder, _ in layout.places.get(info.name, ()):
                gathered(holder)
            continue
        values = layout.tensor(info.name, gathered) if info.name in layout.places else torch.zeros(info.shape)
        writer.write(info.name, 0, values.to(info.dtype).contiguous())
    if writer is not None:
        writer.flush()
        writer.close()
        _tell_apart(out)


def _tell_apart(folder: Path) -> None:
    """Say in an index which file of a model's folder has its weights: programs that find none load every safetensors
    file, and would take moments, which have the same names, for weights."""
    if not (folder / INDEX_FILE).is_file():
        write_index([Shard(SINGLE_FILE, tuple(read_header(folder / SINGLE_FILE)))], folder, of_one=True)
