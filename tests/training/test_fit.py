from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import StageError
from cpift.method.masks import read_mask
from cpift.pipeline.inprocess import fit_here
from cpift.training.fit import FitHooks, fit
from cpift.training.spec import FitSpec, StageSpec, stages_of
from tests.helpers.fits import spec, weights


@pytest.mark.slow
def test_training_lowers_the_loss_and_keeps_names_and_dtypes(base: Path, tmp_path: Path) -> None:
    result = fit(spec(base, tmp_path, steps=30))
    assert result["log"][-1]["loss"] < 0.8 * result["log"][0]["loss"]
    before, after = Checkpoint(base), Checkpoint(tmp_path / "export")
    assert {n: (i.shape, i.dtype) for n, i in before.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in after.tensors.items()
    }
    assert after.tensors["model.norm.weight"].dtype == torch.bfloat16


def test_losses_go_to_tensorboard_stage_by_stage(base: Path, tmp_path: Path) -> None:
    stages = (StageSpec(("add",)), StageSpec(("rev",)))
    fit(replace(spec(base, tmp_path, *stages, steps=2), tracking=("tensorboard",)))
    for stage in ("stage-0", "stage-1"):
        (events,) = (tmp_path / "logs" / stage).glob("events.out.tfevents.*")
        assert b"train/loss" in events.read_bytes()


def test_products_are_computed_as_asked_for(base: Path, tmp_path: Path) -> None:
    runs = {name: fit(spec(base, tmp_path / name, precision=name)) for name in ("float32", "bfloat16")}
    assert {name: run["precision"] for name, run in runs.items()} == {name: name for name in runs}
    assert weights(tmp_path / "float32" / "export") != weights(tmp_path / "bfloat16" / "export")


def test_the_same_fit_gives_the_same_bits(base: Path, tmp_path: Path) -> None:
    fit(spec(base, tmp_path / "a"))
    fit(spec(base, tmp_path / "b"))
    assert weights(tmp_path / "a" / "export") == weights(tmp_path / "b" / "export")
    fit(replace(spec(base, tmp_path / "c"), seed=4))
    assert weights(tmp_path / "c" / "export") != weights(tmp_path / "a" / "export")


@pytest.mark.slow
def test_a_fit_leaves_nothing_that_changes_the_next_one_in_its_process(base: Path, tmp_path: Path) -> None:
    """What another has set before: seed, precision, threads, adapters, clipping, a loss that ended it."""
    fit_here(spec(base, tmp_path / "first"), lambda message: None)
    other = spec(base, tmp_path / "other", precision="bfloat16", lora={"rank": 2}, max_grad_norm=0.1, packing=True)
    fit_here(replace(other, seed=9, threads=2), lambda message: None)
    with pytest.raises(StageError, match="the loss is"):
        fit_here(spec(base, tmp_path / "broken", learning_rate=1e12, steps=10), lambda message: None)
    fit_here(spec(base, tmp_path / "again"), lambda message: None)
    assert weights(tmp_path / "again" / "export") == weights(tmp_path / "first" / "export")


class _Killed(Exception):
    pass


