"""All tensors in one buffer, as PTX compiled for a GPU or interpreted: each has the bits that it has alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cpift_kernels import FlatLayout, Placement, flat_apply, flat_gram, flat_overlaps, placement_of, stream_cores
from cpift_kernels import flat as flat_module
from cpift_kernels import gram as gram_module
from cpift_kernels.apply import fused_apply_reference
from cpift_kernels.cpu.streaming import BracketSelection
from cpift_kernels.gram import masked_gram_reference
from cpift_kernels.masks import pack_mask
from cpift_kernels.overlap import overlap_counts_per_tensor_reference, resolve_conflicts_reference
from cpift_kernels.placement import Queue
from cpift_kernels.triton import flat, flat_selection, gram, overlap, streaming
from cpift_kernels.triton.flat_selection import FlatSelection
from torch import Tensor

from tests.helpers.flat import counted_launches, flats_of, laid, laid_words
from tests.helpers.interpreted import rounded_as_gpus
from tests.helpers.placements import Lazy, queued_launches
from tests.helpers.streamed import Held
from tests.ptx.device import interpreted_ptx

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLOW = pytest.mark.slow
ONCE = pytest.mark.skipif(INTERPRETED, reason="queues hold launches of compiled kernels")
CPU = torch.device("cpu")
# Less than a block, empty, less than a word, a whole unit of the layout, some of another one.
SIZES = [5003, 0, 31] if INTERPRETED else [5003, 0, 31, flat_module.PAD, flat_module.PAD + 37, 1]
DTYPES = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16", marks=SLOW),
    pytest.param(torch.float32, id="fp32", marks=SLOW),
]


@pytest.fixture(autouse=True)
def launched() -> Iterator[None]:
    torch.manual_seed(0)
    with rounded_as_gpus() if INTERPRETED else interpreted_ptx("sm_90"):
        yield


def models_of(dtype: torch.dtype, tasks: int, sizes: list[int] = SIZES, moved: float = 1.0) -> list[list[Tensor]]:
    """θ0 and fine-tunes, of which a share `moved` of the elements changed."""
    base = [torch.randn(size).to(dtype) for size in sizes]
    steps = [[0.02 * torch.randn(size) * (torch.rand(size) < moved) for size in sizes] for _ in range(tasks)]
    return [base, *([(x.float() + s).to(dtype) for x, s in zip(base, row, strict=True)] for row in steps)]


def masks_of(tasks: int, share: float = 0.3, sizes: list[int] = SIZES) -> list[list[Tensor]]:
    return [[pack_mask(torch.rand(size) < share) for size in sizes] for _ in range(tasks)]


def together(models: list[list[Tensor]], masks: list[list[Tensor]]) -> tuple[FlatLayout, list[Tensor], list[Tensor]]:
    layout = FlatLayout([x.numel() for x in models[0]])
    return layout, [laid(model, layout) for model in models], [laid_words(task, layout) for task in masks]


def test_a_layout_says_what_lies_where() -> None:
    layout = FlatLayout(SIZES)
    assert layout.total % flat_module.PAD == 0
    assert [layout.number_at(int(start)) for start, size in zip(layout.starts, SIZES, strict=True) if size] == [
        number for number, size in enumerate(SIZES) if size
    ]
    words, bits = layout.padding(CPU)
    outside = torch.zeros(layout.total // 32, dtype=torch.int32)
    outside[words] = bits
    inside = torch.cat([pack_mask(torch.ones(size, dtype=torch.bool)) for size in SIZES])
    assert torch.equal(torch.cat([layout.words(~outside, t) for t in range(len(SIZES))]), inside)
    assert int(np.bitwise_count(outside.numpy().view(np.uint32)).sum()) == layout.total - sum(SIZES)
    tensor, start, numel = layout.runs(4096)
    assert numel.sum() == sum(SIZES)
    assert all(layout.number_at(place) == number for place, number in zip(start.tolist(), tensor, strict=True))
    assert FlatLayout([0]).total == 0


@pytest.mark.parametrize("tasks", [1, 3])
def test_overlaps_of_each_tensor(tasks: int) -> None:
    masks = masks_of(tasks)
    layout, _, there = together([[torch.zeros(size) for size in SIZES]], masks)
    found = flat_overlaps(there, layout, backend="reference")
    assert torch.equal(found, overlap_counts_per_tensor_reference(masks))
    assert torch.equal(flat.flat_overlaps(there, layout), found)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in few elements: each takes its elements one after another, slow where it is interpreted."""
    for module in (gram_module, gram, flat_module):
        monkeypatch.setattr(module, "BLOCK", 256)
    for module in (gram_module, gram):
        monkeypatch.setattr(module, "FEW", 16)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [pytest.param(None, marks=SLOW), 0.3, pytest.param(0.96, marks=SLOW)])
