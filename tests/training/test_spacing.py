"""Checkpoints by the clock are due where the first worker's clock says so, which is asked seldom."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from cpift.training.spacing import Spacing


@pytest.mark.parametrize(("a_step", "looks"), [(0.25, 10), (7.0, 6), (25.0, 2), (90.0, 1)])
def test_minutes_pass_between_checkpoints_and_workers_agree(a_step: float, looks: int) -> None:
    """Two workers, whose clocks went apart: for the second, time passes three times as fast."""
    now, asked, args = [0.0], [0], Any
    first = Spacing(1, clock=lambda: now[0])

    def agreed(value: float) -> float:
        asked[0] += 1
        return value / 3

    second = Spacing(1, clock=lambda: 3 * now[0], agreed=agreed)
    state, begun, saved = TrainerState(), 0.0, list[float]()
    for worker in (first, second):
        worker.on_train_begin(args, state, TrainerControl())
    while len(saved) < 3:
        state.global_step += 1
        now[0] += a_step
        controls = TrainerControl(), TrainerControl()
        for worker, control in zip((first, second), controls, strict=True):
            worker.on_step_end(args, state, control)
        assert controls[0].should_save is controls[1].should_save
        if controls[0].should_save:
            saved.append(now[0] - begun)
            begun = now[0]
            for worker in (first, second):
                worker.on_save(args, state, TrainerControl())
    assert all(abs(seconds - 60) <= max(a_step / 2, a_step - 60) for seconds in saved)
    assert asked[0] == 3 * looks
