"""Selection in phases, and low-rank updates: every backend gives the bits of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cpift_kernels import Backend, Marked, Range, add_low_rank, placement_of, select_cores, select_over, stream_cores
from cpift_kernels.cpu import sharded
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.helpers.streamed import Held

BACKENDS: list[Backend] = ["cpu", "reference"]
SIZES = [70_000, 1, 33, 300_001]


def models_of(dtype: torch.dtype, tasks: int = 2) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    base = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    tuned = [[x + (torch.randn(len(x), generator=generator) * 0.01).to(dtype) for x in base] for _ in range(tasks)]
    return [base, *tuned]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phases_select_what_the_whole_selects(backend: Backend, dtype: torch.dtype, tmp_path: Path) -> None:
    models, counts = models_of(dtype), [0, 40, 20_000]
    held = Held(models, len(counts))
    selection = stream_cores(held, counts, backend=backend)
    ranges, here = selection.ranges(1 << 16), selection.marking(held)
    assert len(ranges) >= 2

    def one_by_one(parts: Sequence[Range], brackets: NDArray[np.int64]) -> Iterator[Marked]:
        for part in parts:
            yield from here([part], brackets)

    cores = selection.select(held, ranges, one_by_one, tmp_path)
    for task, wanted in enumerate(select_cores(models[0], models[1:], counts, backend="reference")):
        for k, core in enumerate(wanted):
            assert (cores[task][k].count, cores[task][k].threshold) == (core.count, core.threshold)
            for mine, its in zip(held.masks[task][k], core.words, strict=True):
                assert np.array_equal(mine, its.numpy())


@pytest.mark.parametrize(
    ("dtype", "moved", "counts"),
    [
        (torch.float32, 1.0, [0, 40, 20_000]),
        (torch.bfloat16, 1.0, [20_000]),  # few values: many ties, within one shard and across several
        (torch.float16, 0.01, [90_000]),  # more than moved
    ],
)
def test_shards_select_what_the_whole_selects(dtype: torch.dtype, moved: float, counts: list[int]) -> None:
    models = models_of(dtype)
    kept = torch.Generator().manual_seed(1)
    for x, x0 in zip(models[1], models[0], strict=True):
        stays = torch.rand(len(x), generator=kept) >= moved
        x[stays] = x0[stays]
    compare_shards(models, counts)


def test_equal_updates_go_to_the_first_shards() -> None:
    """In one pass over each shard: brackets that act at other chunks would miss, and be drawn again."""
    base = [torch.zeros(size) for size in SIZES]
    selection = stream_cores(Held([base], 0), [])
    shard = type(selection.shard(Held([base], 0), []))
    with mock.patch.object(shard, "mark", autospec=True, side_effect=shard.mark) as marks:  # type: ignore[attr-defined]
        compare_shards([base, [x + 1.0 for x in base], [x - 1.0 for x in base]], [150_003])
    assert marks.call_count == 1 + 2 + 3 + 8


def compare_shards(models: list[list[torch.Tensor]], counts: list[int]) -> None:
    """What shards select, beside the reference."""
    wanted = select_cores(models[0], models[1:], counts, backend="reference")
    for width in (1, 2, 3, 8):
        edges = [round(len(SIZES) * number / width) for number in range(width + 1)]  # some have no tensor
        parts = [Held([model[first:last] for model in models], len(counts)) for first, last in pairwise(edges)]
        shards = []
        for held in parts:
            selection = stream_cores(held, [0] * len(counts))
            shards.append(selection.shard(held, selection.ranges(1 << 17)))
        with ExitStack() as stack:
            cores = select_over([stack.enter_context(shard) for shard in shards], counts)
        for task, of_task in enumerate(wanted):
            for k, core in enumerate(of_task):
                assert (cores[task][k].count, cores[task][k].threshold) == (core.count, core.threshold), width
                words = [words for held in parts for words in held.masks[task][k]]
                for mine, its in zip(words, core.words, strict=True):
                    assert np.array_equal(mine, its.numpy()), width


@given(st.lists(st.integers(0, 0x7F7FFFFF) | st.sampled_from([0, 1, 2047, 2048, 1 << 22]), min_size=1), st.data())
def test_histograms_find_the_kth_largest(keys: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(keys)))
    found = sharded.largest(lambda prefix, shift: sharded.histogram(np.array(keys, np.int32), prefix, shift), count)
    least = sorted(keys, reverse=True)[count - 1]
    assert found == (least, count - sum(key > least for key in keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_named(backend: Backend) -> None:
    models = models_of(torch.float32)
    models[2][3][7] = float("nan")
    held = Held(models, 1)
    selection = stream_cores(held, [10], backend=backend)
    with pytest.raises(ValueError, match="task 1, tensor 3"):
        selection.select(held, selection.ranges_within(1 << 20))


def test_counts_and_backends_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(models_of(torch.float32), 1)
    with pytest.raises(ValueError, match=f"the models have {sum(SIZES)} elements"):
        stream_cores(held, [sum(SIZES) + 1])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs CUDA or ROCm tensors"):
        stream_cores(held, [1], backend="triton")
    with pytest.raises(ValueError, match="backend='cpu' needs CPU tensors, got meta"):
        stream_cores(held, [1], backend="cpu", place=placement_of(torch.device("meta")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_low_rank_update_has_the_same_bits_everywhere(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(37, 5, generator=generator), torch.randn(5, 53, generator=generator)
    values = torch.randn(37 * 53, generator=generator).to(dtype)
    whole = add_low_rank(values, left, right, 0, 0.5)
    part = add_low_rank(values[100:777], left, right, 100, 0.5, backend="reference")
    assert torch.equal(whole[100:777], part)
    wanted = values.double() + 0.5 * (left.double() @ right.double()).flatten()
    torch.testing.assert_close(whole.double(), wanted, rtol=2**-7, atol=1e-2)
    with pytest.raises(ValueError, match="the product has 1961"):
        add_low_rank(values, left, right, 1, 0.5)
    with pytest.raises(ValueError, match="are no factors"):
        add_low_rank(values, right, left, 0, 0.5)
