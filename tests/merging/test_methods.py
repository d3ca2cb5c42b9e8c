"""The other ways to merge, against their definitions, PEFT's own functions, and known figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cpift.checkpoints import slices as streaming
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig, RegionsConfig
from cpift.errors import CpiftError
from cpift.merging import forms
from cpift.merging.base import FusionInputs, MergeMethod
from cpift.merging.checks import failures
from cpift.merging.engine import merge
from cpift.merging.methods.linear import Linear
from cpift.merging.methods.slerp import Slerp
from cpift.merging.methods.task_arithmetic import TaskArithmetic
from cpift.merging.selected.ties import Ties
from cpift.merging.signs import defined_elected, elected
from cpift.merging.updates.dare import Dare, survives
from cpift.merging.verify import verify
from cpift.method.regions import write_regions
from tests.helpers.checkpoints import random_tensors, save_checkpoint


def inputs_of(base: Checkpoint, tuned: dict[str, Checkpoint]) -> FusionInputs:
    return FusionInputs(base, base, tuned, Path(), ())


def saved(folder: Path, values: list[list[float]]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """θ0 and fine-tunes of one parameter each."""
    models = [
        Checkpoint(save_checkpoint(folder / str(i), {"w": torch.tensor(v, dtype=torch.float32)}))
        for i, v in enumerate(values)
    ]
    return models[0], {f"t{i}": model for i, model in enumerate(models[1:])}


def merged(folder: Path, method: MergeMethod, like: Checkpoint) -> Checkpoint:
    folder.mkdir()
    merge(method, like, folder, "inputs", shard_size=10**9)
    assert not failures(verify(method, like, folder))
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("t", "one", "two", "wanted"),  # what mergekit 0.1.5 gives
    [
        (0.25, [1, 0], [0, 1], [0.92388, 0.38268]),
        (0.5, [2, 0], [0, 1], [1.41421, 0.70711]),
        (0.5, [1, 1, 1, 1], [1, -1, 1, 1], [1.15470, 0, 1.15470, 1.15470]),
        (0.3, [1, 1], [2, 2], [1.3, 1.3]),
        (0.5, [0, 0], [3, 1], [1.5, 0.5]),
    ],
)
def test_slerp_has_the_known_figures(
    tmp_path: Path, t: float, one: list[float], two: list[float], wanted: list[float]
) -> None:
    base, tuned = saved(tmp_path, [one, one, two])
    out = merged(tmp_path / "out", Slerp(inputs_of(base, tuned), FusionConfig(method="slerp", t=t)), base)
    torch.testing.assert_close(out.tensor("w"), torch.tensor(wanted, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_slerp_of_three_folds_one_after_another(tmp_path: Path) -> None:
    """On a circle: halfway from 0° to 60°, then a third of the way on to 90°."""
    angles = [math.radians(angle) for angle in (0, 60, 90)]
    base, tuned = saved(tmp_path, [[1.0, 1.0], *([math.cos(angle), math.sin(angle)] for angle in angles)])
    out = merged(tmp_path / "out", Slerp(inputs_of(base, tuned), FusionConfig(method="slerp")), base)
    wanted = math.radians(30 + (90 - 30) / 3)
    expected = torch.tensor([math.cos(wanted), math.sin(wanted)], dtype=torch.float32)
    torch.testing.assert_close(out.tensor("w"), expected, rtol=1e-5, atol=1e-6)


def test_slerp_weighs_two_models_only(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path, [[1.0], [1.0], [2.0], [3.0]])
    with pytest.raises(CpiftError, match="is for two tasks, the config has 3"):
        Slerp(inputs_of(base, tuned), FusionConfig(method="slerp", t=0.3))


def fine_tunes(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base, tuned = random_tensors(0, dtype), {}
    for task in range(3):
        moved = random_tensors(task + 1, scale=0.1)
        changed = {n: (x.float() + moved[n]).to(dtype) if x.is_floating_point() else x for n, x in base.items()}
        tuned[f"t{task}"] = Checkpoint(save_checkpoint(tmp_path / f"t{task}", changed))
    return Checkpoint(save_checkpoint(tmp_path / "base", base)), tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_task_arithmetic_are_their_formulas(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tuned = fine_tunes(tmp_path, dtype)
    config = FusionConfig(weight=0.4, weights={"t1": 0.8})
    mean = merged(tmp_path / "linear", Linear(inputs_of(base, tuned), config), base)
    sums = merged(tmp_path / "sums", TaskArithmetic(inputs_of(base, tuned), config), base)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for name, info in base.tensors.items():
        if not info.floating:
            assert torch.equal(mean.tensor(name), base.tensor(name))
            continue
        origin, parts = base.tensor(name).double(), [model.tensor(name).double() for model in tuned.values()]
        weighted = sum(w * x for w, x in zip((0.4, 0.8, 0.4), parts, strict=True))
        moved = sum(w * (x - origin) for w, x in zip((0.4, 0.8, 0.4), parts, strict=True))
        torch.testing.assert_close(mean.tensor(name).double(), weighted / 1.6, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sums.tensor(name).double(), origin + moved, rtol=tolerance, atol=tolerance)


def test_ties_is_that_of_peft(tmp_path: Path) -> None:
    utilities = pytest.importorskip("peft.utils.merge_utils")
    base, tuned = fine_tunes(tmp_path)
    (tmp_path / "trimmed").mkdir()
    write_regions(base, tuned, RegionsConfig(p=0.3, scope="tensor"), {0.3: tmp_path / "trimmed"})
    config = FusionConfig(method="ties", density=0.3, weight=0.7)
    out = merged(tmp_path / "out", Ties(inputs_of(base, tuned), config, [tmp_path / "trimmed"]), base)
    for name in ("embed.weight", "layers.0.q.weight", "cube"):
        origin = base.tensor(name)
        updates = [(model.tensor(name) - origin).flatten() for model in tuned.values()]
        wanted = origin.flatten() + utilities.ties(updates, torch.full((3,), 0.7), 0.3)
        torch.testing.assert_close(out.tensor(name).flatten(), wanted, rtol=1e-5, atol=1e-6)


def test_ties_of_signs_are_elected_as_the_definition_elects_them() -> None:
    """Sums of 0, sums that fp32 rounds to 0 or to the other side, and updates that are 0."""
    updates = [
        [1.0, 1.0, 1.0, 0.0, 2.0**-30],
        [2.0**-30, -1.0, 2.0**-30, 0.0, 1.0],
        [-1.0, 0.0, -1.0 - 2.0**-23, 0.0, -1.0],
    ]
    ones, config = [1.0] * 3, FusionConfig()
    found = elected(torch.tensor(updates), ones, ones, config)
    defined = defined_elected(np.array(updates), ones, ones, config)
    assert found.tolist() == [0.5, 1.0, -1.0 - 2.0**-23, 0.0, 0.5]
    np.testing.assert_allclose(found.double().numpy(), defined, rtol=2**-23)


def test_dare_keeps_its_share_whatever_the_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = fine_tunes(tmp_path)
    config = FusionConfig(method="dare", density=0.25)
    whole = merged(tmp_path / "whole", Dare(inputs_of(base, tuned), config, 3), base)
    monkeypatch.setattr(streaming, "SLICE", 64)
    monkeypatch.setattr(forms, "_RUN", 32)
    sliced = merged(tmp_path / "sliced", Dare(inputs_of(base, tuned), config, 3), base)
    assert all(torch.equal(whole.tensor(name), sliced.tensor(name)) for name in base.names)
    other = merged(tmp_path / "other", Dare(inputs_of(base, tuned), config, 4), base)
    assert not torch.equal(whole.tensor("embed.weight"), other.tensor("embed.weight"))
    kept = survives(3, "t0", "w", 0, 1 << 20, 0.25)
    assert abs(kept.mean() - 0.25) < 0.002
    assert np.array_equal(kept[1000:2000], survives(3, "t0", "w", 1000, 2000, 0.25))
    assert abs(float(np.corrcoef(kept, survives(3, "t1", "w", 0, 1 << 20, 0.25))[0, 1])) < 0.005
