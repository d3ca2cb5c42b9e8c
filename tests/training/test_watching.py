"""Held-out losses, the best weights, an early end, the average: what they are, and that looking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.inputs import DataSource
from cpift.config.training import TrainingConfig, Validation
from cpift.models.sources import load_model, load_tokenizer
from cpift.training.batches import Abilities, Batches
from cpift.training.fit import FitHooks, fit
from cpift.training.fsdp import WholeTrainer
from cpift.training.rows import held_out_rows, stage_data
from cpift.training.spec import FitSpec, HeldOutRow, StageSpec
from cpift.training.steps import arguments, exact_schedule
from cpift.training.watching import best_of, held_out_loss
from tests.helpers.fits import TASKS, spec, weights

TWO_STAGES = (StageSpec(("add",)), StageSpec(("rev", "add"), frozen=("add",)))
# A learning rate at which these losses fall, and rise again.
WATCHED: dict[str, Any] = {"evaluate_every": 2, "checkpoint_every": 1, "learning_rate": 0.1, "log_every": 1}
HELD = Validation(rows=6)


class _Killed(Exception):
    pass


def watched(base: Path, out: Path, *stages: StageSpec, **training: Any) -> FitSpec:
    return spec(base, out, *stages, **(WATCHED | {"validation": HELD} | training))


def at_checkpoints(look: Callable[[Path, tuple[int, int]], None]) -> FitHooks:
    return FitHooks(on_checkpoint=lambda folder, m: look(folder, (m["stage"], m["step"])))


def killed_at(settings: FitSpec, stop: tuple[int, int]) -> Path:
    """Its checkpoint there."""
    kept: list[Path] = []

    def look(folder: Path, where: tuple[int, int]) -> None:
        if where == stop:
            kept.append(folder)
            raise _Killed

    with pytest.raises(_Killed):
        fit(settings, at_checkpoints(look))
    return kept[0]


def test_the_loss_is_the_mean_over_all_labels(base: Path, tmp_path: Path) -> None:
    settings, tokenizer, model = watched(base, tmp_path), load_tokenizer(base), load_model(base, torch.float32)
    rows = held_out_rows(settings, 0, tokenizer)
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double().detach()
        labels = torch.tensor(row["labels"])[1:]
        chosen = logits[:-1].log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)]
        total, count = total - float(chosen[labels >= 0].sum()), count + int((labels >= 0).sum())
    trainer = WholeTrainer(
        model=model.train(),
        args=arguments(settings, 0, 1),
        training=settings.training,
        data_collator=Batches(tokenizer, Abilities.of(model)),
    )
    before = torch.get_rng_state()
    for batch in (1, 4, 100):
        loss, labels_seen = held_out_loss(trainer, rows, batch)
        assert (labels_seen, model.training) == (count, True)
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_held_out_or_a_tasks_own_and_looking_changes_nothing(base: Path, tmp_path: Path) -> None:
    held = watched(base, tmp_path / "held")
    tokenizer = load_tokenizer(base)
    rows = [[tuple(row["input_ids"]) for row in of(held, 0, tokenizer)] for of in (stage_data, held_out_rows)]
    assert [len(part) for part in rows] == [34, 6]
    assert not set(rows[0]) & set(rows[1])
    own = tuple(task.model_copy(update={"validation": DataSource(procedural="echo", size=5)}) for task in TASKS)
    given = replace(watched(base, tmp_path / "own", validation=None), tasks=own)
    assert len(held_out_rows(given, 0, tokenizer)) == 5
    assert [row["step"] for row in fit(given)["held_out"]] == [2, 4, 6]
    fit(spec(base, tmp_path / "blind", **(WATCHED | {"evaluate_every": None})))
    assert weights(given.export) == weights(tmp_path / "blind" / "export")


def test_of_equal_losses_the_first_is_best_and_none_that_is_no_number() -> None:
    def rows(*losses: float) -> list[HeldOutRow]:
        return [{"stage": 0, "step": step, "loss": loss, "tokens": 1} for step, loss in enumerate(losses)]

    best = best_of(rows(math.nan, 2.0, 1.0, 1.0, 3.0, -math.inf))
    assert best is not None
    assert best["step"] == 2
    assert best_of(rows(math.nan, math.inf)) is None


@pytest.mark.parametrize("training", [{}, pytest.param({"lora": {"rank": 2}, "ema": 0.8}, marks=pytest.mark.slow)])
def test_the_best_weights_are_exported_bit_for_bit(base: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    """Those that a fit of as many steps ends with, if the learning rate is the same at each."""
    fields = {"schedule": "constant_with_warmup", "warmup_ratio": 0, "checkpoint_every": 0} | training
    found = fit(watched(base, tmp_path / "best", keep="best", **fields))["held_out"]
    best = best_of(found)
    assert best is not None
    assert best["step"] < found[-1]["step"] == 6
    fit(watched(base, tmp_path / "short", **(fields | {"steps": best["step"]})))
    assert weights(tmp_path / "best" / "export") == weights(tmp_path / "short" / "export")


def test_the_average_is_its_formula(base: Path, tmp_path: Path) -> None:
    settings, seen = watched(base, tmp_path, ema=0.5), list[dict[str, torch.Tensor]]()

    def look(folder: Path, where: tuple[int, int]) -> None:
        seen.append(load_file(folder / "model.safetensors"))

    fit(settings, at_checkpoints(look))
    assert len(seen) == 6
    start, end = Checkpoint(base), Checkpoint(settings.export)
    for name in end.names:
        average = start.tensor(name).double()
        for step, after in enumerate(seen, start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * after[name].double()
        torch.testing.assert_close(end.tensor(name).double(), average, rtol=2**-8, atol=1e-6)


def test_patience_ends_a_stage_and_a_stage_that_ended_stays_so(base: Path, tmp_path: Path) -> None:
    messages: list[Any] = []
    fields = {"patience": 1, "keep": "best", "steps": 20}
    whole = watched(base, tmp_path / "whole", **fields)
    record = fit(whole, FitHooks(on_progress=messages.append))
    last = record["held_out"][-1]["step"]
    assert last < 20
    assert [row["step"] for row in record["log"]] == list(range(1, last + 1))
    assert (messages[-1]["step"], messages[-1]["done"]) == (20, 1)
    again = watched(base, tmp_path / "again", **fields)
    resumed = fit(again, FitHooks(resume_from=killed_at(again, (0, last))))
    said = [(one["held_out"], one["log"], one["tokens"]) for one in (record, resumed)]
    assert said[0] == said[1]
    assert weights(again.export) == weights(whole.export)


@pytest.fixture(scope="module")
def staged(base: Path, regions: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], FitSpec]:
    """All of it at once, over two stages, in the second with frozen elements."""
    return lambda out: replace(
        watched(base, out, *TWO_STAGES, keep="best", ema=0.9, checkpoint_every=3), regions=regions
    )


@pytest.fixture(scope="module")
def undisturbed(staged: Callable[[Path], FitSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    whole = staged(tmp_path_factory.mktemp("whole"))
    return fit(whole), weights(whole.export)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [(0, 6), *(pytest.param(stop, marks=pytest.mark.slow) for stop in ((0, 3), (0, -1), (1, 3), (1, 6)))]
)
def test_a_resumed_fit_ends_with_the_same_bits(
    staged: Callable[[Path], FitSpec], tmp_path: Path, undisturbed: tuple[Any, str], stop: tuple[int, int]
) -> None:
    """Also one stopped after a stage's last step, which transformers alone would train one more."""
    record, wanted = undisturbed
    broken = staged(tmp_path)
    resumed = fit(broken, FitHooks(resume_from=killed_at(broken, stop)))
    assert weights(broken.export) == wanted
    assert [resumed["held_out"], resumed["tokens"]] == [record["held_out"], record["tokens"]]


