"""Overlap counts, conflict resolution and freezing: bit for bit against their references."""

from __future__ import annotations

import math

import pytest
import torch
from cpift_kernels import (
    count_mask,
    gather_masked,
    mask_starts,
    overlap_counts,
    overlap_counts_per_tensor,
    pack_mask,
    resolve_conflicts,
    scatter_masked_,
    union_mask,
    unpack_mask,
    zero_masked_,
)

from tests.helpers.kernel_cases import BF16, FP16, FP32, generator

BACKENDS = ["reference", "cpu"]
SIZES = [0, 1, 31, 32, 1009, 70_001]
SHARES = [0.0, 0.02, 0.6, 1.0]


def masks_of(n: int, share: float, tasks: int) -> list[torch.Tensor]:
    return [pack_mask(torch.rand(n, generator=generator(task)) < share) for task in range(tasks)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlap_counts_what_sets_share(backend: str) -> None:
    sizes = (1009, 0, 33)
    masks = [[pack_mask(torch.rand(n, generator=generator(7 * i + n)) < 0.4) for n in sizes] for i in range(5)]
    sets = [[set(unpack_mask(w, n).nonzero()[:, 0].tolist()) for w, n in zip(m, sizes, strict=True)] for m in masks]
    counts = overlap_counts_per_tensor(masks, backend=backend)
    assert counts.tolist() == [[[len(a[t] & b[t]) for b in sets] for a in sets] for t in range(3)]
    assert torch.equal(overlap_counts(masks, backend=backend), counts.sum(0))


def test_overlap_of_many_words_equals_the_reference() -> None:
    masks = [[words] for words in masks_of(9_000_001, 0.01, 3)]
    assert torch.equal(overlap_counts(masks, backend="cpu"), overlap_counts(masks, backend="reference"))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", SHARES)
def test_conflicts_equal_the_reference(n: int, share: float) -> None:
    g = generator(n)
    base = torch.randn(n, generator=g).to(BF16)
    steps = torch.randint(-2, 3, (4, n), generator=g) * 2.0**-6  # few values: many ties
    tuned = [(base.float() + s).to(d) for s, d in zip(steps, (BF16, FP32, FP16, BF16), strict=True)]
    masks = masks_of(n, share, 4)
    before = [words.clone() for words in masks]
    for policy in ("magnitude", "last", "mean"):
        found = resolve_conflicts(policy, base, tuned, masks, backend="cpu")
        want = resolve_conflicts(policy, base, tuned, masks, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert torch.equal(union_mask(found), union_mask(masks))
        if policy != "mean":
            assert sum(map(count_mask, found)) == count_mask(union_mask(masks))
    assert all(torch.equal(a, b) for a, b in zip(masks, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_keeps_a_contested_element(backend: str) -> None:
    base = torch.zeros(3)
    tuned = [torch.tensor([1.0, -2.0, 5.0]), torch.tensor([-1.0, 3.0, 9.0])]
    masks = [pack_mask(torch.tensor([True, True, True])), pack_mask(torch.tensor([True, True, False]))]
    kept = resolve_conflicts("magnitude", base, tuned, masks, backend=backend)
    assert [unpack_mask(w, 3).tolist() for w in kept] == [[True, False, True], [False, True, False]]
    kept = resolve_conflicts("last", base, tuned, masks, backend=backend)
    assert [unpack_mask(w, 3).tolist() for w in kept] == [[False, False, True], [True, True, False]]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_freezing_equals_the_reference_bit_for_bit(n: int, share: float, dtype: torch.dtype) -> None:
    raw = torch.int32 if dtype == FP32 else torch.int16
    bits = torch.randint(torch.iinfo(raw).min, torch.iinfo(raw).max, (n,), generator=generator(n)).to(raw)
    values, (words,) = bits.view(dtype), masks_of(n, share, 1)  # NaN and Inf among them
    member = unpack_mask(words, n)
    saved = gather_masked(values, words, backend="cpu")
    assert torch.equal(saved.view(raw), bits[member])
    assert torch.equal(saved.view(raw), gather_masked(values, words, backend="reference").view(raw))
    for backend in BACKENDS:
        zeroed = values.clone()
        zero_masked_(zeroed, words, backend=backend)
        assert torch.equal(zeroed.view(raw), torch.where(member, 0, bits))
        scatter_masked_(zeroed, words, saved, backend=backend)
        assert torch.equal(zeroed.view(raw), bits)
        starts = mask_starts(words, n, backend=backend)
        assert (starts.dtype, int(starts[-1])) == (torch.int64, len(saved))
        zero_masked_(zeroed, words, backend=backend)
        scatter_masked_(zeroed, words, saved, starts=starts, backend=backend)
        assert torch.equal(zeroed.view(raw), bits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_freezing_refuses_the_wrong_saved_values(backend: str) -> None:
    values, words = torch.zeros(40), pack_mask(torch.arange(40) < 5)
    for wrong in (4, 6):
        with pytest.raises(ValueError, match=f"saved holds {wrong} values, the mask 5 bits"):
            scatter_masked_(values, words, torch.ones(wrong), backend=backend)
    with pytest.raises(ValueError, match="pass what gather_masked gave"):
        scatter_masked_(values, words, torch.ones(5, dtype=BF16), backend=backend)
    with pytest.raises(ValueError, match="1-D view"):
        zero_masked_(torch.zeros(5, 8), words, backend=backend)
    assert not values.any()


def test_views_of_a_larger_tensor_leave_their_neighbours_alone() -> None:
    whole = torch.full((103,), math.nan)
    view, words = whole[1:102], pack_mask(torch.ones(101, dtype=torch.bool))
    zero_masked_(view, words, backend="cpu")
    assert not view.any()
    assert whole[[0, 102]].isnan().all()
