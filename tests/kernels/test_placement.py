"""What a lane sends to a device and takes back, on devices that are as late and as early as they may be."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from cpift_kernels import Lane, placement, placement_of
from cpift_kernels.placement import QUEUES, Inline, Queue

from tests.helpers.placements import Lazy, Limited

SCHEDULES = [eager for size in range(4) for eager in combinations(QUEUES, size)]
LENGTHS = (40, 33, 1, 40, 7, 64, 40, 40, 25)
SLICES = [torch.arange(100 * n, 100 * n + length, dtype=torch.int16) for n, length in enumerate(LENGTHS)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices take several slots, and slots and buffers are used again."""
    monkeypatch.setattr(placement, "SLOT", 16)
    monkeypatch.setattr(placement, "BUFFER", 80)


def add(made: torch.Tensor, values: torch.Tensor, added: torch.Tensor) -> None:
    made.copy_(values + added)


def through(place: Lazy) -> bool:
    """Every slice plus a number: computed while the next one is on its way, read once the next one was launched.
    Whether all are right."""
    lane, leaving, read = Lane(place), [], []
    coming = lane.stage(SLICES[0])
    for number in range(len(SLICES)):
        here, coming = coming, lane.stage(SLICES[(number + 1) % len(SLICES)])
        values, added = lane.use(here), lane.load(torch.tensor([number], dtype=torch.int16))
        made = place.room(values.nbytes, "compute").view(values.dtype)
        place.give("compute", partial(add, made, values, added))
        lane.done(here)
        target = torch.zeros_like(SLICES[number])
        leaving.append((lane.fetch(made, target), target))
        for ready, earlier in leaving[number - 1 : number]:
            ready()
            read.append(earlier.clone())
    (last,) = lane.bring([made])
    lane.close()
    return all(torch.equal(one, SLICES[n] + n) for n, one in enumerate([*read, last]))


@pytest.mark.parametrize("eager", SCHEDULES, ids=lambda eager: " ".join(eager) or "lazy")
def test_bytes_do_not_depend_on_when_a_device_does_what(eager: tuple[Queue, ...]) -> None:
    counts = Lazy(eager).counts
    assert through(Lazy(eager, counts=counts))
    # Two slices at once, and one that is larger than the others were; of each a number and a result.
    assert counts["rooms"] == 3 + 2 * len(SLICES)


@pytest.mark.parametrize(
    "without",
    [("compute", "in"), ("in", "compute"), ("out", "compute"), ("host", "in"), ("host", "compute"), ("host", "out")],
    ids=" before ".join,
)
def test_a_wait_that_is_missing_gives_wrong_bytes(without: tuple[str, str]) -> None:
    """On some device, for each that a lane makes."""
    assert not all(through(Lazy(eager, without)) for eager in SCHEDULES)


def test_results_on_their_way_are_bounded() -> None:
    place = Limited(1000)
    lane, values = Lane(place), torch.arange(20)
    for _ in range(50):
        room = place.room(values.nbytes, "compute").view(values.dtype)
        lane.fetch(room, torch.empty_like(values))
        del room
    assert place.most == (placement.LEAVING + 1) * values.nbytes


def test_a_device_without_queues_does_all_at_once() -> None:
    lane = Lane(placement_of(CPU))
    assert isinstance(lane.place, Inline)
    values = torch.randn(1000)
    assert torch.equal(lane.use(lane.stage(values)), values)
    assert torch.equal(lane.load(values), values)
    assert all(torch.equal(one, values) for one in lane.bring([values, values]))
    assert lane.stage(values[:0]).values.numel() == 0