TWO_STAGES = (StageSpec(("add",)), StageSpec(("rev", "add")))


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a fit in two stages returns, and its weights."""
    out = tmp_path_factory.mktemp("undisturbed")
    return fit(spec(base, out, *TWO_STAGES, checkpoint_every=2)), weights(out / "export")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop", [(0, 2), *(pytest.param(stop, marks=pytest.mark.slow) for stop in ((0, 4), (0, -1), (1, 4)))]
)
def test_a_resumed_fit_ends_with_the_same_bits(
    base: Path, tmp_path: Path, undisturbed: tuple[dict[str, Any], str], stop: tuple[int, int]
) -> None:
    whole, bits_wanted = undisturbed
    kept: list[Path] = []

    def on_checkpoint(folder: Path, metrics: dict[str, int]) -> None:
        if (metrics["stage"], metrics["step"]) == stop:
            kept.append(folder)
            raise _Killed

    broken = spec(base, tmp_path / "broken", *TWO_STAGES, checkpoint_every=2)
    with pytest.raises(_Killed):
        fit(broken, FitHooks(on_checkpoint=on_checkpoint))
    assert not broken.export.exists()
    resumed = fit(broken, FitHooks(resume_from=kept[0]))
    assert weights(broken.export) == bits_wanted
    assert [(e["stage"], e["step"], e["loss"]) for e in resumed["log"]] == [
        (e["stage"], e["step"], e["loss"]) for e in whole["log"]
    ]


def test_a_checkpoint_by_the_clock_is_one_to_go_on_from(
    base: Path, tmp_path: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    kept: list[Path] = []

    def on_checkpoint(folder: Path, metrics: dict[str, int]) -> None:
        if (metrics["stage"], metrics["step"]) == (1, 3):
            kept.append(folder)
            raise _Killed

    often = spec(base, tmp_path, *TWO_STAGES, checkpoint_every=0, checkpoint_minutes=1e-6)
    with pytest.raises(_Killed):
        fit(often, FitHooks(on_checkpoint=on_checkpoint))
    rarely = replace(often, training=often.training.model_copy(update={"checkpoint_minutes": 60}))
    fit(rarely, FitHooks(resume_from=kept[0]))
    assert weights(rarely.export) == undisturbed[1]


@pytest.mark.slow
def test_killed_in_its_process_a_fit_goes_on_and_leaves_no_checkpoint(
    base: Path, tmp_path: Path, undisturbed: tuple[dict[str, Any], str]
) -> None:
    def checkpoints() -> list[Path]:
        return [*broken.scratch.glob("kept-*"), *broken.scratch.glob("stage-*")]

    def kill(message: dict[str, Any]) -> None:
        if message["stage"] == 1:
            raise _Killed

    broken, messages = spec(base, tmp_path, *TWO_STAGES, checkpoint_every=2), list[Any]()
    with pytest.raises(_Killed):
        fit_here(broken, kill)
    assert checkpoints()
    fit_here(broken, messages.append)
    assert {message["stage"] for message in messages} == {1}
    assert weights(broken.export) == undisturbed[1]
    assert not checkpoints()


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["earlier", "all"])
def test_frozen_cores_leave_a_staged_fit_as_they_entered(
    base: Path, tmp_path: Path, regions: Path, freeze: str
) -> None:
    stages = stages_of([["rev"], ["add"]], freeze)  # type: ignore[arg-type]
    settings = replace(spec(base, tmp_path / "i", *stages, checkpoint_every=3), regions=regions, balanced=True)
    after_stage: list[Path] = []
    result = fit(
        settings, FitHooks(on_checkpoint=lambda folder, m: after_stage.append(folder) if m["step"] == -1 else None)
    )
    start = Checkpoint(base) if freeze == "all" else Checkpoint(after_stage[0])
    end = Checkpoint(settings.export)
    frozen_tasks = ["rev", "add"] if freeze == "all" else ["rev"]
    frozen = free = 0
    for name in end.names:
        masks = torch.stack([bits(regions, one, name, end.tensors[name].numel) for one in frozen_tasks]).any(0)
        before = start.tensor(name).to(torch.bfloat16).flatten()
        after = end.tensor(name).flatten()
        assert torch.equal(before[masks], after[masks])
        frozen += int(masks.sum())
        free += int((before != after).sum())
    assert result["frozen"][-1] == {"stage": 1, "elements": frozen, "moved": 0}
    assert free > 1000


@pytest.mark.slow
def test_compiled_layers_freeze_and_go_on_bit_for_bit(base: Path, tmp_path: Path, regions: Path) -> None:
    """Compiled anew for what is left, as in another process, and with a last batch of other size."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    def described(name: str, compile: bool) -> FitSpec:
        stages = stages_of([["rev"], ["add"]], "earlier")
        short = {"steps": None, "epochs": 1, "batch_size": 3, "gradient_accumulation": 1, "packing": True}
        own = spec(base, tmp_path / name, *stages, checkpoint_every=2, max_length=64, compile=compile, **short)
        return replace(own, regions=regions)

    def stop(folder: Path, metrics: dict[str, int]) -> None:
        if (metrics["stage"], metrics["step"]) == (1, 2):
            kept.append(folder)
            raise _Killed

    kept: list[Path] = []
    eager, whole, broken = described("eager", False), described("whole", True), described("broken", True)
    plain = fit(eager)
    counters.clear()
    found = fit(whole)
    assert counters["stats"]["unique_graphs"] >= 2  # a full batch, and a last one
    assert found["frozen"][0]["moved"] == 0 < found["frozen"][0]["elements"]
    assert len(found["log"]) == len(plain["log"]) > 2
    for one, other in zip(found["log"], plain["log"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
    with pytest.raises(_Killed):
        fit(broken, FitHooks(on_checkpoint=stop))
    torch._dynamo.reset()
    fit(broken, FitHooks(resume_from=kept[0]))
    assert weights(broken.export) == weights(whole.export)
    counters.clear()
    again = described("eager again", False)
    fit(again)
    assert not counters["stats"]
    assert weights(again.export) == weights(eager.export)


@pytest.mark.slow
def test_a_penalty_keeps_cores_near_the_first_model(base: Path, tmp_path: Path, regions: Path) -> None:
    """Also in a fit that was stopped in the middle of a stage: it ends with the same bits."""
    stages = stages_of([["rev"], ["add"]], "all")
    plain = replace(spec(base, tmp_path / "p", *stages, checkpoint_every=2), regions=regions, balanced=True)
    pulled, again = (
        replace(plain, penalty=100.0, export=tmp_path / name / "export", scratch=tmp_path / name) for name in ("a", "b")
    )
    fit(replace(plain, stages=stages_of([["rev"], ["add"]], "none")))
    assert fit(pulled)["frozen"] == []
    kept: list[Path] = []

    def stop(folder: Path, where: dict[str, Any]) -> None:
        if (where["stage"], where["step"]) == (1, 4):
            kept.append(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(again, FitHooks(on_checkpoint=stop))
    fit(again, FitHooks(resume_from=kept[0]))
    assert weights(again.export) == weights(pulled.export)
    distances = []
    for export in (pulled.export, plain.export):
        start, end = Checkpoint(base), Checkpoint(export)
        pairs = ((name, bits(regions, "rev", name, end.tensors[name].numel)) for name in end.names)
        moved = ((end.tensor(name) - start.tensor(name)).float().flatten()[mask].abs().sum() for name, mask in pairs)
        distances.append(float(sum(moved)))
    assert distances[0] < 0.7 * distances[1]


def test_steps_of_a_stage_or_of_each_of_its_tasks(base: Path, tmp_path: Path) -> None:
    stages = (StageSpec(("add", "rev")), StageSpec(("add",)))
    by_stage, by_task = (spec(base, tmp_path, *stages, steps=6, steps_per=per) for per in ("stage", "task"))
    assert [by_stage.steps(0), by_stage.steps(1)] == [6, 6]
    assert [by_task.steps(0), by_task.steps(1)] == [12, 6]
    assert spec(base, tmp_path, *stages, steps=None, epochs=1.5).steps(0) is None


def bits(regions: Path, task: str, name: str, numel: int) -> torch.Tensor:
    from cpift_kernels import unpack_mask

    words = read_mask(regions, task, name)
    assert words is not None
    return unpack_mask(words, numel)


def test_stages_freeze_what_the_method_says() -> None:
    groups = [["a"], ["b", "c"], ["d"]]
    assert [stage.frozen for stage in stages_of(groups, "earlier")] == [(), ("a",), ("a", "b", "c")]
    assert [stage.frozen for stage in stages_of(groups, "all")] == [("a", "b", "c", "d")] * 3
    assert [stage.frozen for stage in stages_of(groups, None)] == [()] * 3
    assert [stage.frozen for stage in stages_of(groups, "none")] == [()] * 3
