"""Second moments of a fine-tune as its optimizer had them, and what cannot have any refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpift.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from cpift.checkpoints.opening import MOMENTS, quick_fingerprint
from cpift.config.run import BackboneConfig, IntegrationConfig, TaskConfig, TrainingConfig
from cpift.disk.files import file_sha256, read_json
from cpift.training.fit import FitHooks, fit
from cpift.training.spec import read_training
from tests.helpers.fits import spec, weights


def test_they_are_the_optimizers_after_the_last_step(base: Path, tmp_path: Path) -> None:
    kept = replace(spec(base, tmp_path, steps=6, checkpoint_every=6), keep_moments=True)
    fit(kept)
    state = torch.load(kept.stage_folder(0) / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    wanted = [one["exp_avg_sq"].bfloat16() for one in state.values()]
    found = load_file(kept.export / MOMENTS)
    infos = Checkpoint(base).tensors
    assert {name: tuple(values.shape) for name, values in found.items()} == {n: i.shape for n, i in infos.items()}
    assert len(found) == len(wanted) > 10
    for name, values in found.items():
        assert values.dtype == torch.bfloat16
        assert sum(values.shape == one.shape and torch.equal(values, one) for one in wanted) == 1, name
        assert float(values.sum()) > 0
    assert read_training(kept.export)["moments"] == {"beta2": 0.999, "steps": 6}
    # Programs that find no index load every safetensors file of a folder.
    index = read_json(kept.export / INDEX_FILE)["weight_map"]
    assert index == dict.fromkeys(load_file(kept.export / SINGLE_FILE), SINGLE_FILE)
    assert Checkpoint(kept.export).names == Checkpoint(base).names


def test_a_model_is_the_same_with_them_and_without(base: Path, tmp_path: Path) -> None:
    fit(spec(base, tmp_path / "without", steps=2))
    fit(replace(spec(base, tmp_path / "with", steps=2), keep_moments=True))
    assert weights(tmp_path / "with" / "export") == weights(tmp_path / "without" / "export")
    assert not (tmp_path / "without" / "export" / MOMENTS).exists()
    folder, before = tmp_path / "with" / "export", quick_fingerprint(tmp_path / "with" / "export")
    (folder / MOMENTS).unlink()
    assert quick_fingerprint(folder) == before, "they decide nothing of the model"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"optimizer": "muon"}, "optimizer muon has none"),
        ({"optimizer": "adafactor"}, "optimizer adafactor has none"),
        ({"optimizer": "adamw_8bit"}, "optimizer adamw_8bit has none"),
        ({"lora": {"rank": 4}}, "lora trains no weight"),
        ({"ema": 0.9}, "ema gives other weights"),
        ({"keep": "best", "evaluate_every": 2}, "keep: best gives other weights"),
    ],
)
def test_what_has_none_of_its_weights_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TrainingConfig(steps=1, keep_moments=True, **fields)


def test_other_fine_tunes_than_probes_keep_none() -> None:
    with pytest.raises(ValueError, match="give it to `probe`"):
        IntegrationConfig(steps=1, keep_moments=True)
    with pytest.raises(ValueError, match="give it to `probe`"):
        BackboneConfig(training=TrainingConfig(steps=1, keep_moments=True))
    with pytest.raises(ValueError, match="are of a `checkpoint`"):
        TaskConfig(name="a", moments=Path("x.safetensors"))


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_fine_tune_that_was_killed_keeps_the_same(base: Path, tmp_path: Path, step: int) -> None:
    """Also after its last step, when nothing is left to train."""

    def stop(folder: Path, metrics: dict[str, int]) -> None:
        if metrics["step"] == step:
            raise _Killed

    whole, broken = (
        replace(spec(base, tmp_path / name, steps=4, checkpoint_every=2), keep_moments=True) for name in ("a", "b")
    )
    fit(whole)
    with pytest.raises(_Killed):
        fit(broken, FitHooks(on_checkpoint=stop))
    fit(broken, FitHooks(resume_from=broken.stage_folder(0) / f"checkpoint-{step}"))
    assert file_sha256(broken.export / MOMENTS) == file_sha256(whole.export / MOMENTS)
    assert read_training(broken.export)["moments"] == read_training(whole.export)["moments"]
