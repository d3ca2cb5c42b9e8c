"""What slices of a merged model are compared with, element by element."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from cpift_kernels import pack_mask, union_mask

from cpift.checkpoints import finite
from cpift.checkpoints.finite import all_finite
from cpift.merging import checks
from cpift.merging.checks import Operands, differing_bits, differing_cores
from cpift.merging.definition import Runs, sequential_slerp

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [1, 31, 32, 64, 65, 200]


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_RUN", 64)
    monkeypatch.setattr(finite, "_RUN", 64)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    values = torch.linspace(-1, 1, size).to(dtype)
    largest = torch.finfo(dtype).max
    for place in {0, size // 2, size - 1}:
        for bad in (float("nan"), float("inf"), -float("inf")):
            values[place] = bad
            assert not all_finite(values)
        for good in (largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny):
            values[place] = good
            assert all_finite(values)
    assert all_finite(values[:0])
    if size > 2:
        values[1] = float("nan")
        assert all_finite(values[::2]), "what is not asked for is not looked at"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.int64])
@pytest.mark.parametrize("size", SIZES)
def test_bits_are_compared_not_values(dtype: torch.dtype, size: int) -> None:
    one = torch.zeros(size, dtype=dtype)
    other = one.clone()
    assert differing_bits(one, other) == (size, 0)
    other[size - 1] = 1
    assert differing_bits(one, other) == (size, 1)
    if dtype.is_floating_point:
        one[0] = other[0] = float("nan")
        assert differing_bits(one, other) == (size, int(size > 1))
        other[0], one[0] = -0.0, 0.0
        assert differing_bits(one, other) == (size, 1 + int(size > 1))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_cores_of_one_donor_are_compared_with_it(dtype: torch.dtype, tasks: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size * tasks)
    sources = [torch.randn(size, generator=generator).to(dtype) for _ in range(tasks + 1)]
    regions = [torch.rand(size, generator=generator) < 0.4 for _ in range(tasks)]
    out = sources[0].clone()
    for source, region in zip(sources[1:], regions, strict=True):
        out[region] = source[region]
    wrong = torch.rand(size, generator=generator) < 0.2
    out[wrong] = -out[wrong]
    masks = [pack_mask(region) for region in regions]
    sole = [r & ~torch.stack([o for o in regions if o is not r] or [torch.zeros_like(r)]).any(0) for r in regions]
    expected = sum(int((of & (out != source)).sum()) for source, of in zip(sources[1:], sole, strict=True))
    operands = Operands(sources, [None, *masks], union_mask(masks))
    assert differing_cores(operands, out) == (sum(int(of.sum()) for of in sole), expected)


def test_where_no_task_has_a_core_nothing_is_compared() -> None:
    values = torch.ones(70)
    for masks in ([None, None], [None, torch.zeros(3, dtype=torch.int32)]):
        assert differing_cores(Operands([values, values], masks, torch.zeros(3, dtype=torch.int32)), values) == (0, 0)


def _runs(parts: list[list[np.ndarray]]) -> Runs:
    return lambda: (partial(list, part) for part in parts)


def test_the_definitions_weights_are_those_of_slerp() -> None:
    """Of every angle from nearly parallel to nearly opposite, and of a vector of zeros, which is lerped."""
    generator = np.random.default_rng(0)
    a, sideways = generator.normal(size=(2, 5000))
    sideways -= (sideways @ a) / (a @ a) * a
    sideways *= np.linalg.norm(a) / np.linalg.norm(sideways)
    for angle in (1e-4, 0.1, 1.0, 2.0, 3.0):
        b = 3 * (np.cos(angle) * a + np.sin(angle) * sideways)
        parts = [[a[:999], b[:999]], [a[999:], b[999:]]]
        ((first, second),) = sequential_slerp(_runs(parts), [0.3], 1e-9)
        assert first == pytest.approx(np.sin(0.7 * angle) / np.sin(angle), rel=1e-6)
        assert second == pytest.approx(np.sin(0.3 * angle) / np.sin(angle), rel=1e-6)
    assert sequential_slerp(_runs([[a, 0 * a]]), [0.3], 1e-9) == [(0.7, 0.3)]
    assert sequential_slerp(_runs([[0 * a, a]]), [0.3], 1e-9) == [(0.7, 0.3)]
