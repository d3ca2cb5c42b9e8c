"""The pass over streamed models as compiled for a GPU gives the masks, thresholds and errors of the CPU's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from cpift_kernels import Placement, placement, placement_of, stream_cores
from cpift_kernels.placement import Queue
from cpift_kernels.triton import streaming

from tests.helpers.placements import Lazy, queued_launches
from tests.helpers.streamed import Held
from tests.ptx.device import interpreted_ptx

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
SLOW = pytest.mark.slow
ONCE = pytest.mark.skipif(INTERPRETED, reason="queues hold launches of compiled kernels")
SIZES = [1, 70_000, 33, 300_001]  # several chunks and segments in one tensor, single elements in others


@pytest.fixture(autouse=True)
def launched() -> Iterator[None]:
    with nullcontext() if INTERPRETED else interpreted_ptx("sm_90"):
        yield


def models_of(dtype: torch.dtype, tasks: int, moved: float = 1.0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(tasks)
    base = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    tuned = []
    for _ in range(tasks):
        steps = [0.01 * torch.randn(len(x), generator=generator) for x in base]
        kept = [torch.rand(len(x), generator=generator) < moved for x in base]
        tuned.append([x + (step * keep).to(dtype) for x, step, keep in zip(base, steps, kept, strict=True)])
    return [base, *tuned]


def both(
    models: list[list[torch.Tensor]], counts: list[int], spill: Path | None = None, place: Placement | None = None
) -> tuple[Held, Held]:
    """What the CPU and the device keep; their cores are compared here."""
    place = place or placement_of(CPU)
    kept, cores = [], []
    for make in (
        lambda held: stream_cores(held, counts, backend="cpu"),
        lambda held: streaming.stream_cores(held, counts, place),
    ):
        held = Held(models, len(counts))
        selection = make(held)
        cores.append(selection.select(held, selection.ranges(1 << 16), None, spill))
        kept.append(held)
    assert cores[0] == cores[1]
    return kept[0], kept[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tasks", "counts", "moved"),
    [
        (torch.float32, 1, [3_700], 1.0),
        pytest.param(torch.bfloat16, 2, [0, 40, 20_000], 1.0, marks=pytest.mark.slow),  # few values: many ties
        pytest.param(torch.float16, 3, [3_700], 1.0, marks=pytest.mark.slow),  # in two launches
        pytest.param(torch.float32, 2, [300_000], 0.3, marks=pytest.mark.slow),  # more than moved
    ],
)
def test_masks_and_thresholds_are_the_cpus(
    dtype: torch.dtype,
    tasks: int,
    counts: list[int],
    moved: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "GROUP", 2)
    here, there = both(models_of(dtype, tasks, moved), counts, tmp_path)
    for task in range(tasks):
        for k in range(len(counts)):
            for mine, its in zip(here.masks[task][k], there.masks[task][k], strict=True):
                assert np.array_equal(mine, its)


def test_equal_updates_go_to_the_lower_index() -> None:
    base = [torch.zeros(200_001), torch.zeros(70_001)]
    here, there = both([base, [x + 1.0 for x in base]], [150_003])
    assert all(np.array_equal(mine, its) for mine, its in zip(here.masks[0][0], there.masks[0][0], strict=True))
    bits = np.unpackbits(there.masks[0][0][0].view(np.uint8), bitorder="little")[:200_001]
    assert bits[:150_003].all()
    assert not bits[150_003:].any()


# ---- on a device that does things when it has to ---------------------------------------------------------------------

SMALL = [4_100, 33, 9_000, 1]
TASKS = 3


def models_of_small() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    base = [torch.randn(size, generator=generator) for size in SMALL]
    return [base, *([x + 0.01 * torch.randn(len(x), generator=generator) for x in base] for _ in range(TASKS))]


def lazily(monkeypatch: pytest.MonkeyPatch, place: Lazy) -> bool:
    """Whether masks and cores are the CPU's; slots and buffers are used again."""
    monkeypatch.setattr(placement, "SLOT", 1 << 12)
    monkeypatch.setattr(placement, "BUFFER", 1 << 14)
    with queued_launches():
        try:
            here, there = both(models_of_small(), [137], None, place)
        except (AssertionError, ValueError):  # other cores, or values that are none
            return False
    masks = zip(here.masks, there.masks, strict=True)
    return all(np.array_equal(a, b) for mine, its in masks for a, b in zip(mine[0], its[0], strict=True))


@pytest.mark.slow
@ONCE
@pytest.mark.parametrize("eager", [(), pytest.param(("in",), marks=SLOW), pytest.param(("out", "in"), marks=SLOW)])
def test_masks_do_not_depend_on_when_a_device_does_what(
    eager: tuple[Queue, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it waits twice for each piece, whatever the number of tasks: for counts with masks, and for candidates."""
    place = Lazy(eager)
    assert lazily(monkeypatch, place)
    assert place.counts["waits out"] == 2 * len(SMALL) + 1  # the last before memory is freed
    assert place.counts["copies out"] == len(SMALL) * (1 + TASKS + 2 * TASKS)
    whole_and_rest = 2 + 1 + 2 + 1  # launches over a tensor of each size
    assert place.counts["launches"] <= whole_and_rest * (1 + TASKS)


@ONCE
@pytest.mark.parametrize(
    ("without", "eager"),
    [
        (("compute", "in"), ()),
        pytest.param(("host", "in"), (), marks=SLOW),
        pytest.param(("host", "out"), (), marks=SLOW),
    ],
)
def test_without_a_wait_masks_are_wrong(
    without: tuple[str, str], eager: tuple[Queue, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not lazily(monkeypatch, Lazy(eager, without))


@pytest.mark.slow
@pytest.mark.parametrize("task", [1, 2])
def test_what_is_not_finite_is_named(task: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first launch and in one after it."""
    monkeypatch.setattr(streaming, "GROUP", 2)
    small = [tensor[:5000] for tensor in models_of(torch.float32, 3)[0]]
    models = [small, *([tensor + 0.01 for tensor in small] for _ in range(3))]
    models[task + 1][3][4_700] = float("inf")
    held = Held(models, 1)
    selection = streaming.stream_cores(held, [10], placement_of(CPU))
    with pytest.raises(ValueError, match=f"task {task}, tensor 3"):
        selection.select(held, selection.ranges(1 << 16))
