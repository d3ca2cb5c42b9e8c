"""What a fine-tune changed, against plain torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cpift.checkpoints import slices
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.errors import CheckpointError
from cpift.method.changes import changes, together


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def models(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {
        "a": torch.randn(300, 70, generator=generator).bfloat16(),
        "b": torch.zeros(5),
        "empty": torch.zeros(0),
        "steps": torch.arange(3),
    }
    tuned = base | {"a": base["a"].clone(), "b": torch.tensor([0.0, 0.5, 0.0, -2.0, 0.0])}
    tuned["a"][::3] += 0.25
    return base, tuned


@pytest.mark.parametrize("step", [slices.SLICE, 4096])
def test_tensors_are_measured_in_slices_of_any_size(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", step)
    base, tuned = models(tmp_path)
    told: list[tuple[int, int]] = []
    found = changes(
        checkpoint(tmp_path / "base", base),
        checkpoint(tmp_path / "tuned", tuned),
        lambda done, of: told.append((done, of)),
    )
    assert list(found) == ["a", "b"]
    assert told == [(21000, 21005), (21005, 21005)]
    for name, change in found.items():
        delta = (tuned[name].float() - base[name].float()).abs().double()
        assert (change.elements, change.changed) == (delta.numel(), int((delta > 0).sum()))
        assert change.largest == float(delta.max())
        assert change.l1 == pytest.approx(float(delta.sum()), rel=1e-12)
        assert change.l2 == pytest.approx(float(delta.norm()), rel=1e-12)
        assert change.weight_l2 == pytest.approx(float(base[name].double().norm()), rel=1e-12)
    assert found["b"].relative is None
    whole = together(found.values())
    assert whole.share == (found["a"].changed + 2) / 21005
    assert whole.l2 == pytest.approx(math.hypot(found["a"].l2, found["b"].l2))
    assert whole.relative == pytest.approx(whole.l2 / found["a"].weight_l2)


def test_nothing_changed(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", models(tmp_path)[0])
    whole = together(changes(base, base).values())
    assert (whole.changed, whole.largest, whole.l1, whole.l2, whole.relative) == (0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "holds NaN or Inf"), (-3e38, "differs by more than float32")])
def test_what_has_no_size_is_named(value: float, said: str, tmp_path: Path) -> None:
    base, tuned = models(tmp_path)
    base["b"], tuned["b"] = torch.full((5,), 3e38), torch.full((5,), value)
    with pytest.raises(CheckpointError, match=f"b: {said}"):
        changes(checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned))
