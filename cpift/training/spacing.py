"""Checkpoints by the clock: steps of one model take a tenth of a second, of another a minute.

All workers of a fine-tune save at the same step, but their clocks differ: the first one's counts. It is asked after a
step, and again half-way to when a checkpoint would be due, so seldom that nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cpift.training.weights.workers import workers_here


def of_first_worker(value: float) -> float:
    """What the first worker says; all must ask."""
    if workers_here() == 1:
        return value
    said = [value]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


class Spacing(TrainerCallback):
    """Asks for a checkpoint where `minutes` have passed since the last, whatever it was made for."""

    def __init__(
        self,
        minutes: float,
        clock: Callable[[], float] = time.monotonic,
        agreed: Callable[[float], float] = of_first_worker,
    ):
        self._seconds, self._clock, self._agreed = 60 * minutes, clock, agreed
        self._begun, self._last, self._look = 0.0, 0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._begun, self._last, self._look = self._clock(), state.global_step, state.global_step + 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.on_train_begin(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step < self._look:
            return
        passed = self._agreed(self._clock() - self._begun)
        a_step = passed / (state.global_step - self._last)
        left = self._seconds - passed
        if left < a_step / 2:  # nearer than after the next step
            control.should_save = True
        else:
            self._look = state.global_step + max(1, int(left / a_step / 2))
