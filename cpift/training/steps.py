"""How a stage's steps are taken: transformers' arguments, and the learning rate over the steps."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator

from transformers import TrainingArguments
from transformers.utils.import_utils import is_flash_attn_2_available

from cpift.config.training import TrainingConfig
from cpift.devices import GATHERS, Device, all_on, compute_device, current_gpu, resolved
from cpift.errors import CheckpointError, Problem, entry
from cpift.formats.sizes import available_memory
from cpift.pretrained.architecture import kept_wide
from cpift.text.units import show_size
from cpift.training.memory import recomputes
from cpift.training.possible import impossible, missing_here
from cpift.training.spec import FitSpec

_log = logging.getLogger(__name__)


def device_of(spec: FitSpec) -> Device:
    """Where a fine-tune is computed."""
    return compute_device(spec.resources.gpus_per_worker)


def require_possible(spec: FitSpec) -> None:
    """Raise CheckpointError for what the model's class cannot do: of a GGUF file nobody knew it before."""
    problems = missing_here([spec.training], device_of(spec)) or [*_no_flash(spec)]
    problems = problems or impossible(spec.model, spec.training)
    if problems:
        raise CheckpointError(spec.title, problems)


def _no_flash(spec: FitSpec) -> Iterator[Problem]:
    """What of flash attention only the process that trains can tell. Without a flash-attn that it knows, transformers
    would load a kernel from the hub."""
    if spec.training.attention != "flash_attention_2":
        return
    if not is_flash_attn_2_available():
        what = "flash_attention_2 needs flash-attn, and transformers does not take the one that is installed"
        yield Problem("attention", what, "install a release that it takes, or write sdpa")
    if resolved(spec.training.precision, device_of(spec)) != "bfloat16":
        what = "flash_attention_2 computes in bfloat16, which this GPU does not"
        yield Problem("attention", what, "write sdpa, or precision: bfloat16")


def gathers_narrow(spec: FitSpec) -> bool:
    """Whether a sharded fine-tune gathers weights as bfloat16."""
    device, training = device_of(spec), spec.training
    asked = entry(GATHERS, training.gather, "gather")(device, resolved(training.precision, device))
    return asked and not kept_wide(spec.model)


def arguments(spec: FitSpec, index: int, workers: int) -> TrainingArguments:
    """Of the Trainer of one stage, of which so many work together."""
    training, cuda = spec.training, device_of(spec) == "cuda"
    made = TrainingArguments(
        output_dir=str(spec.stage_folder(index)),
        max_steps=spec.steps(index) or -1,
        num_train_epochs=training.epochs or 1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=spec.accumulation(workers),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_ratio,  # below 1: a share of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=_recomputes(spec, workers),
        bf16=resolved(training.precision, device_of(spec)) == "bfloat16",
        use_cpu=not cuda,
        seed=spec.seed + index,
        data_seed=spec.seed + index,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if training.packing else "non_padding",  # packed rows have no mask to count
        save_strategy="steps" if training.checkpoint_every else "no",
        save_steps=training.checkpoint_every or 1,
        save_total_limit=None if spec.remote_storage else 1,  # uploads take their time, and delete what they uploaded
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        report_to=[],  # see `tracked`
        run_name=spec.stage_title(index),
        remove_unused_columns=False,
        use_cache=False,  # with a cache, models take packed examples for one
    )
    made._n_gpu = min(made.n_gpu, 1)  # of several that it sees, Trainer would make a DataParallel model
    return made


def _recomputes(spec: FitSpec, workers: int) -> bool:
    """Whether activations are computed twice; one line of the log says what `auto` came to."""
    device, asked, training = device_of(spec), spec.resources, spec.training
    if training.gradient_checkpointing != "auto":
        return training.gradient_checkpointing
    share = asked.cpus_per_worker / (os.cpu_count() or 1) if device == "cpu" else asked.gpus_per_worker
    there = available_memory() if device == "cpu" else all_on(current_gpu())
    room, shards = min(1.0, share) * there, workers if asked.sharded else 1
    twice = recomputes(spec.model, training, shards, resolved(training.precision, device) == "bfloat16", room)
    what = "computed twice" if twice else "kept"
    _log.info("gradient_checkpointing: auto: activations are %s; a worker has %s", what, show_size(int(room)))
    return twice


# `schedule` → the share of the learning rate that is left after a share of the way from warm-up to the end
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda way: (1 + math.cos(math.pi * way)) / 2,
    "linear": lambda way: 1 - way,
    "constant_with_warmup": lambda way: 1.0,
}


def exact_schedule(training: TrainingConfig, steps: int) -> Callable[[int], float]:
    """For `warmup: exact`: the share of the learning rate that a step has, by how many of all `steps` were before it.

    Step t = 1, 2, … has t / w while t < w = warmup_ratio · steps, then all of it at the first, and what the schedule
    leaves after (t − max(w, 1)) / (steps + 1 − max(w, 1)) at the others: no step has 0.
    """
    warmup = training.warmup_ratio * steps
    top, decay = max(warmup, 1.0), entry(DECAYS, training.schedule, "schedule")

    def share(before: int) -> float:
        step = before + 1
        return step / warmup if step < warmup else decay(min(1.0, (step - top) / (steps + 1 - top)))

    return share
