"""Masked Gram, SLERP coefficients and fused apply: each against its reference, together against CPI-FT's definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from cpift_kernels import fused_apply, masked_gram, pack_mask, slerp_coefficients, unpack_mask
from torch import Tensor

from tests.helpers.kernel_cases import BF16, FP16, FP32, generator, sequential_slerp

BACKENDS = ["reference", "cpu"]
SHAPES = [(0,), (1,), (31,), (1009,), (7, 3), (37, 53), (64, 64), (3, 9001), (0, 5)]
ULP = {FP32: 2.0**-23, FP16: 2.0**-10, BF16: 2.0**-7}  # largest relative distance of neighbours
DTYPES = [(BF16, BF16), (FP32, FP32), (FP16, FP16), (FP32, BF16), (BF16, FP32)]  # base or output, models


def siblings(
    shape: Sequence[int], base: torch.dtype, dtypes: Sequence[torch.dtype], scale: float = 0.01
) -> list[Tensor]:
    """A model and fine-tunes of it."""
    g = generator(math.prod(shape))
    x = torch.randn(shape, generator=g)
    return [x.to(base), *((x + scale * torch.randn(shape, generator=g)).to(dtype) for dtype in dtypes)]


def random_mask(shape: Sequence[int], share: float, seed: int) -> Tensor:
    return pack_mask(torch.rand(shape, generator=generator(seed)) < share)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize(("base", "tuned"), DTYPES)
def test_gram_equals_the_reference(
    shape: tuple[int, ...], granularity: str, base: torch.dtype, tuned: torch.dtype
) -> None:
    for tasks in (1, 4):
        r, *xs = siblings(shape, base, [tuned] * tasks)
        for excluded in (None, random_mask(shape, 0.05, 1), random_mask(shape, 1.0, 1)):
            found = masked_gram(r, xs, excluded, granularity=granularity, backend="cpu")
            want = masked_gram(r, xs, excluded, granularity=granularity, backend="reference")
            assert found.shape == (shape[0] if granularity == "row" and len(shape) > 1 else 1, tasks + 1, tasks + 1)
            assert torch.equal(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [7, 16])
def test_gram_of_many_tasks_and_mixed_dtypes(tasks: int) -> None:
    r, *xs = siblings((101, 67), FP32, [(BF16, FP16, FP32)[i % 3] for i in range(tasks)])
    found, want = (masked_gram(r, xs, None, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.968, 0.97, 0.99])
def test_gram_of_blocks_with_few_elements_left(share: float) -> None:
    """About as many as fp64 sums take, and fewer; the sum is that of all products, to what fp32 running sums lose."""
    r, *xs = siblings((9001,), BF16, [BF16] * 3)
    excluded = random_mask((9001,), share, 3)
    found, want = (masked_gram(r, xs, excluded, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(found, want)
    kept = ~unpack_mask(excluded, 9001)
    vectors = torch.stack([r.float(), *(x.float() - r.float() for x in xs)]).double()[:, kept]
    norms = vectors.norm(dim=1)
    assert ((found[0] - vectors @ vectors.T).abs() <= 1e-6 * norms[:, None] * norms).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_of_one_element_are_parallel_or_opposite(backend: str) -> None:
    vectors = [torch.randn(500, 1, generator=generator(n)) for n in range(3)]
    found = slerp_coefficients(
        masked_gram(vectors[0], vectors[1:], None, granularity="row", backend=backend), [0.5, 0.3], 1e-4
    )
    assert bool(((found.angles < 1e-6) | (found.angles > math.pi - 1e-6)).all())
    assert float(found.coefficients.abs().max()) <= 1.0


def test_gram_of_what_is_not_finite_is_not() -> None:
    r, *xs = siblings((5000,), FP32, [FP32] * 2)
    xs[1][4500], outside = math.nan, pack_mask(torch.arange(5000) == 4500)
    for backend in BACKENDS:
        assert masked_gram(r, xs, None, backend=backend)[0].isnan().nonzero().tolist() == [
            [0, 2],
            [1, 2],
            [2, 0],
            [2, 1],
            [2, 2],
        ]
        assert masked_gram(r, xs, outside, backend=backend).isfinite().all()


@pytest.mark.slow
def test_gram_has_the_same_bits_on_every_run_and_thread_count() -> None:
    r, *xs = siblings((600, 1001), BF16, [BF16] * 4)
    excluded, threads = random_mask((600, 1001), 0.05, 1), torch.get_num_threads()
    first = masked_gram(r, xs, excluded, backend="reference")
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(masked_gram(r, xs, excluded, backend="cpu"), first)
    finally:
        torch.set_num_threads(threads)


def fuse(
    vectors: list[Tensor], omegas: Sequence[float], out: torch.dtype, epsilon: float = 1e-9, backend: str = "cpu"
) -> Tensor:
    gram = masked_gram(vectors[0], vectors[1:], None, backend=backend)
    found = slerp_coefficients(gram, omegas, epsilon)
    fused = torch.full_like(vectors[0], math.nan, dtype=out)
    fused_apply(fused, vectors, found.coefficients, [None] * len(vectors), backend=backend)
    return fused


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values_of_an_independent_implementation(backend: str) -> None:
    golden = [
        (0.25, [1.0, 0.0], [0.0, 1.0], [0.92388, 0.38268]),
        (0.5, [2.0, 0.0], [0.0, 1.0], [1.41421, 0.70711]),
        (0.5, [1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [1.15470, 0.0, 1.15470, 1.15470]),
    ]
    for omega, a, b, expected in golden:
        fused = fuse([torch.tensor(a), torch.tensor(b)], [omega], FP32, backend=backend)
        assert torch.allclose(fused, torch.tensor(expected), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", range(1, 17))
@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
def test_slerp_within_two_ulps_of_the_sequential_definition(tasks: int, scale: float) -> None:
    """ulps of Σ |c_m x_m|, which bounds what fp32 fused multiply-adds can lose."""
    vectors = siblings((4001,), FP32, [FP32] * tasks, scale)
    omegas = [1 / (i + 2) for i in range(tasks)]
    expected = sequential_slerp(vectors[0], vectors[1:], omegas, 1e-9)
    backend = "cpu" if tasks in (1, 2, 4, 6, 16) else "reference"
    fused = fuse(vectors, omegas, FP32, backend=backend)
    size = sum(x.abs() for x in vectors) / (tasks + 1) * 1.5
    assert ((fused.double() - expected).abs() <= 2 * ULP[FP32] * size).all()
    for out in (BF16, FP16):
        low = fuse(vectors, omegas, out, backend=backend).double()
        assert ((low - expected).abs() <= 0.51 * ULP[out] * expected.abs() + 2 * ULP[FP32] * size + 2.0**-25).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_parallel_vectors_keep_their_angle(backend: str) -> None:
    g = generator(3)
    r, e = (torch.randn(100_000, generator=g) for _ in range(2))
    angle = math.acos(1 - 1e-9)
    x = r + angle * e  # e is almost orthogonal to r and as long
    unit_r, unit_x = (v.double() / v.double().norm() for v in (r, x))
    true = 2 * math.atan2(float((unit_r - unit_x).norm()), float((unit_r + unit_x).norm()))
    found = slerp_coefficients(masked_gram(r, [x], None, backend=backend), [0.3], 1e-9)
    assert not found.lerp.any()
    assert abs(float(found.angles) / true - 1) < 1e-6
    assert 1 - math.cos(true) == pytest.approx(1e-9, rel=0.02)
    expected = [math.sin(0.7 * true) / math.sin(true), math.sin(0.3 * true) / math.sin(true)]
    assert torch.allclose(found.coefficients[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_vectors_take_lerp_and_say_so(backend: str) -> None:
    a = torch.randn(1000, generator=generator(5))
    for other, angle in ((-a, math.pi), (torch.zeros(1000), 0.0), (a.clone(), 0.0), (2 * a, 0.0)):
        found = slerp_coefficients(masked_gram(a, [other], None, backend=backend), [0.25], 1e-6)
        assert found.lerp.all()
        assert float(found.angles) == pytest.approx(angle, abs=1e-5)
        assert torch.equal(found.coefficients, torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    found = slerp_coefficients(masked_gram(torch.zeros(9), [a[:9]], None, backend=backend), [0.25], 1e-6)
    assert found.lerp.all()


def test_collinearity_threshold_decides_the_branch() -> None:
    gram = masked_gram(torch.tensor([1.0, 0.0]), [torch.tensor([math.cos(0.01), math.sin(0.01)])], None)
    assert slerp_coefficients(gram, [0.5], 0.02).lerp.all()
    assert not slerp_coefficients(gram, [0.5], 0.005).lerp.any()


@pytest.mark.parametrize("tasks", [1, 2, 5, 16])
def test_delta_space_is_slerp_of_task_vectors(tasks: int) -> None:
    vectors = siblings((3001,), FP32, [FP32] * tasks, 0.5)
    omegas = [1 / (i + 2) for i in range(tasks - 1)]
    gram = masked_gram(vectors[0], vectors[1:], None, backend="reference")
    found = slerp_coefficients(gram, omegas, 1e-9, space="delta")
    deltas = [x - vectors[0] for x in vectors[1:]]
    expected = vectors[0].double() + sequential_slerp(deltas[0], deltas[1:], omegas, 1e-9)
    fused = sum(c * x.double() for c, x in zip(found.coefficients[0], vectors, strict=True))
    assert (fused - expected).abs().max() < 1e-6
    assert found.angles.shape == (1, tasks - 1)
    assert float(found.coefficients.sum()) == pytest.approx(1.0)


def test_rows_are_independent_vectors() -> None:
    r, x, y = siblings((5, 301), FP32, [FP32, FP32], 0.5)
    excluded = random_mask((5, 301), 0.1, 2)
    rows = slerp_coefficients(masked_gram(r, [x, y], excluded, granularity="row"), [0.5, 0.25], 1e-9)
    kept = ~unpack_mask(excluded, r.numel()).view(5, 301)
    for i in range(5):
        alone = masked_gram(r[i][kept[i]], [x[i][kept[i]], y[i][kept[i]]], None)
        one = slerp_coefficients(alone, [0.5, 0.25], 1e-9)
        assert torch.allclose(rows.coefficients[i], one.coefficients[0], rtol=1e-6)


def test_slerp_arguments_are_checked() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="holds 1 factors; 2 steps"):
        slerp_coefficients(gram, [0.5], 0.1)
    with pytest.raises(ValueError, match="1 steps in space='delta'"):
        slerp_coefficients(gram, [0.5, 0.5], 0.1, space="delta")
    with pytest.raises(ValueError, match=r"leaves \[0, 1\]"):
        slerp_coefficients(gram, [0.5, 1.5], 0.1)
    with pytest.raises(ValueError, match="epsilon=-1"):
        slerp_coefficients(gram, [0.5, 0.5], -1)
    with pytest.raises(ValueError, match="NaN or Inf"):
        slerp_coefficients(gram * math.nan, [0.5, 0.5], 0.1)
    with pytest.raises(ValueError, match="pass float64"):
        slerp_coefficients(gram.float(), [0.5, 0.5], 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("out", "dtype"), DTYPES)
def test_apply_equals_the_reference(shape: tuple[int, ...], rows: bool, out: torch.dtype, dtype: torch.dtype) -> None:
    for sources in (1, 5):
        xs = siblings(shape, dtype, [dtype] * (sources - 1))
        count = shape[0] if rows and len(shape) > 1 else 1
        scale = torch.rand(count, sources, dtype=torch.float64, generator=generator(1))
        masks = [None, *(random_mask(shape, 0.3, m) for m in range(1, sources))]
        found, want = (torch.full(shape, math.nan, dtype=out) for _ in range(2))
        fused_apply(found, xs, scale, masks, backend="cpu")
        fused_apply(want, xs, scale, masks, backend="reference")
        size = sum(x.float().abs() for x in xs) if found.numel() else torch.zeros(shape)
        assert ((found.float() - want.float()).abs() <= ULP[out] * want.float().abs() + 2 * ULP[FP32] * size).all()
        if masks[1:] and found.numel():
            held = torch.stack([unpack_mask(m, found.numel()) for m in masks[1:]]).any(0)
            assert torch.equal(found.view(-1)[held], want.view(-1)[held])  # donors and means agree bit for bit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_single_donor_is_copied_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    raw = torch.int32 if dtype == FP32 else torch.int16
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(raw) * (65537 if dtype == FP32 else 1)
    donor = every.view(dtype)
    quiet = torch.where(donor.isnan(), 0.0, donor) if dtype == FP16 else donor  # see cpu/apply.py on fp16 NaN
    out = torch.full_like(donor, math.nan)
    words = pack_mask(torch.ones(len(donor), dtype=torch.bool))
    fused_apply(
        out, [donor.flip(0), quiet], torch.tensor([[1.0, 0.0]], dtype=torch.float64), [None, words], backend=backend
    )
    assert torch.equal(out.view(raw), quiet.view(raw))


@pytest.mark.parametrize("out", [BF16, FP16])
def test_rounding_is_to_nearest_even(out: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator(7)).to(torch.int32)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 0x8000
    tiny = torch.arange(1, 2**13, dtype=torch.int32) << 12
    x = torch.cat([bits, ties, tiny]).view(FP32)
    found = torch.full_like(x, 3.0, dtype=out)
    fused_apply(found, [x], torch.ones(1, 1, dtype=torch.float64), [None], backend="cpu")
    want = x.to(out)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_elements_get_the_mean_and_a_zero_coefficient_keeps_nan_out(backend: str) -> None:
    xs = [torch.full((70,), v) for v in (math.nan, 1.0, 2.0, 6.0)]
    masks = [None, *(pack_mask(torch.arange(70) < n) for n in (10, 20, 33))]
    out = torch.full((70,), math.nan)
    fused_apply(out, xs, torch.tensor([[0.0, 0.5, 0.25, 0.0]], dtype=torch.float64), masks, backend=backend)
    assert out.tolist() == [3.0] * 10 + [4.0] * 10 + [6.0] * 13 + [1.0] * 37


def test_eighteen_sources() -> None:
    xs = siblings((333,), BF16, [BF16] * 17)
    scale = torch.rand(1, 18, dtype=torch.float64, generator=generator(1)) / 18
    found, want = (torch.full((333,), math.nan, dtype=FP32) for _ in range(2))
    fused_apply(found, xs, scale, [None] * 18, backend="cpu")
    fused_apply(want, xs, scale, [None] * 18, backend="reference")
    assert torch.allclose(found, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_arguments_are_checked(backend: str) -> None:
    x, ones = torch.zeros(3, 4), torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="out shares memory"):
        fused_apply(x, [x], ones, [None], backend=backend)
    with pytest.raises(ValueError, match=r"R in \[1, 3\]"):
        fused_apply(x, [x.clone()], ones.expand(2, 1), [None], backend=backend)
    with pytest.raises(ValueError, match="1 sources and 0 masks"):
        fused_apply(x, [x.clone()], ones, [], backend=backend)
    with pytest.raises(ValueError, match="CPU float64"):
        fused_apply(x, [x.clone()], ones.float(), [None], backend=backend)
    with pytest.raises(ValueError, match="expected 1"):
        fused_apply(x, [x.clone()], ones, [torch.zeros(2, dtype=torch.int32)], backend=backend)
