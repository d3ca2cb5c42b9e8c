"""Core selection: exact on every backend, for every cut of the work, against a full sort."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cpift_kernels import CoreMask, pack_mask, select_cores, streaming, unpack_mask
from cpift_kernels.cpu import bracket, candidates, order, segments
from cpift_kernels.cpu import selection as cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.kernel_cases import BF16, FP16, FP32, UPDATES, models, sorted_top, split

BACKENDS = ["reference", "cpu"]
DTYPES = [(BF16, [BF16]), (FP32, [FP32]), (FP16, [FP16]), (BF16, [FP32, FP16]), (FP32, [BF16])]


def selected(core: CoreMask, pretrained: list[Tensor]) -> np.ndarray:
    bits = [unpack_mask(words, x.numel()) for words, x in zip(core.words, pretrained, strict=True)]
    return torch.cat(bits).nonzero()[:, 0].numpy()


def assert_same(found: list[list[CoreMask]], expected: list[list[CoreMask]]) -> None:
    for task, other in zip(found, expected, strict=True):
        for core, want in zip(task, other, strict=True):
            assert (core.count, core.requested, core.threshold) == (want.count, want.requested, want.threshold)
            for words, want_words in zip(core.words, want.words, strict=True):
                assert torch.equal(words, want_words)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("n", [1, 33, 1009])
def test_selection_equals_a_full_sort(backend: str, update: str, n: int) -> None:
    for base_dtype, dtypes in DTYPES:
        pretrained, tuned = models(update, n, base_dtype, dtypes)
        counts = [0, 1, n // 100, n // 3, n]
        for model, cores in zip(tuned, select_cores(pretrained, tuned, counts, backend=backend), strict=True):
            for count, core in zip(counts, cores, strict=True):
                expected = sorted_top(pretrained, model, count)
                assert np.array_equal(selected(core, pretrained), expected)
                assert (core.count, core.requested) == (len(expected), count)
                delta = torch.cat(
                    [(a.float() - b.float()).abs().view(-1) for a, b in zip(model, pretrained, strict=True)]
                )
                assert core.threshold == (delta[expected].min() if len(expected) else float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("base_dtype", "dtypes"), [DTYPES[0], DTYPES[1], DTYPES[3]])
def test_the_sampled_path_equals_the_reference(update: str, base_dtype: torch.dtype, dtypes: list[torch.dtype]) -> None:
    n = 70_001  # above bracket.ALL
    pretrained, tuned = models(update, n, base_dtype, dtypes)
    counts = [0, 1, n // 100, n // 3, n - 1, n]
    assert_same(
        select_cores(pretrained, tuned, counts, backend="cpu"),
        select_cores(pretrained, tuned, counts, backend="reference"),
    )


@pytest.mark.parametrize("update", ["random", "tied", "two-valued"])
def test_no_cut_of_the_work_changes_a_bit(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 200_003
    pretrained, tuned = models(update, n, BF16, [BF16, FP32])
    counts = [n // 50, n // 4]
    expected = select_cores(pretrained, tuned, counts, backend="cpu")
    threads = torch.get_num_threads()
    for chunk, segment, item, room, workers in [
        (32, 1 << 10, 1 << 15, 64, 1),
        (1 << 10, 1 << 12, 1 << 16, 1 << 10, 3),
        (1 << 16, 1 << 17, 1 << 20, 1 << 17, 2),
    ]:
        for module in (streaming, segments):
            monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(streaming, "SEGMENT", segment)
        monkeypatch.setattr(segments, "ITEM", item)
        monkeypatch.setattr(candidates, "ROOM", room)
        torch.set_num_threads(workers)
        try:
            assert_same(select_cores(pretrained, tuned, counts, backend="cpu"), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [(bracket.LARGEST, 0, bracket.LARGEST - 1, 0), (1, 0, 0, 0), (2, 9, 2, 9)])
def test_a_missed_bracket_is_drawn_again(wrong: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    n = 80_000
    pretrained, tuned = models("random", n, BF16, [BF16, FP32])
    counts = [n // 100, n // 3]
    draw, attempts = cpu.draw_brackets, []

    def draw_badly(table: segments.Segments, counts: list[int], attempt: int) -> np.ndarray:
        attempts.append(attempt)
        brackets = draw(table, counts, attempt)
        if attempt < bracket.ATTEMPTS - 1:
            brackets[0, 1] = wrong
        return brackets

    monkeypatch.setattr(cpu, "draw_brackets", draw_badly)
    found = select_cores(pretrained, tuned, counts, backend="cpu")
    assert attempts == list(range(bracket.ATTEMPTS))
    assert_same(found, select_cores(pretrained, tuned, counts, backend="reference"))


def test_the_bracket_holds_the_threshold_and_few_candidates() -> None:
    n = 2_000_000
    pretrained, tuned = models("random", n, FP32, [FP32])
    table = segments.Segments.of(pretrained, tuned)
    high, _, low, _ = bracket.draw_brackets(table, [n // 100], 0)[0, 0]
    keys = torch.cat([(a - b).abs().view(-1) for a, b in zip(tuned[0], pretrained, strict=True)]).view(torch.int32)
    above, candidates = int((keys > high).sum()), int(((keys > low) & (keys <= high)).sum())
    assert above < n // 100 <= above + candidates
    assert candidates < 0.006 * n


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=200), st.data())
def test_any_ties_at_any_count(steps: list[int], data: st.DataObject) -> None:
    base, model = [torch.zeros(len(steps))], [torch.tensor(steps) * 0.5]
    count = data.draw(st.integers(0, len(steps)))
    for backend in BACKENDS:
        core = select_cores(base, [model], [count], backend=backend)[0][0]
        assert np.array_equal(selected(core, base), sorted_top(base, model, count))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 3), min_size=1, max_size=300), st.data())
def test_order_statistics_are_those_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    keys = np.array(values, np.int32)
    count = data.draw(st.integers(1, len(keys)))
    sorted_places = np.argsort(-keys.astype(np.int64), kind="stable")[:count]
    last = sorted_places[-1]
    assert order.point(keys, count) == (keys[last], last)
    assert order.kth_largest(keys, count) == (keys[last], (keys[sorted_places] == keys[last]).sum())
    assert order.kth_largest(keys, 0) == (int(keys.max()) + 1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 40, 999])
def test_nan_and_inf_are_refused_by_name(backend: str, value: float, place: int) -> None:
    pretrained, tuned = models("random", 3005, BF16, [BF16, FP32, BF16])
    tuned[1][3].view(-1)[place] = value
    with pytest.raises(ValueError, match=r"tuned\[1\]\[3\] .* NaN or Inf \(task 1, tensor 3\)"):
        select_cores(pretrained, tuned, [5], backend=backend)
    pretrained[2].view(-1)[place] = value
    with pytest.raises(ValueError, match=r"tuned\[0\]\[2\]"):
        select_cores(pretrained, tuned, [0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_checked(backend: str) -> None:
    base, model = [torch.zeros(4, 5)], [torch.ones(4, 5)]
    with pytest.raises(ValueError, match="have 20 elements"):
        select_cores(base, [model], [21], backend=backend)
    with pytest.raises(ValueError, match=r"tuned\[0\]\[0\] has shape \(20,\)"):
        select_cores(base, [[torch.ones(20)]], [1], backend=backend)
    with pytest.raises(ValueError, match="not contiguous"):
        select_cores([torch.zeros(5, 4).T], [model], [1], backend=backend)
    with pytest.raises(ValueError, match="float64"):
        select_cores(base, [[torch.ones(4, 5).double()]], [1], backend=backend)
    with pytest.raises(ValueError, match="between 1 and 16"):
        select_cores(base, [], [1], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_no_elements_has_empty_cores(backend: str) -> None:
    for base in ([], [torch.zeros(0, 3)]):
        core = select_cores(base, [base], [0], backend=backend)[0][0]
        assert (core.count, core.threshold, [w.numel() for w in core.words]) == (0, float("inf"), [0] * len(base))


def test_concurrent_callers_and_forked_children_agree() -> None:
    pretrained, tuned = models("tied", 100_003, BF16, [BF16])
    expected = select_cores(pretrained, tuned, [500], backend="cpu")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: select_cores(pretrained, tuned, [500], backend="cpu"), range(8)):
            assert_same(found, expected)
    with multiprocessing.get_context("fork").Pool(2) as children:
        words = children.map(_words_in_a_child, [0, 1])
    assert all(np.array_equal(child, np.concatenate([w.numpy() for w in expected[0][0].words])) for child in words)


def _words_in_a_child(_: int) -> np.ndarray:
    torch.set_num_threads(1)  # torch's own threads do not survive a fork: with a parent that used them it would hang
    pretrained, tuned = models("tied", 100_003, BF16, [BF16])
    core = select_cores(pretrained, tuned, [500], backend="cpu")[0][0]
    return np.concatenate([words.numpy() for words in core.words])


def test_masks_have_clear_padding() -> None:
    base = split(torch.zeros(1009))
    core = select_cores(base, [[x + 1 for x in base]], [1009], backend="cpu")[0][0]
    for words, x in zip(core.words, base, strict=True):
        assert torch.equal(words, pack_mask(torch.ones(x.shape, dtype=torch.bool)))
