"""How fast fine-tunes went on this machine, for plans of others of the same kind."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import ResourcesConfig, TrainingConfig
from cpift.disk.facts import recalled, replace_fact
from cpift.training.spec import FitSpec

_FACT = "tokens a second"
_SHAPE = {"batch_size", "max_length", "packing", "precision", "lora", "gradient_checkpointing"}


def keep_speed(spec: FitSpec, trained: Mapping[str, Any]) -> None:
    """Keep how fast a fine-tune went; `trained`: its training.json. A fine-tune that was resumed counts as it is."""
    tokens, seconds = sum(trained.get("tokens", ())), float(trained.get("seconds", 0.0))
    if tokens and seconds > 0:
        kind = _kind(Checkpoint(spec.model).numel, spec.training, spec.resources, spec.threads)
        before = recalled(_FACT, kind)  # the longest fine-tune is the fastest, for its start is part of its time
        replace_fact(_FACT, kind, max(tokens / seconds, before if isinstance(before, int | float) else 0.0))


def known_speed(parameters: int, training: TrainingConfig, resources: ResourcesConfig, threads: int) -> float | None:
    """Input tokens a second of the fastest fine-tune of this kind; None where there was none."""
    speed = recalled(_FACT, _kind(parameters, training, resources, threads))
    return float(speed) if isinstance(speed, int | float) and speed > 0 else None


def _kind(parameters: int, training: TrainingConfig, resources: ResourcesConfig, threads: int) -> list[Any]:
    """What decides how fast a fine-tune goes, on this machine."""
    later = {"optimizer": "adamw", "gather": "auto", "compile": False, "attention": "auto"}
    named = {name for name, before in later.items() if getattr(training, name) != before}
    shape = training.model_dump(mode="json", include=_SHAPE | named)
    if training.lora is not None and not training.lora.in_four_bits:
        del shape["lora"]["base"]  # as it was before there was another
    workers = [resources.workers, resources.gpus_per_worker, resources.cpus_per_worker]
    return [socket.gethostname(), parameters, shape, threads, workers]