def test_gram_matrices_of_each_run(share: float | None, dtype: torch.dtype) -> None:
    """The last block of a tensor, with few elements, is summed as such, whatever lies behind it."""
    models, masks = models_of(dtype, 2), masks_of(1, share or 0.0)
    layout, (base, *tuned), (excluded,) = together(models, masks)
    found = flat.flat_gram(base, tuned, None if share is None else excluded, layout, 1 << 13)
    wanted = []
    for number, size in enumerate(SIZES):
        for start in range(0, size, 1 << 13):
            here, *others = (model[number][start : start + (1 << 13)] for model in models)
            words = masks[0][number][start // 32 : (start + len(here) + 31) // 32]
            wanted.append(masked_gram_reference(here, others, None if share is None else words))
    assert torch.equal(found, torch.cat(wanted))


@pytest.mark.slow
@pytest.mark.usefixtures("short_blocks")
def test_gram_matrices_of_more_vectors_than_one_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "GROUP", 2)
    monkeypatch.setattr(gram, "ACROSS", 1)
    sizes = [300, 1, 4099]
    layout, (base, *tuned), (excluded,) = together(models_of(torch.bfloat16, 5, sizes), masks_of(1, 0.3, sizes))
    wanted = flat_gram(base, tuned, excluded, layout, elements=4096, backend="reference")
    assert torch.equal(flat.flat_gram(base, tuned, excluded, layout, 4096), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_has_its_own_coefficients(dtype: torch.dtype) -> None:
    models, masks = models_of(dtype, 2), masks_of(2, 0.4)
    models[2][2][7] = float("nan")  # left out by a coefficient that is 0, unless its mask holds it
    layout, sources, words = together(models, masks)
    scales = torch.rand(len(SIZES), 3) - 0.3
    scales[2, 2] = 0.0
    out = torch.full((layout.total,), float("nan"), dtype=dtype)
    flat.flat_apply(out, sources, scales, [None, *words], layout)
    for number, size in enumerate(SIZES):
        wanted = torch.empty(size, dtype=dtype)
        here = [None, *(task[number] for task in masks)]
        fused_apply_reference(wanted, [model[number] for model in models], scales[number][None].double(), here)
        found = layout.tensor(out, number)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7.5), wanted.nan_to_num(7.5))


@pytest.mark.parametrize("policy", ["magnitude", "last"])
def test_owners_of_each_tensor(policy: str) -> None:
    """By the kernel of single tensors, which knows of none."""
    models, masks = models_of(torch.bfloat16, 2, moved=0.5), masks_of(2)
    layout, (base, *tuned), words = together(models, masks)
    found = overlap.resolve_conflicts(policy, base, tuned, words)
    for number in range(len(SIZES)):
        of_tensor = [[model[number] for model in models], [task[number] for task in masks]]
        wanted = resolve_conflicts_reference(policy, of_tensor[0][0], of_tensor[0][1:], of_tensor[1])
        assert all(torch.equal(layout.words(a, number), b) for a, b in zip(found, wanted, strict=True))