def test_no_frozen_element_moves_under_an_average_of_the_best(undisturbed: tuple[Any, str]) -> None:
    (frozen,) = undisturbed[0]["frozen"]
    assert frozen["moved"] == 0 < frozen["elements"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 1), (0.0, 7), (0.05, 20), (0.05, 10), (0.3, 11), (0.99, 4)])
def test_under_exact_warm_up_no_step_is_dead(schedule: Any, ratio: float, steps: int) -> None:
    share = exact_schedule(TrainingConfig(steps=steps, warmup_ratio=ratio, schedule=schedule, warmup="exact"), steps)
    rates = [share(before) for before in range(steps)]
    warmup = ratio * steps
    assert all(0 < rate <= 1 for rate in rates)
    rising = max(math.ceil(warmup) - 1, 0)
    assert rates[:rising] == [step / warmup for step in range(1, rising + 1)]
    after = rates[rising:]
    assert after == sorted(after, reverse=True)
    assert after[0] == 1 or warmup % 1


def test_a_fit_takes_the_exact_schedule(base: Path, tmp_path: Path) -> None:
    settings = spec(base, tmp_path, warmup="exact", warmup_ratio=0.4, log_every=1, learning_rate=1e-3)
    share = exact_schedule(settings.training, 6)
    rates = [row["learning_rate"] for row in fit(settings)["log"]]
    assert rates == pytest.approx([1e-3 * share(before) for before in range(6)])
    assert rates[0] > 0
