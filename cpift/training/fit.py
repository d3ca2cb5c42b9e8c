"""One fine-tune, inside one worker: a sequence of stages, each a transformers.Trainer run on the model of the last.

A probe is one stage on one task; the staged backbone trains group after group; integration does so with earlier cores
frozen. The model is trained in float32, its products computed as `precision` says, and exported in θ0's dtypes.
Ray is not imported here: `cluster/fits.py` wires the hooks to Ray Train, a test may pass its own.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.layout import Layout, ParameterMasks, checkpoint_layout, require_whole
from cpift.config.run import TrainingConfig
from cpift.console.progress import OnProgress, ProgressMessage
from cpift.data.use import UseRecord
from cpift.devices import device_name, resolved, reusing_memory
from cpift.disk.files import read_json, write_json
from cpift.errors import StageError
from cpift.method.freezing import ElementFreezer, count_moved_everywhere, snapshot
from cpift.models.sources import load_tokenizer
from cpift.training.adapters import load_adapted, merged_weights
from cpift.training.batches import Abilities, Batches
from cpift.training.fsdp import ShardedTrainer, WholeTrainer
from cpift.training.moments import SecondMoments, second_moments, write_moments
from cpift.training.rows import held_out_rows, stage_data
from cpift.training.spacing import Spacing
from cpift.training.spec import RESULT, FitSpec, FrozenRow, HeldOutRow, LogRow, TrainingRecord
from cpift.training.steps import arguments, device_of, gathers_narrow, require_possible
from cpift.training.tracking import tracked
from cpift.training.watching import Averaging, Watch, checkpoint_folder
from cpift.training.weights.compiling import compiled, fixed_length
from cpift.training.weights.held import anchored, held_masks
from cpift.training.weights.reading import load_sharded, load_whole
from cpift.training.weights.workers import workers_here
from cpift.training.weights.writing import write_trained

_log = logging.getLogger(__name__)
_STAGE_FILE = "cpift_stage.json"


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class FitHooks:
    """What the surroundings of a fine-tune provide. Called on every worker, in step."""

    on_progress: OnProgress = _nothing
    on_checkpoint: Callable[[Path, dict[str, Any]], None] = _nothing
    resume_from: Path | None = None
    is_main: bool = True


@dataclass
class _StageState:
    """Where the fine-tune stands; kept in each checkpoint so that a resumed one goes on from there."""

    stage: int = 0
    stage_done: bool = False
    log: list[LogRow] = field(default_factory=list)
    frozen: list[FrozenRow] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # input tokens seen, one number a finished stage
    seconds: float = 0.0
    rows: list[dict[str, UseRecord]] = field(default_factory=list)  # by stage and task, see `RowUse.record`
    held_out: list[HeldOutRow] = field(default_factory=list)


def fit(spec: FitSpec, hooks: FitHooks | None = None) -> TrainingRecord:
    """Train all stages and export the model to `spec.export`; returns the content of its training.json."""
    hooks = hooks or FitHooks()
    torch.set_num_threads(spec.threads)
    with reusing_memory(device_of(spec)):
        progress = _resume(hooks.resume_from)
        started = time.time() - progress.seconds
        origin = Checkpoint(spec.model)
        layout = checkpoint_layout(origin)
        require_whole(layout, spec.model)
        require_possible(spec)
        model = _load(spec, hooks.resume_from if progress.stage_done else None)
        tokenizer = load_tokenizer(spec.model)
        mid_stage = hooks.resume_from if not progress.stage_done else None
        first = progress.stage + int(progress.stage_done)
        moments: SecondMoments | None = None
        for index in range(first, len(spec.stages)):
            resumed = mid_stage if index == first else None
            moments = _run_stage(spec, index, model, layout, tokenizer, progress, hooks, resumed)
        progress.seconds = time.time() - started
        result: TrainingRecord = {
            "title": spec.title,
            "log": progress.log,
            "frozen": progress.frozen,
            "tokens": progress.tokens,
            "rows": progress.rows,
            "held_out": progress.held_out,
            "seconds": progress.seconds,
            "device": device_name(device_of(spec)),
            "precision": resolved(spec.training.precision, device_of(spec)),
        }
        if _sharded(spec):
            result["gathered"] = "bfloat16" if gathers_narrow(spec) else "float32"
        write_trained(merged_weights(model, layout, origin), layout, origin, spec.export, hooks.is_main)
        if moments is not None:
            write_moments(moments, layout, origin, spec.export, hooks.is_main)
            result["moments"] = moments.record
        if hooks.is_main:
            write_json(spec.export / RESULT, result)  # the last file makes the folder complete
        return result


def _sharded(spec: FitSpec) -> bool:
    """One worker has nothing to shard."""
    return spec.resources.sharded and workers_here() > 1


def _load(spec: FitSpec, saved: Path | None) -> PreTrainedModel:
    """The model to train, as `kept` at the end of a stage if that is given."""
    device, attention = device_of(spec), spec.training.attention
    if spec.training.lora is not None:
        return load_adapted(spec.model, spec.training, device, spec.seed, saved)
    if _sharded(spec):
        return load_sharded(saved or spec.model, torch.float32, device, gathers_narrow(spec), attention)
    return load_whole(saved or spec.model, torch.float32, device, attention=attention)


def _resume(checkpoint: Path | None) -> _StageState:
    return _StageState(**read_json(checkpoint / _STAGE_FILE)) if checkpoint else _StageState()


def _run_stage(
    spec: FitSpec,
    index: int,
    model: PreTrainedModel,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    progress: _StageState,
    hooks: FitHooks,
    checkpoint: Path | None,
) -> SecondMoments | None:
    progress.stage, progress.stage_done = index, False
    if checkpoint is None and hooks.is_main:
        # An earlier attempt's checkpoints: by their numbers they look newer, and this attempt's would be rotated away.
        shutil.rmtree(spec.stage_folder(index), ignore_errors=True)
    uses: dict[str, UseRecord] = {}
    progress.rows = [*progress.rows[:index], uses]
    follower = _Follower(
        spec, index, progress, hooks, layout, ParameterMasks(layout, held_masks(spec, index, layout, model))
    )
    averaging = Averaging(spec.training.ema, checkpoint) if spec.training.ema else None
    watch = _watch(spec, index, tokenizer, progress, checkpoint, averaging, follower)
    lookers = [one for one in (averaging, watch) if one is not None]
    with tracked(
        spec.tracking if hooks.is_main else (), spec.stage_title(index), spec.logs / f"stage-{index}"
    ) as curves:
        trainer = (ShardedTrainer if _sharded(spec) else WholeTrainer)(
            model=model,
            args=arguments(spec, index, workers_here()),
            training=spec.training,
            train_dataset=stage_data(spec, index, tokenizer, uses),
            data_collator=Batches(tokenizer, Abilities.of(model), fixed_length(spec.training)),
            callbacks=[*lookers, follower, *curves, *_spacing(spec.training)],  # the follower hands checkpoints over
        )
        trainer.remove_callback(PrinterCallback)  # progress and log are ours
        if watch is not None:
            watch.trainer = trainer
        with compiled(model, spec.training.compile):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if averaging is not None:
        averaging.average.swap()
    if watch is not None:
        watch.finish(model)
    follower.finish(model)
    progress.tokens.append(int(trainer.state.num_input_tokens_seen))
    if index + 1 < len(spec.stages):
        _save_stage_end(spec, index, model, layout, progress, hooks)
    return second_moments(model, trainer.optimizer) if spec.keep_moments else None


def _watch(
    spec: FitSpec,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    progress: _StageState,
    checkpoint: Path | None,
    averaging: Averaging | None,
    follower: _Follower,
) -> Watch | None:
    if spec.training.evaluate_every is None:
        return None
    rows, folder = held_out_rows(spec, index, tokenizer), spec.stage_folder(index)
    return Watch(spec.training, index, rows, progress.held_out, folder, checkpoint, averaging, follower.alive)


def _spacing(training: TrainingConfig) -> list[TrainerCallback]:
    return [Spacing(training.checkpoint_minutes)] if training.checkpoint_minutes else []


class _Follower(TrainerCallback):
    """Freezes, logs, reports and checkpoints one stage."""

    def __init__(
        self,
        spec: FitSpec,
        index: int,
        progress: _StageState,
        hooks: FitHooks,
        layout: Layout,
        masks: Mapping[str, torch.Tensor],
    ):
        self._spec, self._index, self._progress, self._hooks = spec, index, progress, hooks
        self._layout, self._masks = layout, masks
        self._freezer: ElementFreezer | None = None
        self._before: dict[str, torch.Tensor] = {}
        self._started = time.time() - progress.seconds

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Freeze only now: a resumed Trainer has just put the checkpoint's weights into the model."""
        if self._masks:
            self._freezer = self._held(kw["model"])
            self._freezer.attach(getattr(kw["optimizer"], "optimizer", kw["optimizer"]))
        self._report(state)

    def _held(self, model: torch.nn.Module) -> ElementFreezer:
        """What holds the cores still, or pulls them back to the model that the whole fine-tune began with."""
        if self._spec.penalty is None:
            self._before = snapshot(model, self._masks)
            return ElementFreezer(model, self._masks)
        return anchored(self._spec, self._layout, model, self._masks)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._report(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step < state.max_steps:  # by patience: nobody waits for the other steps
            self._report(state, state.max_steps)

    def alive(self) -> None:
        """What computes beside the steps says that it does."""
        self._hooks.on_progress(self._last)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kw: Any,
    ) -> None:
        if logs and "loss" in logs:
            if not torch.isfinite(torch.tensor(float(logs["loss"]))):
                raise StageError(
                    f"{self._spec.title}: the loss is {logs['loss']} at step {state.global_step}. "
                    "Lower `learning_rate` or `max_grad_norm`, or look for broken rows in the data"
                )
            figures = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self._progress.log.append(cast(LogRow, {"stage": self._index, "step": state.global_step} | figures))
            _log.info("stage %d, step %d of %d: %s", self._index, state.global_step, state.max_steps, figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        folder = checkpoint_folder(args, state)
        self._progress.seconds = time.time() - self._started
        if self._hooks.is_main:
            write_json(folder / _STAGE_FILE, self._progress.__dict__)
        self._hooks.on_checkpoint(folder, {"stage": self._index, "step": state.global_step})

    def finish(self, model: torch.nn.Module) -> None:
        """Stop freezing and account for the frozen elements."""
        if self._freezer is None:
            return
        self._freezer.detach()
        if self._spec.penalty:  # nothing was promised to stand still
            return
        moved = count_moved_everywhere(model, self._before, snapshot(model, self._masks))
        elements = self._freezer.frozen_elements
        self._progress.frozen.append({"stage": self._index, "elements": elements, "moved": moved})
        if moved:
            raise StageError(f"{self._spec.title}: {moved} of {elements} frozen elements moved in stage {self._index}")

    def _report(self, state: TrainerState, step: int | None = None) -> None:
        step = state.global_step if step is None else step
        last = self._progress.log[-1]["loss"] if self._progress.log else None
        stages = len(self._spec.stages)
        done = self._index + step / max(state.max_steps, 1)
        self._last = ProgressMessage(
            title=self._spec.title, done=done / stages, stage=self._index, stages=stages, loss=last,
            step=step, steps=state.max_steps,
        )  # fmt: skip
        self._hooks.on_progress(self._last)


def _save_stage_end(
    spec: FitSpec, index: int, model: PreTrainedModel, layout: Layout, progress: _StageState, hooks: FitHooks
) -> None:
    """A checkpoint between stages: weights in float32 and no optimizer, for the next stage makes its own."""
    folder = spec.stage_folder(index) / "end"
    progress.stage_done = True
    if spec.training.lora is None:
        write_trained(model, layout, Checkpoint(spec.model), folder, hooks.is_main, kind="F32")
    elif hooks.is_main:
        model.save_pretrained(folder)
    if hooks.is_main:
        write_json(folder / _STAGE_FILE, progress.__dict__)
    hooks.on_checkpoint(folder, {"stage": index, "step": -1})