def test_what_does_not_fit_is_named() -> None:
    layout, buffer, words = FlatLayout([5]), torch.zeros(flat_module.PAD), torch.zeros(1024, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"reference has shape \[7\]; the layout's buffers have \[32768\]"):
        flat_gram(torch.zeros(7), [buffer], None, layout, elements=4096)
    with pytest.raises(ValueError, match="elements=100 is no multiple of 4096"):
        flat_gram(buffer, [buffer], None, layout, elements=100)
    with pytest.raises(ValueError, match="vectors holds 0 buffers"):
        flat_gram(buffer, [], None, layout, elements=4096)
    with pytest.raises(ValueError, match=r"coefficients is torch.float64 \(1, 1\); pass float32 \[1, 1\]"):
        flat_apply(buffer, [buffer], torch.zeros(1, 1).double(), [None], layout)
    with pytest.raises(ValueError, match="masks holds 0 tasks"):
        flat_overlaps([], layout)
    with pytest.raises(ValueError, match=r"masks\[0\] has 7 words for 32768 elements"):
        flat_overlaps([words[:7]], layout)


# ---- selection -------------------------------------------------------------------------------------------------------

CHUNKS = [1, 70_000, 0, 33, 300_001]  # several chunks and segments in one tensor, single elements in others


def both(
    models: list[list[Tensor]],
    counts: list[int],
    place: Placement | None = None,
    spill: Path | None = None,
    elements: int = 1 << 20,
) -> None:
    """Masks and cores are the CPU's."""
    kept, cores = [], []
    for make in (
        lambda held: stream_cores(held, counts, backend="cpu"),
        lambda held: streaming.stream_cores(held, counts, place or placement_of(CPU), flats_of(models)),
    ):
        held = Held(models, len(counts))
        selection = make(held)
        cores.append(selection.select(held, selection.ranges(elements), None, spill))
        kept.append(held)
    assert cores[0] == cores[1]
    for mine, its in zip(*(one.masks for one in kept), strict=True):
        for a, b in zip(mine, its, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tasks", "counts", "moved", "elements"),
    [
        (torch.bfloat16, 2, [0, 40, 20_000], 1.0, 1 << 20),  # few values: many ties
        (torch.float32, 1, [300_000], 0.3, 1 << 16),  # more than moved, in several passes
        (torch.float16, 3, [3_700], 1.0, 1 << 16),  # in two launches each
    ],
)
def test_masks_and_thresholds_are_the_cpus(
    dtype: torch.dtype,
    tasks: int,
    counts: list[int],
    moved: float,
    elements: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flat_selection, "GROUP", 2)
    both(models_of(dtype, tasks, CHUNKS, moved), counts, None, tmp_path, elements)


def test_tensors_of_several_dtypes_are_in_one_order() -> None:
    """What lies in several buffers is joined in the order of the tensors, of which ties know."""
    sizes = [70, 40] if INTERPRETED else [40_000, 70, 3, 40_000]
    models = models_of(torch.bfloat16, 2, sizes)
    for model in models:
        model[1::2] = [values.float() for values in model[1::2]]
    models[2] = [x + 1 for x in models[0]]
    both(models, [5 * sum(sizes) // 8])


def test_the_sample_is_the_cpus() -> None:
    """Of runs that end beyond their tensors too, in buffers of two dtypes, with one wait."""
    models, place = models_of(torch.bfloat16, 2, [40, 5003, 1]), Lazy(("in", "compute", "out"))
    for model in models:
        model[1] = model[1].float()
    held = Held(models, 1)
    segment, start = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 8, 0, 17, 4971, 0])
    found = FlatSelection(held, [1], place, flats_of(models)).sample(segment, start)
    assert np.array_equal(found, BracketSelection(held, [1]).sample(segment, start))
    assert place.counts["waits out"] == 1 + 1  # the last before memory is freed


@pytest.mark.slow
def test_more_candidates_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_selection, "ROOM", 5)
    monkeypatch.setattr(flat_selection, "CANDIDATES", 1e-9)
    both(models_of(torch.bfloat16, 2, [5003, 33]), [137])


