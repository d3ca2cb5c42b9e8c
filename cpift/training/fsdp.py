"""Full fine-tunes of models that fit no single worker: FSDP2 (`fully_shard`), on GPUs and on CPU workers alike.

transformers' Trainer trains a model that is sharded already, but saves and restores no optimizer of it: that is here.
Its own two ways to shard are not used. `TrainingArguments(fsdp=...)` on the CPU trains with DDP and does not say so;
`from_pretrained(distributed_config=...)` shards tied embeddings before it ties them, and where the vocabulary does not
divide evenly the head of the last worker then stays behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.initialization import no_init_weights

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout, checkpoint_layout, require_whole
from cpift.checkpoints.writing import write_like
from cpift.config.run import TrainingConfig
from cpift.devices import Device
from cpift.formats.safetensors import TensorInfo
from cpift.pretrained.loading import empty_network
from cpift.pretrained.sharded_state import read_state
from cpift.training.batches import BatchTrainer

_SHARDS, _SCHEDULE = "shards", "schedule.pt"


def workers_here() -> int:
    """How many workers train together: the size of the process group, 1 without one."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if group else 1


def rank_here() -> int:
    """This worker's number among those that train together."""
    return torch.distributed.get_rank() if workers_here() > 1 else 0


def load_sharded(path: Path, dtype: torch.dtype, device: Device) -> PreTrainedModel:
    """The model of a local safetensors folder, sharded over the workers of the process group. Collective.

    A unit is one decoder layer; embeddings, last norm and head are another, so that tied ones are gathered as one. A
    worker reads its own rows of each tensor: memory is touched for its share of the model and, on a GPU, one layer.
    """
    with no_init_weights():  # allocated, never written: pages that no worker keeps cost nothing
        model: Any = empty_network(path, dtype=dtype)
    model.tie_weights()
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    read_into(model, Checkpoint(path))
    model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True  # what Trainer looks for
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def read_into(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model's parameters the values of a checkpoint of its class, whatever layout that has; of sharded ones,
    this worker's share.

    Raises CheckpointError naming parameters that the checkpoint does not give.
    """
    layout = checkpoint_layout(checkpoint)
    require_whole(layout, checkpoint.folder)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in layout.blocks:
            values = layout.parameter(name, checkpoint.mapped)  # so that only the rows taken of it are read
            if isinstance(parameter, DTensor):
                mesh, placed = parameter.device_mesh, parameter.placements
                mine = distribute_tensor(values, mesh, placed, src_data_rank=None)
                parameter.to_local().copy_(mine.to_local())
            else:
                parameter.copy_(values)


def write_trained(model: PreTrainedModel, layout: Layout, origin: Checkpoint, out: Path, main: bool) -> None:
    """Write a model, sharded or not, with the names, dtypes and files of `origin`, which has this layout. Collective.

    Tensors that the class does not take, or that it makes itself, are the origin's.
    """
    state, gathered = model.state_dict(), lru_cache(maxsize=2)(lambda name: full_tensor(state[name].detach()).cpu())

    def produce(info: TensorInfo) -> torch.Tensor:
        if info.name not in layout.places:
            return origin.tensor(info.name)
        return layout.tensor(info.name, gathered).to(info.dtype)

    if main:
        out.mkdir(parents=True, exist_ok=True)
        write_like(origin, out, produce)
    else:  # gather with the main worker, in the order in which it writes
        for info in (info for file in origin.files for info in origin.tensors.values() if info.file == file):
            for holder, _ in layout.places.get(info.name, ()):
                gathered(holder)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a parameter on this worker, if it is sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_whole(model: PreTrainedModel, folder: Path, main: bool) -> None:
    """`save_pretrained` by the main worker of a model that may be sharded. Collective."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        state: dict[str, torch.Tensor] = {}
        for name, tensor in _untied_state(model):
            gathered = full_tensor(tensor)
            if main:
                state[name] = gathered.cpu()
        if main:
            model.save_pretrained(folder, state_dict=state)
    elif main:
        model.save_pretrained(folder)


def _untied_state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict without the further names of tied parameters."""
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)


class WholeTrainer(BatchTrainer):
    """A Trainer that resumes through transformers' conversion: its own way passes over tensors whose names in the file
    are not those of the class, the experts of every layer among them, and trains on with the weights it has."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        network = model or self.model
        if isinstance(network, PreTrainedModel):
            read_into(network, Checkpoint(Path(resume_from_checkpoint)))
        else:  # adapters beside a model that is as it was
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class ShardedTrainer(BatchTrainer):
    """A Trainer whose checkpoints hold sharded weights and moments; any number of workers can read them again."""

    def __init__(self, *, args: TrainingArguments, training: TrainingConfig, **rest: Any):
        args.save_only_model = True  # Trainer refuses a sharded model otherwise, for it could not save its optimizer
        super().__init__(args=args, training=training, **rest)
        args.save_only_model = False

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Around the batches of an accumulation but its last."""
        network = self._network
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The folder of a checkpoint; its weights are written together with the optimizer's moments."""
        Path(output_dir or self.args.output_dir or ".").mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save(self._state(), checkpoint_id=Path(output_dir) / _SHARDS)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing yet: the weights come with the optimizer's moments, when there is an optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._state()
        read_state(state, Path(checkpoint) / _SHARDS)
        set_state_dict(
            self._network, self._inner_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True))

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._network, self._inner_optimizer)
        return {"model": model, "optimizer": optimizer}

    @property
    def _network(self) -> torch.nn.Module:
        assert isinstance(self.model, torch.nn.Module)
        return self.model

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        return inner
