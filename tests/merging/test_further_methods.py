"""dare_ties, nearswap, model_stock and karcher: figures by hand, definitions in every dtype, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cpift
from cpift.checkpoints import slices as streaming
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import FusionConfig
from cpift.errors import CheckpointError, CpiftError
from cpift.merging import forms
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.checks import failures
from cpift.merging.engine import merge
from cpift.merging.registry import method_named
from cpift.merging.updates.dare import survives
from cpift.merging.verify import verify
from cpift.method.moments import open_moments
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.ways_to_merge import CASES, masks_of, moments_for

SIZES = {"one": (1,), "odd": (37,), "matrix": (65, 33), "wide": (16, 40), "cube": (3, 5, 7), "none": (0, 4)}


def inputs_of(folder: Path, models: list[Mapping[str, torch.Tensor]]) -> FusionInputs:
    """θ0 and fine-tunes."""
    base, *tuned = (Checkpoint(save_checkpoint(folder / str(number), one)) for number, one in enumerate(models))
    by_task = {f"t{number}": one for number, one in enumerate(tuned)}
    return FusionInputs(base, base, by_task, Path(), (), moments=moments_for(base, by_task, folder))


def merged(folder: Path, inputs: FusionInputs, seed: int = 0, **fields: Any) -> Checkpoint:
    """The merge of `inputs`, which has to pass its own checks."""
    config = FusionConfig(**fields)
    trimmed = folder.with_name(f"{folder.name}.trimmed")
    method = method_named(config.method).make(Materials(inputs, config, seed, partial(masks_of, config, trimmed)))
    folder.mkdir()
    merge(method, inputs.backbone, folder, "inputs", shard_size=10**9)
    checks = verify(method, inputs.backbone, folder)
    assert not failures(checks)
    assert any("fp64" in check["name"] and check["passed"] for check in checks)
    return Checkpoint(folder)


def vectors(*values: list[float]) -> list[Mapping[str, torch.Tensor]]:
    return [{"w": torch.tensor(value)} for value in values]


def random_models(tasks: int, dtype: torch.dtype) -> list[Mapping[str, torch.Tensor]]:
    """θ0 and fine-tunes that moved; the last one did not move in tensor `odd`."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SIZES.items()}
    tuned = [
        {n: (x.float() + 0.1 * torch.randn(x.shape, generator=generator)).to(dtype) for n, x in base.items()}
        for _ in range(tasks)
    ]
    tuned[-1] |= {"odd": base["odd"].clone()}
    return [base, *tuned]


WHOLE = (
    "model_stock",
    "karcher",
    "nuslerp",
    "multislerp",
    "sce",
    "pcb",
    "iso_c",
    "tsv_m",
)  # sums over a tensor, which slices round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_definition_however_it_is_cut(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, fields = CASES[name]
    inputs = inputs_of(tmp_path, random_models(tasks, dtype))
    whole = merged(tmp_path / "whole", inputs, method=name, **fields)
    monkeypatch.setattr(streaming, "SLICE", 64)
    monkeypatch.setattr(forms, "_RUN", 32)
    sliced = merged(tmp_path / "sliced", inputs, method=name, **fields)
    for tensor in SIZES:
        a, b = whole.tensor(tensor), sliced.tensor(tensor)
        assert torch.equal(a, b) if name not in WHOLE else torch.allclose(a, b, rtol=2**-7, atol=1e-6)


def test_dare_ties_elects_among_what_survived(tmp_path: Path) -> None:
    moves = torch.tensor([[1.0] * 64, [-3.0] * 64, [2.5] * 64])
    inputs = inputs_of(tmp_path, vectors([0.0] * 64, *moves.tolist()))
    found = merged(tmp_path / "out", inputs, seed=3, method="dare_ties", density=0.5, weight=0.7).tensor("w")
    kept = torch.stack([torch.from_numpy(survives(3, f"t{i}", "w", 0, 64, 0.5)) for i in range(3)])
    for column in range(64):
        values = [2 * float(moves[i, column]) for i in range(3) if kept[i, column]]
        same = [value for value in values if (value > 0) == (sum(values) >= 0)]
        wanted = 0.7 * sum(same) / len(same) if same else 0.0
        assert math.isclose(float(found[column]), wanted, rel_tol=1e-6)
    assert {int(part) for part in kept.sum(0)} == {0, 1, 2, 3}, "all cases are there"


