"""LoRA fine-tunes leave whole models: the merged weights, resumed to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.inputs import ScratchModel
from cpift.config.run import ModelConfig, TrainingConfig
from cpift.config.training import IntegrationConfig, LoraConfig
from cpift.devices import Device
from cpift.errors import CheckpointError
from cpift.models.sources import materialise
from cpift.training.fit import FitHooks, fit
from cpift.training.spec import FitSpec, StageSpec
from cpift.training.weights.reading import load_whole
from tests.helpers.fits import spec, weights

pytest.importorskip("peft")
LORA = LoraConfig(rank=3, alpha=6, targets=("q_proj", "down_proj"))
STAGES = (StageSpec(("add",)), StageSpec(("rev", "add")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    scratch = ScratchModel(hidden_size=32, intermediate_size=48, heads=2)
    materialise(ModelConfig(scratch=scratch, dtype="float32"), folder)
    return folder


def lora_spec(base: Path, out: Path) -> FitSpec:
    return spec(base, out, *STAGES, checkpoint_every=3, lora=LORA)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    fit(lora_spec(base, out))
    return out / "export"


def test_the_update_is_of_low_rank_in_the_targets_and_zero_elsewhere(base: Path, trained: Path) -> None:
    before, after = Checkpoint(base), Checkpoint(trained)
    assert before.names == after.names
    for name in before.names:
        update = after.tensor(name) - before.tensor(name)
        if name.split(".")[-2] in LORA.targets:
            singular = torch.linalg.svdvals(update.double())
            assert singular[2] > 1e-4
            assert singular[3] < 1e-5
        else:
            assert not update.any()


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(0, -1), (1, 3)])
def test_a_resumed_fit_ends_with_the_same_bits(
    base: Path, tmp_path: Path, trained: Path, stop: tuple[int, int]
) -> None:
    kept: list[Path] = []

    def on_checkpoint(folder: Path, metrics: dict[str, int]) -> None:
        if (metrics["stage"], metrics["step"]) == stop:
            kept.append(folder)
            raise _Killed

    broken = lora_spec(base, tmp_path)
    with pytest.raises(_Killed):
        fit(broken, FitHooks(on_checkpoint=on_checkpoint))
    fit(broken, FitHooks(resume_from=kept[0]))
    assert weights(broken.export) == weights(trained)


@pytest.mark.slow
def test_weights_under_adapters_are_held_as_stored_and_that_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = ScratchModel(hidden_size=32, intermediate_size=48, heads=2)
    materialise(ModelConfig(scratch=scratch, dtype="bfloat16"), tmp_path / "base")
    fields = {"lora": LORA, "precision": "bfloat16", "evaluate_every": 3, "validation": {"rows": 8}}
    trained, dtypes = [], []
    for name, as_stored in (("narrow", True), ("wide", False)):

        def load(path: Path, dtype: torch.dtype, device: Device, hold: bool = as_stored, **how: Any) -> Any:
            model = load_whole(path, dtype, device, **(how | {"as_stored": hold}))
            dtypes.append(model.model.layers[0].mlp.down_proj.weight.dtype)
            return model

        monkeypatch.setattr("cpift.training.weights.reading.load_whole", load)
        each = spec(tmp_path / "base", tmp_path / name, *STAGES, **fields)
        fit(each)
        trained.append(weights(each.export))
    assert dtypes == [torch.bfloat16, torch.float32]
    assert trained[0] == trained[1] != weights(tmp_path / "base")


def test_targets_that_are_nowhere_and_lora_while_freezing_are_refused(base: Path, tmp_path: Path) -> None:
    nowhere = lora_spec(base, tmp_path)
    training = nowhere.training.model_copy(update={"lora": LoraConfig(targets=("x_proj",))})
    with pytest.raises(CheckpointError, match=r"lora\.targets"):
        fit(replace(nowhere, training=training))
    with pytest.raises(ValueError, match="no mask can hold single elements"):
        IntegrationConfig(steps=1, lora=LORA)
    assert TrainingConfig(steps=1, lora=LORA).lora == LORA
