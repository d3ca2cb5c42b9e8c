"""The batches of a fine-tune, as the model has the least to compute: rows behind each other without padding where it
keeps them apart, and logits only where a label is.

Short rows of unlike length are a third padding, and of a chat's tokens few have a label, while with 49 k words the head
is a fifth of a small model. Sums are the same; they are added in another order, so their last bits differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from cpift.config.training import WARMUPS, TrainingConfig
from cpift.data.packing import append, new_row
from cpift.data.tokenise import IGNORED, CompletionCollator, padded_length
from cpift.errors import entry
from cpift.pretrained.attention import keeps_apart, takes_lengths
from cpift.training.optimizers import OPTIMIZERS, Group
from cpift.training.steps import exact_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batch = dict[str, Any]  # tensors, and numbers that go to the model as they are


@dataclass(frozen=True)
class Abilities:
    """What a model can be given. `width`: its hidden size, 0 where it does not keep the examples of a row apart;
    `chooses`: whether it computes logits at chosen positions alone; `lengths`: whether its attention has no mask, and
    is told where examples begin."""

    width: int
    chooses: bool
    lengths: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> Abilities:
        network: Any = getattr(model, "get_base_model", lambda: model)()  # under adapters
        config, asked = network.config, inspect.signature(network.forward).parameters
        apart = keeps_apart(config.to_dict()) and "position_ids" in asked
        chooses = "logits_to_keep" in asked and network.loss_function is ForCausalLMLoss
        return cls(int(config.hidden_size) if apart else 0, chooses, apart and takes_lengths(config))


class Batches:
    """Makes a batch of rows with `input_ids` and `labels`, padded or behind each other, whichever costs less; or padded
    to `length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, abilities: Abilities, length: int | None = None):
        self._padded, self._abilities, self._fixed = CompletionCollator(tokenizer, length), abilities, bool(length)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """`input_ids`, `attention_mask` or `position_ids`, and `labels` of shape (rows, length), int64.

        Of rows behind each other, shape (1, tokens), both: the mask, all ones, is for who counts tokens. Where the
        model chooses, `logits_to_keep` (columns) and `shift_labels` (rows, columns): the labels that follow these.
        Where it is told lengths, `cu_seq_lens_q` and `_k` (int32, examples + 1) and the longest, `max_length_q` and
        `_k`.
        """
        batch = _joined(rows) if self._joins(rows) else self._padded(rows)
        if self._abilities.lengths:
            batch |= _lengths(batch["position_ids"])
        return batch | _columns(batch["labels"]) if self._abilities.chooses else batch

    def _joins(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether one row of all tokens costs less than padded ones; a flash kernel computes no pair across examples,
        and takes several from one row alone.

        A layer of width d takes about 24·d² operations a token in its matrices, and 4·d for each pair of tokens of a
        row: among all of one row, masked or not.
        """
        lengths, width = [len(row["input_ids"]) for row in rows], self._abilities.width
        if self._abilities.lengths:
            return True
        if self._fixed or not width or "position_ids" in rows[0]:
            return False
        tokens, longest = sum(lengths), padded_length(rows)
        return tokens * (6 * width + tokens) < len(rows) * longest * (6 * width + longest)


def _joined(rows: Sequence[dict[str, Any]]) -> Batch:
    joined = new_row()
    for row in rows:
        append(joined, row)
    batch = {name: torch.tensor([values]) for name, values in joined.items()}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def _lengths(positions: torch.Tensor) -> dict[str, Any]:
    """Where the examples of one row begin and the last ends, as transformers' flash attention takes it."""
    begins = (positions[0] == 0).nonzero()[:, 0]
    ends = torch.cat([begins, torch.tensor([positions.shape[1]])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _columns(labels: torch.Tensor) -> Batch:
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    columns = (following != IGNORED).any(0).nonzero()[:, 0]
    return {"logits_to_keep": columns, "shift_labels": following[:, columns].contiguous()}


class BatchTrainer(Trainer):
    """A Trainer that knows `Batches`: it counts tokens by the mask of rows behind each other, which their model must
    not get, for with a mask none is built from positions."""

    def __init__(self, *, training: TrainingConfig, **rest: Any):
        self._training = training
        super().__init__(**rest)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' AdamW, or what `optimizer` names, over the same groups: with weight decay and without."""
        make = entry(OPTIMIZERS, self._training.optimizer, "optimizer")
        if make is None or self.optimizer is not None:
            return super().create_optimizer(model)
        network: Any = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(network))
        moved = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        groups: list[Group] = [
            {
                "params": [parameter for name, parameter in moved if (name in decaying) is decays],
                "lr": self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        self.optimizer = make(network, [group for group in groups if group["params"]])
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Of the learning rate, transformers' own or that of `warmup: exact`."""
        if not entry(WARMUPS, self._training.warmup, "warmup") or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        shares = exact_schedule(self._training, num_training_steps)
        steps: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(steps, shares)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, *what: Any, **named: Any) -> None:
        """A stage that was stopped after its last step has none left, though transformers would take one more."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*what, **named)  # type: ignore[no-untyped-call]  # theirs has no types

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *rest: Any, **options: Any) -> Any:
        """transformers' loss of the batch."""
        if "position_ids" in inputs:
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return super().compute_loss(model, inputs, *rest, **options)