def test_fisher_weighs_by_the_roots_of_second_moments(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, vectors([1.0] * 4, [2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]))
    for task, values in (("t0", [4.0, 1.0, 0.0, 0.0]), ("t1", [1.0, 0.0, 9.0, 0.0])):
        save_file({"w": torch.tensor(values)}, tmp_path / f"{task}.safetensors")
    files = {task: tmp_path / f"{task}.safetensors" for task in ("t0", "t1")}
    inputs = replace(inputs, moments=open_moments(files, inputs.pretrained))
    found = merged(tmp_path / "out", inputs, method="fisher").tensor("w").tolist()
    assert found == pytest.approx([1 + (2 * 1 + 1 * 3) / 3, 2.0, 4.0, 3.0])  # the last: a plain mean
    twice = merged(tmp_path / "twice", inputs, method="fisher", weights={"t1": 2.0}).tensor("w").tolist()
    assert twice == pytest.approx([1 + (2 * 1 + 2 * 3) / 4, 2.0, 4.0, 1 + 7 / 3])


def test_fisher_names_moments_that_are_none(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, vectors([1.0] * 2, [2.0] * 2, [4.0] * 2))
    save_file({"w": torch.tensor([1.0, -1.0])}, tmp_path / "t1.safetensors")
    bad = dict(inputs.moments) | open_moments({"t1": tmp_path / "t1.safetensors"}, inputs.pretrained)
    with pytest.raises(CheckpointError, match="moments of t1: w: holds NaN, Inf or values below 0"):
        merged(tmp_path / "out", replace(inputs, moments=bad), method="fisher")
    with pytest.raises(CheckpointError, match="t0: has no second moments"):
        merged(tmp_path / "none", replace(inputs, moments={}), method="fisher")
    with pytest.raises(CpiftError, match="takes none below 0"):
        merged(tmp_path / "below", inputs, method="fisher", weights={"t1": -1.0})


def test_nearswap_cuts_updates_off(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, vectors([1.0, 1.0, 1.0, 1.0], [1.0, 1.25, 3.0, -3.0]))
    assert merged(tmp_path / "out", inputs, method="nearswap", t=0.5).tensor("w").tolist() == [1.0, 1.25, 1.5, 0.5]


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([2.0, 0.0], [2.0, 0.0], [2.0, 0.0]),  # cosα = 1: t = 1, their mean
        ([2.0, 0.0], [0.0, 2.0], [0.0, 0.0]),  # cosα = 0: t = 0, θ0
        ([2.0, 0.0], [1.0, math.sqrt(3)], [1.0, 1 / math.sqrt(3)]),  # cosα = ½: t = 2/3
        ([2.0, 0.0], [-2.0, 0.1], [0.0, 0.0]),  # they part: θ0
        ([2.0, 0.0], [0.0, 0.0], [0.0, 0.0]),  # one did not move
    ],
)
def test_model_stock_goes_as_far_as_the_angle_says(
    tmp_path: Path, one: list[float], other: list[float], wanted: list[float]
) -> None:
    inputs = inputs_of(tmp_path, vectors([0.0, 0.0], one, other))
    found = merged(tmp_path / "out", inputs, method="model_stock").tensor("w")
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "weights", "wanted"),
    [
        ([[2.0, 0.0], [0.0, 2.0]], {}, [math.sqrt(2), math.sqrt(2)]),
        ([[1.0, 0.0], [0.0, 3.0]], {"t1": 2.0}, [7 / 3 * math.cos(math.pi / 3), 7 / 3 * math.sin(math.pi / 3)]),
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], {}, [1.0, 0.0]),
        ([[3.0, 0.0], [0.0, 0.0]], {}, [1.5, 0.0]),  # one has no direction
        ([[0.0, 0.0], [0.0, 0.0]], {}, [0.0, 0.0]),
        (
            [[math.cos(angle), math.sin(angle)] for angle in (0.1, 0.3, 1.4)],
            {},
            [math.cos(0.6), math.sin(0.6)],  # on a circle it is the mean angle
        ),
    ],
)
def test_karcher_is_the_mean_on_the_sphere(
    tmp_path: Path, values: list[list[float]], weights: dict[str, float], wanted: list[float]
) -> None:
    inputs = inputs_of(tmp_path, vectors([9.0, 9.0], *values))
    found = merged(tmp_path / "out", inputs, method="karcher", weights=weights).tensor("w")
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_is_not_finite_is_named(name: str, tmp_path: Path) -> None:
    tasks, fields = CASES[name]
    models = random_models(tasks, torch.float32)
    models[-1]["matrix"][3, 4] = float("nan")
    whole = {"density": 1.0} if name == "dare_ties" else {}  # nothing is dropped before it is looked at
    with pytest.raises(CheckpointError, match="matrix: holds NaN or Inf"):
        merged(tmp_path / "out", inputs_of(tmp_path, models), method=name, **fields | whole)


