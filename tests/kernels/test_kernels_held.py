"""A list of held tensors: bit for bit what the operations on single tensors do."""

from __future__ import annotations

import pytest
import torch
from cpift_kernels import HeldElements, hold_masked, pack_mask, unpack_mask
from cpift_kernels.cpu import freeze

from tests.helpers.kernel_cases import BF16, FP16, FP32, generator

BACKENDS = ["reference", "cpu"]
SIZES = [0, 1, 31, 32, 33, 1009, 131_072, 131_073, 300_001]  # see `small_spans`
DTYPES = [BF16, FP16, FP32]
RAW = {BF16: torch.int16, FP16: torch.int16, FP32: torch.int32}


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU cuts its work after 131072 elements."""
    monkeypatch.setattr(freeze, "SPAN", 1 << 12)


def any_bits(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """NaN and Inf among them."""
    info = torch.iinfo(RAW[dtype])
    return torch.randint(info.min, info.max, (n,), generator=generator(seed)).to(RAW[dtype]).view(dtype)


def case(share: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    values = [any_bits(n, DTYPES[i % 3], i) for i, n in enumerate(SIZES * 3)]
    masks = [torch.rand(x.numel(), generator=generator(i)) < share for i, x in enumerate(values)]
    masks[-1][131_072:262_144] = False  # a piece without a set bit between two with some
    masks[-2][:] = False
    return values, [pack_mask(mask) for mask in masks]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(RAW[tensor.dtype])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_is_put_back_bit_for_bit(
    backend: str, share: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    values, words = case(share)
    held = hold_masked(values, words, backend=backend)
    assert held.count == sum(int(unpack_mask(w, x.numel()).sum()) for x, w in zip(values, words, strict=True))
    for seed in (100, 200):  # the same list again, elsewhere in memory
        moved = [any_bits(x.numel(), x.dtype, seed + place) for place, x in enumerate(values)]
        before = [x.clone() for x in moved]
        held.restore_(moved)
        for x, old, new, mask in zip(values, before, moved, words, strict=True):
            assert torch.equal(bits(new), torch.where(unpack_mask(mask, x.numel()), bits(x), bits(old)))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_any_dtype_is_zeroed_where_elements_are_held(backend: str, share: float) -> None:
    values, words = case(share)
    held = hold_masked(values, words, backend=backend)
    for place, mask in enumerate(words):
        for dtype in DTYPES:
            gradient = any_bits(values[place].numel(), dtype, place)
            wanted = torch.where(unpack_mask(mask, gradient.numel()), 0, bits(gradient))
            held.zero_(place, gradient)
            assert torch.equal(bits(gradient), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_elements_are_held_instead_and_pulled_towards(backend: str) -> None:
    values, words = case(0.3)
    held = hold_masked(values, words, backend=backend)
    others = [torch.randn(x.numel(), generator=generator(place)).to(x.dtype) for place, x in enumerate(values)]
    for place, other in enumerate(others):
        held.replace(place, other)
    moved, pulled = [[torch.zeros_like(x) for x in values] for _ in range(2)]
    held.restore_(moved)
    held.pull_(pulled, [0.25] * len(values))
    for other, new, near, mask in zip(others, moved, pulled, words, strict=True):
        masked = unpack_mask(mask, other.numel())
        assert torch.equal(bits(new), torch.where(masked, bits(other), 0))
        assert torch.equal(near, torch.where(masked, other / 4, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_element_is_pulled_by_its_own_share(backend: str) -> None:
    values, words = case(0.3)
    held = hold_masked(values, words, backend=backend)
    values = [torch.randn(x.numel(), generator=generator(place)).to(x.dtype) for place, x in enumerate(values)]
    for place, x in enumerate(values):
        held.replace(place, x)
    wanted = [torch.rand(x.numel(), generator=generator(place)).to(x.dtype) for place, x in enumerate(values)]
    shares = [held.chosen(place, x) for place, x in enumerate(wanted)]
    pulled = [torch.zeros_like(x) for x in values]
    held.pull_each_(pulled, shares)
    for x, share, near, mask in zip(values, wanted, pulled, words, strict=True):
        masked = unpack_mask(mask, x.numel())
        assert torch.equal(near, torch.where(masked, torch.zeros_like(x).lerp(x, share), 0))
    with pytest.raises(ValueError, match="shares are not one for each held element"):
        held.pull_each_(pulled, [share[:-1] for share in shares])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_held(backend: str) -> None:
    held = hold_masked([], [], backend=backend)
    held.restore_([])
    assert (held.count, held.nbytes) == (0, 0)


@pytest.fixture(params=BACKENDS)
def held(request: pytest.FixtureRequest) -> HeldElements:
    values = [torch.ones(40), torch.ones(50, dtype=BF16)]
    return hold_masked(values, [pack_mask(x > 0) for x in values], backend=request.param)


def test_another_list_is_refused_and_nothing_written(held: HeldElements) -> None:
    a, b = torch.zeros(40), torch.zeros(50, dtype=BF16)
    with pytest.raises(ValueError, match="values holds 1 tensors, 2 are held; pass the same list"):
        held.restore_([a])
    with pytest.raises(ValueError, match=r"values\[1\] has shape \(51,\); pass the 50 elements as they were held"):
        held.restore_([a, torch.zeros(51, dtype=BF16)])
    with pytest.raises(ValueError, match=r"values\[1\] has dtype torch.float32, what is held torch.bfloat16"):
        held.restore_([a, b.float()])
    with pytest.raises(ValueError, match=r"values for tensor 1 has dtype torch.float32, what is held torch.bfloat16"):
        held.replace(1, torch.zeros(50))
    with pytest.raises(ValueError, match="not contiguous"):
        held.restore_([a, torch.zeros(100, dtype=BF16)[::2]])
    assert not a.any()
    with pytest.raises(ValueError, match=r"gradient has shape \(39,\); pass the 40"):
        held.zero_(0, torch.zeros(39))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_held_is_refused(backend: str) -> None:
    mask = pack_mask(torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="words holds 1 masks for 2 tensors; pass one for each"):
        hold_masked([torch.zeros(6), torch.zeros(6)], [mask], backend=backend)
    with pytest.raises(ValueError, match=r"values\[1\] has shape \(2, 3\); pass a 1-D view"):
        hold_masked([torch.zeros(6), torch.zeros(2, 3)], [mask, mask], backend=backend)
    with pytest.raises(ValueError, match=r"words\[0\] has 1 words for 40 elements"):
        hold_masked([torch.zeros(40)], [mask], backend=backend)