@pytest.mark.slow
@pytest.mark.parametrize("task", [0, 2])
def test_what_is_not_finite_is_named(task: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first launch and in one after it; in the first of two tensors, of another dtype than the first."""
    monkeypatch.setattr(flat_selection, "GROUP", 2)
    models = models_of(torch.float32, 3, [40, 5000, 70])
    for model in models:
        model[0], model[2] = model[0].bfloat16(), model[2].bfloat16()
    models[task + 1][1][4_700] = float("inf")
    models[task + 1][2][3] = float("nan")
    held = Held(models, 1)
    selection = streaming.stream_cores(held, [10], placement_of(CPU), flats_of(models))
    with pytest.raises(ValueError, match=f"task {task}, tensor 1"):
        selection.select(held, selection.ranges(1 << 20))


# ---- on a device that does things when it has to ---------------------------------------------------------------------


def passed(place: Placement) -> list[object]:
    """What a pass finds."""
    torch.manual_seed(5)
    models = models_of(torch.float32, 2, [4_100, 33, 9_000])
    held = Held(models, 1)
    selection = streaming.stream_cores(held, [137], place, flats_of(models))
    high, low = (int(torch.tensor(value).view(torch.int32)) for value in (0.06, 0.04))
    (found,) = selection.marking(held)(selection.ranges(1 << 20), np.full((2, 1, 4), (high, 0, low, 0), np.int64))
    candidates = [(one.marked, one.keys.tolist(), one.places.tolist()) for one in found.values()]
    assert all(len(keys) > 10 for _, keys, _ in candidates)
    return [candidates, [[words.tolist() for words in task[0]] for task in held.masks]]


@pytest.mark.slow
@ONCE
@pytest.mark.parametrize("eager", [(), ("out", "in", "compute")])
def test_a_pass_waits_once(eager: tuple[Queue, ...]) -> None:
    wanted, place = passed(placement_of(CPU)), Lazy(eager)
    with queued_launches():
        assert passed(place) == wanted
    assert place.counts["launches"] == 2
    assert place.counts["waits out"] == 1 + 1  # the last before memory is freed


@pytest.mark.slow
@ONCE
@pytest.mark.parametrize("without", [("out", "compute"), ("host", "out")])
def test_without_a_wait_a_pass_finds_something_else(without: tuple[str, str]) -> None:
    wanted = passed(placement_of(CPU))
    with queued_launches():
        try:
            found = passed(Lazy((), without))
        except (AssertionError, ValueError, RuntimeError):  # of what is not there yet
            return
    assert found != wanted


class _Waits(Lazy):
    """Done at once."""

    def __init__(self) -> None:
        super().__init__(("in", "compute", "out"))


@pytest.mark.parametrize("tensors", [2, 200])
def test_a_pass_is_two_launches_and_a_wait_whatever_the_number_of_tensors(tensors: int) -> None:
    models, place = [[torch.zeros(7)] * tensors] * 9, _Waits()
    selection = streaming.stream_cores(Held(models, 1), [10], place, flats_of(models))
    assert isinstance(selection, FlatSelection)
    ranges = selection.ranges_within(1 << 30)
    brackets = np.full((8, 1, 4), (7, 0, 3, 0), np.int64)
    with counted_launches() as launches:
        found = list(selection.marking(Held(models, 1))(ranges, brackets))
    assert len(found) == len(ranges) == 1
    assert launches == {"mark_kernel": 1, "collect_all_kernel": 1}
    assert place.counts["waits out"] == 1 + 1  # the last before memory is freed
    assert place.counts["waits in"] == place.counts["waits compute"] == 1


@pytest.mark.parametrize("tensors", [2, 200])
def test_sums_and_the_fused_tensors_are_five_launches_whatever_the_number_of_tensors(tensors: int) -> None:
    layout = FlatLayout([7] * tensors)
    buffers, masks = [torch.zeros(layout.total) for _ in range(4)], [torch.zeros(layout.total // 32).int()] * 2
    with counted_launches() as launches:
        overlap.resolve_conflicts("magnitude", buffers[0], buffers[1:3], masks)
        flat.flat_overlaps(masks, layout)
        flat.flat_gram(buffers[0], buffers[1:3], masks[0], layout, 1 << 22)
        flat.flat_apply(buffers[3], buffers[:3], torch.zeros(tensors, 3), [None, *masks], layout)
    assert set(launches.values()) == {1}
    assert set(launches) == {"conflict_kernel", "overlap_kernel", "gram_kernel", "sum_blocks_kernel", "apply_kernel"}
