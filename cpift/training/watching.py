"""What looks at a stage while it trains: the loss on rows that are held out, the weights where it was lowest, an end
where it no longer falls, and the average of the weights.

Looking changes nothing: no random number is drawn, and the average's values stand in the model only meanwhile.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cpift.config.training import KEEPS, TrainingConfig
from cpift.data.tokenise import IGNORED
from cpift.disk.files import link_folder
from cpift.errors import entry
from cpift.training.batches import Batch, BatchTrainer
from cpift.training.spec import HeldOutRow
from cpift.training.weights.copies import Average, read_weights, trained, write_weights
from cpift.training.weights.workers import in_step, rank_here, workers_here

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)
_AVERAGE, _BEST = "average", "best"  # folders of a checkpoint


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a Trainer has just saved."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def best_of(losses: Sequence[HeldOutRow]) -> HeldOutRow | None:
    """The lowest of a stage's losses, the first of equal ones; None where none is a number."""
    numbers = [row for row in losses if math.isfinite(row["loss"])]
    return min(numbers, key=lambda row: row["loss"], default=None)


class Averaging(TrainerCallback):
    """Keeps the average of a stage's weights, also in its checkpoints. `resumed`: the one that it goes on from."""

    def __init__(self, decay: float, resumed: Path | None):
        self._decay, self._resumed = decay, resumed
        self._average: Average | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._average = Average(kw["model"], self._decay)
        if self._resumed is not None:
            read_weights(self._average.values, self._resumed / _AVERAGE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.average.add(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        write_weights(self.average.values, checkpoint_folder(args, state) / _AVERAGE)

    @property
    def average(self) -> Average:
        assert self._average is not None
        return self._average

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the average's values."""
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()


class Watch(TrainerCallback):
    """Computes held-out losses and decides by them.

    rows: held out, as tokens. losses: of the whole fine-tune, which this adds to. folder: the stage's. resumed: the
    checkpoint that it goes on from. alive: called while it computes.
    """

    trainer: BatchTrainer  # of the stage: it comes after what calls it back

    def __init__(
        self,
        training: TrainingConfig,
        index: int,
        rows: Dataset,
        losses: list[HeldOutRow],
        folder: Path,
        resumed: Path | None,
        averaging: Averaging | None,
        alive: Callable[[], None],
    ):
        self._training, self._index, self._rows, self._losses = training, index, rows, losses
        self._folder, self._resumed, self._averaging, self._alive = folder, resumed, averaging, alive
        self._keeps = entry(KEEPS, training.keep, "keep")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        best = best_of(self._here)
        if self._keeps and best is not None and self._resumed is not None and rank_here() == 0:
            link_folder(self._resumed / _BEST, self._kept(best))
        in_step()
        control.should_training_stop = self._ends()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        every = self._training.evaluate_every
        if not every or (state.global_step % every and state.global_step < state.max_steps):
            return
        before, row = best_of(self._here), self._look(state.global_step)
        self._tell(row, control)
        if self._keeps and best_of(self._here) is row:
            self._keep(row, before, kw["model"])
        if self._ends():
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        best = best_of(self._here)
        if self._keeps and best is not None and rank_here() == 0:
            link_folder(self._kept(best), checkpoint_folder(args, state) / _BEST)

    def finish(self, model: torch.nn.Module) -> None:
        """Give the model what its stage ends with, where that is not what it has."""
        best = best_of(self._here) if self._keeps else None
        if best is not None:
            read_weights(trained(model), self._kept(best))

    @property
    def _here(self) -> list[HeldOutRow]:
        """The stage's losses."""
        return [row for row in self._losses if row["stage"] == self._index]

    def _ends(self) -> bool:
        best, patience = best_of(self._here), self._training.patience
        after = self._here if best is None else [row for row in self._here if row["step"] > best["step"]]
        return patience is not None and len(after) >= patience

    def _look(self, step: int) -> HeldOutRow:
        if self._averaging is None:
            loss, tokens = held_out_loss(self.trainer, self._rows, self._training.batch_size, self._alive)
        else:
            with self._averaging.in_place():
                loss, tokens = held_out_loss(self.trainer, self._rows, self._training.batch_size, self._alive)
        row: HeldOutRow = {"stage": self._index, "step": step, "loss": loss, "tokens": tokens}
        self._losses.append(row)
        _log.info("stage %d, step %d: held-out loss %.6f of %d tokens", self._index, step, loss, tokens)
        return row

    def _tell(self, row: HeldOutRow, control: TrainerControl) -> None:
        """To trackers, as transformers names it. What the Trainer was to log of this step, it still is."""
        wanted = control.should_log
        self.trainer.log({"eval_loss": row["loss"]})
        control.should_log = wanted

    def _keep(self, row: HeldOutRow, before: HeldOutRow | None, model: torch.nn.Module) -> None:
        """The new one is there before the one before it goes."""
        weights = trained(model) if self._averaging is None else self._averaging.average.values
        write_weights(weights, self._kept(row))
        if before is not None and rank_here() == 0:
            shutil.rmtree(self._kept(before), ignore_errors=True)

    def _kept(self, row: HeldOutRow) -> Path:
        return self._folder / f"{_BEST}-{row['step']}"


@torch.no_grad()
def held_out_loss(
    trainer: BatchTrainer, rows: Dataset, batch_size: int, alive: Callable[[], None] = lambda: None
) -> tuple[float, int]:
    """Mean negative log-likelihood (nats) of a label over all rows, as the model's loss has it, and how many labels.

    Workers share the batches out. All have as many, as a sharded model asks; what is too much counts nothing. Sums are
    in fp64, in the order of the workers, so that all get the same bits. Collective.
    """
    model, workers = trainer.model, workers_here()
    assert isinstance(model, torch.nn.Module)
    assert trainer.data_collator is not None
    places = range(0, len(rows), batch_size)
    mine = [*places[rank_here() :: workers]]
    mine += [0] * (math.ceil(len(places) / workers) - len(mine))
    total, labels = 0.0, 0
    with _still(model):
        for number, place in enumerate(mine):
            batch: Batch = trainer.data_collator(list(rows.select(range(place, min(place + batch_size, len(rows))))))
            counted = _labels(batch) if rank_here() + number * workers < len(places) else 0
            loss = float(trainer.compute_loss(model, trainer._prepare_inputs(batch)))
            total, labels = total + (loss * counted if counted else 0.0), labels + counted
            alive()
    sums = _of_all((total, labels))
    return math.fsum(one for one, _ in sums) / sum(one for _, one in sums), sum(one for _, one in sums)


def _labels(batch: Batch) -> int:
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return int((labels != IGNORED).sum())


@contextmanager
def _still(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; afterwards as it was, sharded ones with their shares alone."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _of_all(value: tuple[float, int]) -> list[tuple[float, int]]:
    if workers_here() == 1:
        return [value]
    values: list[Any] = [None] * workers_here()
    torch.distributed.all_gather_object(values, value)
    return values
