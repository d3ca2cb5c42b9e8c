from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cpift_kernels import unpack_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.run import RegionsConfig
from cpift.errors import CheckpointError, CpiftError
from cpift.method import placement
from cpift.method.masks import read_mask, read_summary
from cpift.method.regions import (
    CoreRegion,
    core_size,
    parameter_space,
    region_overlaps,
    save_regions,
    select_regions,
    select_regions_many,
    write_regions,
)
from tests.helpers.checkpoints import random_tensors, save_checkpoint


def models(tmp_path: Path, dtype: torch.dtype, tasks: int = 3) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base = random_tensors(0, dtype)
    tuned = {}
    for task in range(tasks):
        moved = random_tensors(task + 1, dtype, scale=0.05)
        changed = {name: base[name] + moved[name] if base[name].is_floating_point() else base[name] for name in base}
        tuned[f"t{task}"] = Checkpoint(save_checkpoint(tmp_path / f"t{task}", changed, shards=1 + task % 2))
    return Checkpoint(save_checkpoint(tmp_path / "base", base)), tuned


def selected(region: CoreRegion, model: Checkpoint) -> np.ndarray:
    """The region as one boolean vector in linear order."""
    parts = [unpack_mask(words, model.tensors[name].numel) for name, words in region.words.items()]
    return torch.cat(parts).numpy()


def by_sorting(base: Checkpoint, tuned: Checkpoint, names: tuple[str, ...], count: int) -> np.ndarray:
    """The definition: stable sort by falling |Δ|, so that the lower index wins a tie; unmoved elements never."""
    delta = torch.cat([(tuned.tensor(n).float() - base.tensor(n).float()).abs().flatten() for n in names]).numpy()
    chosen = np.argsort(-delta, kind="stable")[:count]
    mask = np.zeros(len(delta), dtype=bool)
    mask[chosen] = True
    return mask & (delta > 0)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_regions_are_the_elements_that_moved_most(tmp_path: Path, p: float, dtype: torch.dtype) -> None:
    base, tuned = models(tmp_path, dtype)
    config = RegionsConfig(p=p)
    names = parameter_space(base, config)
    regions = select_regions(base, tuned, config)
    for task, region in regions.items():
        count = core_size(p, region.summary.space)
        expected = by_sorting(base, tuned[task], names, count)
        assert np.array_equal(selected(region, base), expected)
        assert region.summary.count == expected.sum()
        assert region.summary.requested == count
        assert sum(region.summary.cores.values()) == region.summary.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_significance_is_the_update_times_the_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tuned = models(tmp_path, dtype)
    config = RegionsConfig(p=0.1, measure="significance")
    names = parameter_space(base, config)
    for task, region in select_regions(base, tuned, config).items():
        origin, moved = (torch.cat([m.tensor(n).float().flatten() for n in names]) for m in (base, tuned[task]))
        value = ((moved - origin) * origin).abs().numpy()
        expected = np.zeros(len(value), dtype=bool)
        expected[np.argsort(-value, kind="stable")[: core_size(0.1, len(value))]] = True
        assert np.array_equal(selected(region, base), expected & (value > 0))
        assert region.summary.threshold == value[expected].min()
        assert not np.array_equal(selected(region, base), by_sorting(base, tuned[task], names, expected.sum()))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_several_p_at_once_are_each_alone(tmp_path: Path, scope: str) -> None:
    base, tuned = models(tmp_path, torch.bfloat16)
    config = RegionsConfig(scope=scope)
    several = select_regions_many(base, tuned, config, [0.5, 0.01, 0.2, 0.5])
    assert list(several) == [0.5, 0.01, 0.2]
    for p, regions in several.items():
        alone = select_regions(base, tuned, config.model_copy(update={"p": p}))
        for task, region in regions.items():
            assert region.summary == alone[task].summary
            assert all(torch.equal(words, alone[task].words[name]) for name, words in region.words.items())


def test_a_probe_that_moved_little_has_a_small_core(tmp_path: Path) -> None:
    base = random_tensors(0)
    changed = {name: tensor.clone() for name, tensor in base.items()}
    changed["bias"] += 1
    pretrained = Checkpoint(save_checkpoint(tmp_path / "base", base))
    tuned = {"a": Checkpoint(save_checkpoint(tmp_path / "a", changed))}
    summary = select_regions(pretrained, tuned, RegionsConfig(p=0.5))["a"].summary
    assert (summary.count, summary.requested) == (1, core_size(0.5, summary.space))
    assert summary.threshold == pytest.approx(1.0, abs=1e-6)


def test_scope_tensor_takes_its_share_of_each(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, torch.float32)
    summary = select_regions(base, tuned, RegionsConfig(p=0.3, scope="tensor"))["t0"].summary
    assert summary.cores == {
        name: core_size(0.3, base.tensors[name].numel) for name in parameter_space(base, RegionsConfig())
    }


