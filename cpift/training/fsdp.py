"""Full fine-tunes of models that fit no single worker: FSDP2 (`fully_shard`), on GPUs and on CPU workers alike.

transformers' Trainer trains a model that is sharded already, but saves and restores no optimizer of it: that is here.
Its own two ways to shard are not used. `TrainingArguments(fsdp=...)` on the CPU trains with DDP and does not say so;
`from_pretrained(distributed_config=...)` shards tied embeddings before it ties them, and where the vocabulary does not
divide evenly the head of the last worker then stays behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainingArguments

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import TrainingConfig
from cpift.pretrained.sharded_state import read_state
from cpift.training.batches import BatchTrainer
from cpift.training.weights.reading import read_into

_SHARDS, _SCHEDULE = "shards", "schedule.pt"


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
