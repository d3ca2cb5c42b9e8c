"""A checkpoint into the model that is to be trained: every worker reads what it holds, to where it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout, checkpoint_layout, require_whole
from cpift.devices import Device
from cpift.pretrained.attention import implementation
from cpift.pretrained.conversion import Block
from cpift.pretrained.loading import empty_network
from cpift.training.weights.frozen import hold_as_stored, stored_dtypes
from cpift.training.weights.quantised import hold_in_nf4
from cpift.training.weights.units import units_of
from cpift.training.weights.workers import own_rows


def load_whole(
    path: Path,
    dtype: torch.dtype,
    device: Device,
    as_stored: bool = False,
    nf4: torch.dtype | None = None,
    attention: str = "auto",
) -> PreTrainedModel:
    """The model of a local safetensors folder in `dtype`, on `device`. A GPU's takes no room in this machine's memory:
    tensor after tensor goes there as the file has it, and is widened there.

    as_stored: linear layers are not to be trained, and are no wider than in the file (`frozen.py`). nf4: neither are
    they, and they are held in 4 bits and multiply in this dtype (`quantised.py`). attention: as a config names it.

    Raises CheckpointError naming parameters that the folder does not give.
    """
    model, checkpoint, there = _unwritten(path, dtype, attention), Checkpoint(path), torch.device(device)
    if as_stored:
        hold_as_stored(model, stored_dtypes(checkpoint))
    taken = {} if nf4 is None else hold_in_nf4(model, nf4, there)
    _saved_as_read(model, read_into(model, checkpoint, there, taken))
    return cast(PreTrainedModel, model.to(device).eval())


def load_sharded(
    path: Path, dtype: torch.dtype, device: Device, narrow: bool = False, attention: str = "auto"
) -> PreTrainedModel:
    """The same, sharded over the workers of the process group. Collective.

    A unit is one decoder layer; embeddings, last norm, head and what layers share are another, so that tied parameters
    are gathered as one. A worker reads its own rows of each tensor: memory is touched for its share of the model and,
    on a GPU, one layer.

    narrow: units are gathered, and computed with, as bfloat16; gradients are summed over the workers as float32.
    """
    model = _unwritten(path, dtype, attention)
    how: dict[str, Any] = {"mesh": init_device_mesh(device, (torch.distributed.get_world_size(),))}
    if narrow:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in units_of(model):
        fully_shard(unit, **how)
    fully_shard(model, **how)
    _saved_as_read(model, read_into(model, Checkpoint(path)))
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True  # what Trainer looks for
    return cast(PreTrainedModel, model.eval())


def _unwritten(path: Path, dtype: torch.dtype, attention: str) -> Any:
    """The network of a folder, allocated and never written: pages that nobody writes cost nothing."""
    name = implementation(attention).name
    with no_init_weights():
        model = empty_network(path, dtype=dtype, **({} if name is None else {"attn_implementation": name}))
    model.tie_weights()
    return model


def _saved_as_read(model: Any, layout: Layout) -> None:
    """A file in the class's own layout: `save_pretrained` would take the model for one of the layout before, if its
    class has one, and write that."""
    if all(layout.same(name) == name for name in layout.blocks):
        model._weight_conversions = []


@torch.no_grad()
def read_into(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    device: torch.device | None = None,
    taken: Mapping[str, Callable[[torch.Tensor], None]] | None = None,
) -> Layout:
    """Give a model's parameters and kept buffers the values of a checkpoint of its class, whatever layout that has; of
    sharded ones, this worker's rows. Returns that layout.

    device: where parameters that are not sharded are put; default: where they are. taken: what gets the values of some
    parameters, as the file has them, in the place of these.

    Raises CheckpointError naming parameters that the checkpoint does not give.
    """
    layout = checkpoint_layout(checkpoint)
    require_whole(layout, checkpoint.folder)
    for name, held in model.state_dict(keep_vars=True).items():
        blocks = layout.blocks.get(name, ())
        if taken and name in taken:
            taken[name](layout.parameter(name, checkpoint.mapped))
            _release(checkpoint, blocks)
            continue
        if isinstance(held, DTensor):
            target, rows = held.to_local(), own_rows(held)
        else:
            target, rows = held, None
            if device is not None and held.device != device:
                held.data = torch.empty_like(held, device=device)
        if blocks and target.numel():
            values = layout.parameter(name, checkpoint.mapped, rows)  # so that only the rows taken of it are read
            target.copy_(values.to(target.device))  # narrow, if the file is
            del values
            _release(checkpoint, blocks)
    return layout


def _release(checkpoint: Checkpoint, blocks: Iterable[Block]) -> None:
    for tensor in {block.tensor for block in blocks}:
        checkpoint.release(tensor, 0, checkpoint.tensors[tensor].numel)