def test_the_parameter_space_follows_the_patterns(tmp_path: Path) -> None:
    base, _ = models(tmp_path, torch.float32)
    assert "buffer" not in parameter_space(base, RegionsConfig())
    narrow = RegionsConfig(include=("layers.*", "bias"), exclude=("*norm",))
    assert parameter_space(base, narrow) == ("bias", "layers.0.q.weight")
    with pytest.raises(CpiftError, match="leave no parameter of"):
        parameter_space(base, RegionsConfig(include=("nothing*",)))


@pytest.mark.parametrize(
    ("p", "elements", "count"), [(0.1, 30, 3), (0.29, 100, 29), (0.01, 99, 0), (1.0, 7, 7), (0.07, 100, 7)]
)
def test_the_core_size_is_the_floor_of_the_decimal_product(p: float, elements: int, count: int) -> None:
    assert core_size(p, elements) == count


def test_kept_regions_read_back(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, torch.float32)
    regions = select_regions(base, tuned, RegionsConfig(p=0.2, exclude=("cube",)))
    (tmp_path / "out").mkdir()
    save_regions(regions, tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    vectors = [selected(region, base) for region in regions.values()]
    expected = [[int((a & b).sum()) for b in vectors] for a in vectors]
    assert summary["overlaps"] == expected == region_overlaps(list(regions.values())).tolist()
    for task, region in regions.items():
        for name, words in region.words.items():
            mask = read_mask(tmp_path / "out", task, name)
            assert mask is not None
            assert torch.equal(mask, words)
    assert read_mask(tmp_path / "out", "t0", "cube") is None


def test_a_probe_with_nan_is_named(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, torch.float32)
    tensors = random_tensors(9)
    tensors["cube"][0, 0, 0] = float("nan")
    tuned["t1"] = Checkpoint(save_checkpoint(tmp_path / "bad", tensors))
    with pytest.raises(CheckpointError, match="t1: cube: holds NaN or Inf"):
        select_regions(base, tuned, RegionsConfig())


def test_a_probe_of_another_model_is_refused(tmp_path: Path) -> None:
    base, tuned = models(tmp_path, torch.float32)
    other = random_tensors(9) | {"cube": torch.zeros(2, 3, 6)}
    tuned["t1"] = Checkpoint(save_checkpoint(tmp_path / "bad", other))
    with pytest.raises(CheckpointError, match=r"t1: cube: has shape \[2, 3, 6\]"):
        select_regions(base, tuned, RegionsConfig())


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_random_cores_have_the_size_and_profile_of_the_true_ones(
    tmp_path: Path, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "BLOCK", 64)
    base, tuned = models(tmp_path, torch.float32)
    ps = [0.001, 0.1, 1.0]
    config = RegionsConfig(p=0.1, scope=scope)
    true, random, again = (
        select_regions_many(base, tuned, config.model_copy(update={"placement": placed}), ps)
        for placed in ("chosen", "random", "random")
    )
    for p in ps:
        for task, region in true[p].items():
            assert random[p][task].summary == region.summary, "counts of tensors are in it"
            ours, others = selected(random[p][task], base), selected(region, base)
            assert np.array_equal(ours, selected(again[p][task], base))
            assert p == 1.0 or p < 0.1 or 0 < (ours & others).sum() < others.sum()
            for name, words in random[p][task].words.items():
                counts = [
                    [
                        int(unpack_mask(w, base.tensors[name].numel)[at : at + 64].sum())
                        for at in range(0, w.numel() * 32, 64)
                    ]
                    for w in (words, region.words[name])
                ]
                assert counts[0] == counts[1]
    assert not np.array_equal(selected(random[0.1]["t0"], base), selected(random[0.1]["t1"], base))
    folder = tmp_path / "out"
    folder.mkdir()
    write_regions(base, tuned, config.model_copy(update={"placement": "random"}), {0.1: folder})
    for name, words in random[0.1]["t1"].words.items():
        written = read_mask(folder, "t1", name)
        assert written is not None
        assert torch.equal(written, words)
    assert read_summary(folder)["overlaps"] == region_overlaps(list(random[0.1].values())).tolist()


def test_random_elements_are_everywhere_alike_often() -> None:
    """Of 6400 elements 640 are drawn for 200 labels: each about 20 times, with a variance of 18."""
    words = np.zeros(200, np.int32)
    words[:20] = -1
    drawn = np.stack([placement._random_words(words.copy(), 6400, f"task {number}") for number in range(200)])
    bits = np.unpackbits(drawn.view(np.uint8), axis=1, bitorder="little").sum(axis=0)
    assert bits.sum() == 200 * 640
    assert (bits.min(), bits.max()) > (4, 0)
    assert bits.max() < 40
    assert 16 < bits.var() < 20