@pytest.mark.parametrize(
    ("name", "tasks", "said"),
    [
        ("nearswap", 2, "is of one fine-tune"),
        ("arcee_fusion", 2, "is of one fine-tune"),
        ("model_stock", 1, "there is one"),
    ],
)
def test_other_numbers_of_models_are_refused(name: str, tasks: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(CpiftError, match=said):
        merged(tmp_path / "out", inputs_of(tmp_path, random_models(tasks, torch.float32)), method=name)


@pytest.mark.parametrize(
    ("fields", "models", "wanted"),
    [
        ({"method": "ram"}, [[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]], [1.0, 3.0, 0.0]),
        ({"method": "ram", "threshold": 2.0, "scale": 0.5}, [[1.0, 2.0, 0.0], [0.0, 4.0, 0.0]], [0.0, 2.0, 0.0]),
        ({"method": "magmax"}, [[1.0, 2.0, -3.0], [-1.0, 4.0, 1.0]], [1.0, 4.0, -3.0]),
        # of [3, 1] both need the first; of [3, -3] the sum is 0 and neither is small; of [5, 1] the second is.
        ({"method": "consensus", "weight": 0.5}, [[3.0, 3.0, 5.0], [2.0, -3.0, 1.0]], [2.5, 0.0, 0.0]),
        ({"method": "consensus", "agreement": 1}, [[3.0, 0.0, 5.0], [2.0, 0.0, 1.0]], [5.0, 0.0, 6.0]),
        # t0 has 2 shared elements and 2 of its own, t1 2 and 1, of which 1.5 counts.
        (
            {"method": "ram_plus", "rescale": 0.5, "rescale_limit": 1.5},
            [[1.0, 2.0, 4.0, 8.0, 0.0], [0.0, 0.0, 2.0, 4.0, 6.0]],
            [1.5, 3.0, 3.0, 6.0, 10.5],
        ),
        ({"method": "breadcrumbs", "density": 0.5, "gamma": 0.25}, [[1.0, -4.0, 3.0, 2.0]], [0.0, 0.0, 3.0, 2.0]),
        ({"method": "breadcrumbs", "density": 0.75, "gamma": 0.5}, [[1.0, -4.0, 3.0, 2.0]], [1.0, 0.0, 3.0, 2.0]),
        ({"method": "breadcrumbs", "density": 1e-20, "gamma": 0.5}, [[1.0, -4.0, 3.0, 2.0]], [0.0, 0.0, 0.0, 0.0]),
        # Selected are the last two; of these the tasks have 4 + 9 = 13 and 1 + 36 = 37 parts of weight.
        (
            {"method": "sce", "density": 0.5},
            [[9.0, 2.0, 2.0, -3.0], [9.0, 2.5, 1.0, 6.0]],
            [0.0, 0.0, 1.26, 6.0],
        ),
        # Importance goes as the update here; the quartiles of 1, 1, 1, 1, 9 are 1, and θ1 is taken from 1 on.
        ({"method": "arcee_fusion"}, [[1.0, 1.0, 1.0, 1.0, 9.0]], [1.0, 1.0, 1.0, 1.0, 9.0]),
        ({"method": "arcee_fusion"}, [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], [0.0] * 5 + [6.0]),
        ({"method": "nuslerp", "weights": {"t1": 0.5}}, [[1.0, 0.0], [0.0, 1.0]], [math.sqrt(3) / 2, 0.5]),
        ({"method": "multislerp"}, [[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]], [math.sqrt(2)] * 2),
    ],
)
def test_figures_by_hand(
    fields: dict[str, Any], models: list[list[float]], wanted: list[float], tmp_path: Path
) -> None:
    inputs = inputs_of(tmp_path, vectors([0.0] * len(wanted), *models))
    torch.testing.assert_close(merged(tmp_path / "out", inputs, **fields).tensor("w"), torch.tensor(wanted))


def test_della_keeps_large_updates_more_often(tmp_path: Path) -> None:
    moved = torch.arange(1, 4001) / 256
    inputs = inputs_of(tmp_path, [{"w": torch.zeros(4, 1000)}, {"w": moved.view(4, 1000)}])
    fields: dict[str, Any] = {"method": "della_linear", "density": 0.5, "window": 0.3}
    found = merged(tmp_path / "out", inputs, **fields).tensor("w")
    assert torch.equal(found, merged(tmp_path / "again", inputs, **fields).tensor("w"))
    assert not torch.equal(found, merged(tmp_path / "other", inputs, seed=1, **fields).tensor("w"))
    shares = (found > 0).view(4, 2, 500).float().mean(2)  # of the smaller and the larger half of each row
    torch.testing.assert_close(shares, torch.tensor([[0.35, 0.65]] * 4), atol=0.07, rtol=0)
    ranks = torch.arange(1000).repeat(4).view(4, 1000)
    chances = 0.5 + 0.3 * ((2 * ranks + 1) / 1000 - 1)
    torch.testing.assert_close(found, torch.where(found > 0, moved.view(4, 1000) / chances, 0.0))


@pytest.mark.parametrize("space", ["weights", "delta"])
def test_what_is_averaged_are_models_or_their_updates(space: str, tmp_path: Path) -> None:
    origin = [0.0, 0.0] if space == "weights" else [5.0, -7.0]
    moved = [[origin[0] + 1, origin[1]], [origin[0], origin[1] + 1]]
    inputs = inputs_of(tmp_path, vectors(origin, *moved))
    for method in ("nuslerp", "multislerp"):
        found = merged(tmp_path / method, inputs, method=method, space=space).tensor("w")
        torch.testing.assert_close(found, torch.tensor(origin) + math.sqrt(0.5))


@pytest.mark.parametrize(
    ("fields", "models", "said"),
    [
        ({"method": "consensus", "agreement": 3}, [[1.0], [2.0]], "no element would move"),
        ({"method": "nuslerp", "weight": 0.0}, [[1.0], [2.0]], "not all are 0"),
        ({"method": "della", "density": 0.1, "window": 0.1}, [[1.0], [2.0]], "give less than 0.1"),
        ({"method": "della", "density": 1.0, "window": 0.1}, [[1.0], [2.0]], "give at most 0"),
        ({"method": "sce"}, [[1.0]], "there is one"),
        ({"method": "ram_plus", "granularity": "row"}, [[1.0]], "give `tensor`"),
        ({"method": "nuslerp"}, [[1.0], [2.0], [3.0]], "is of two"),
        ({"method": "multislerp"}, [[1.0, 0.0], [-2.0, 0.0]], "tensor w: directions cancel out"),
    ],
)
def test_merges_that_would_give_nothing_are_refused(
    fields: dict[str, Any], models: list[list[float]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CpiftError, match=said):
        merged(tmp_path / "out", inputs_of(tmp_path, vectors([0.0] * len(models[0]), *models)), **fields)


def test_models_that_are_each_others_opposite_have_no_mean_direction(tmp_path: Path) -> None:
    """Their products cancel out but for rounding, whose root would be taken for a length."""
    generator = torch.Generator().manual_seed(0)
    one = {f"w{number}": torch.randn(64, 64, generator=generator) for number in range(12)}
    inputs = inputs_of(tmp_path, [one, one, {name: -tensor for name, tensor in one.items()}])
    found = merged(tmp_path / "karcher", inputs, method="karcher")
    for name, tensor in one.items():  # the first one's
        torch.testing.assert_close(found.tensor(name), tensor)
    for name, tensor in one.items():
        alone = inputs_of(tmp_path / name, [{name: tensor}, {name: tensor}, {name: -tensor}])
        with pytest.raises(CpiftError, match=f"tensor {name}: directions cancel out"):
            merged(tmp_path / f"multislerp-{name}", alone, method="multislerp")


def rotated(values: list[float], columns: int, seed: int) -> torch.Tensor:
    """fp32 [5, columns] with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0] for n in (5, columns)
    ]
    made: torch.Tensor = (sides[0] * torch.tensor(values, dtype=torch.float64)) @ sides[1].T
    return made.float()


def test_pcb_weighs_by_size_and_agreement(tmp_path: Path) -> None:
    """By its formula, written out for one tensor of two tasks; half of each task's elements are dropped."""
    moves = torch.tensor([[4.0, -1.0, 2.0, 0.5], [3.0, 2.0, -2.0, 0.25]], dtype=torch.float64)
    products = moves[:, None] * moves[None]
    least = products.amin(2, keepdim=True)
    norms = (products - least) / (products.amax(2, keepdim=True) - least)
    squares = torch.stack([norms[0, 0], norms[1, 1]])
    rivalry = torch.softmax(2 * squares, 1) * torch.softmax(norms, 2).sum(1)
    rivalry *= rivalry >= rivalry.sort(1).values[:, 2:3]
    wanted = (rivalry * moves).sum(0) / rivalry.sum(0).clamp(min=1e-12)
    inputs = inputs_of(tmp_path, vectors([0.0] * 4, *moves.tolist()))
    found = merged(tmp_path / "out", inputs, method="pcb", density=0.5).tensor("w")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    assert (wanted == 0).any()


@pytest.mark.parametrize("columns", [4, 9])
def test_iso_c_makes_singular_values_alike(columns: int, tmp_path: Path) -> None:
    """Of rank 2, which the second task does not enlarge: 6 + 2 become 4 + 4."""
    moved = rotated([3.0, 1.0], columns, 0)
    models = [{"w": torch.zeros(5, columns), "b": torch.zeros(2)}]
    models += [{"w": moved, "b": torch.tensor([x, 1.0])} for x in (1.0, 2.0)]
    found = merged(tmp_path / "out", inputs_of(tmp_path, models), method="iso_c", scale=0.5)
    torch.testing.assert_close(torch.linalg.svdvals(found.tensor("w"))[:3], torch.tensor([2.0, 2.0, 0.0]))
    assert found.tensor("b").tolist() == [0.75, 0.5]


@pytest.mark.parametrize("columns", [4, 9])
def test_tsv_m_keeps_each_tasks_largest_directions(columns: int, tmp_path: Path) -> None:
    """Two of four or five singular values a task; tasks that move other rows and columns stay as they are."""
    one, other = torch.zeros(5, columns), torch.zeros(5, columns)
    one[0, 0], one[1, 1], other[2, 2], other[3, 3] = 5.0, 3.0, 4.0, 2.0
    inputs = inputs_of(tmp_path, [{"w": torch.ones(5, columns)}, {"w": 1 + one}, {"w": 1 + other}])
    found = merged(tmp_path / "out", inputs, method="tsv_m").tensor("w")
    torch.testing.assert_close(found, 1 + one + other)
    alike = inputs_of(tmp_path / "alike", [{"w": torch.zeros(5, columns)}, *[{"w": one}] * 2])
    torch.testing.assert_close(merged(tmp_path / "same", alike, method="tsv_m").tensor("w"), one)


def test_a_matrix_that_does_not_fit_is_named(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, random_models(3, torch.float32))
    method = method_named("tsv_m").make(Materials(inputs, FusionConfig(method="tsv_m"), 0, lambda wanted: []))
    with pytest.raises(CpiftError, match="by whole tensors, of which matrix takes 0 MiB → give at least 1 MiB"):
        merge(method, inputs.backbone, tmp_path, "inputs", shard_size=10**9, budget=1 << 18)


def test_localize_stitch_averages_where_regions_meet() -> None:
    zeros = torch.zeros(6)
    first, second = torch.tensor([8.0, 6, 1, 1, 0, 1]), torch.tensor([4.0, 1, 1, -6, 0, 1])
    found = cpift.merge_state_dicts(
        {"w": zeros}, {"a": {"w": first}, "b": {"w": second}}, method="localize_stitch", density=0.34, scale=0.5
    )
    assert found["w"].tolist() == [3.0, 3.0, 0.0, -3.0, 0.0, 0.0]
