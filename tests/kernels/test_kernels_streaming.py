"""Selection in phases, and low-rank updates: every backend gives the bits of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cpift_kernels import Backend, Marked, Range, add_low_rank, placement_of, select_cores, stream_cores
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
