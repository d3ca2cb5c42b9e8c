"""Slices of models on the host that a GPU computes: copied to it, computed and copied back beside each other.

What a merge and a selection on a GPU do (`cpift_kernels.Lane`): first the bits, which are the CPU's, with every slot,
buffer and event used again several times; then how long the parts take alone and all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import cpift_kernels as ck
import numpy as np
import torch
from cpift_kernels import Backend, Lane, Placement, Ready, Staged, placement
from torch import Tensor

from benchmarks.gpu.bits import WrongError, laid, same
from benchmarks.gpu.card import Card, Sizes
from benchmarks.gpu.rates import Row

SCALE = torch.tensor([[0.4, -0.2, 0.5, 0.3]], dtype=torch.float64)
CPU: Backend = "cpu" if find_spec("numba") else "reference"
MANY = 64  # slots: the host waits for a free one so seldom that this cannot stand for a wait that is missing
SHARE = 0.01  # of the elements that a region has


@dataclass(frozen=True)
class Sliced:
    """θ0 and fine-tunes as slices on the host; what `ck.stream_cores` reads (`ck.Models`), a slice a tensor."""

    slices: list[list[Tensor]]  # [model][slice]
    masks: list[list[Tensor]]  # [task][slice], packed

    @staticmethod
    def made(count: int, elements: int) -> Sliced:
        generator = torch.Generator().manual_seed(3)
        base = [torch.randn(elements, generator=generator) for _ in range(count)]
        moved = [
            [x + 0.02 * torch.randn(elements, generator=generator) for x in base] for _ in range(SCALE.numel() - 1)
        ]
        models = [[x.bfloat16() for x in model] for model in (base, *moved)]
        masks = [[ck.pack_mask(torch.rand(elements, generator=generator) < 0.1) for _ in base] for _ in moved]
        return Sliced(models, masks)

    @property
    def sizes(self) -> list[int]:
        return [len(one) for one in self.slices[0]]

    @property
    def tasks(self) -> int:
        return len(self.slices) - 1

    def load(self, model: int, tensor: int, start: int, stop: int) -> Tensor:
        return self.slices[model][tensor][start:stop]

    def gather(self, model: int, tensor: int, starts: Any, length: int) -> Tensor:
        padded = torch.nn.functional.pad(self.slices[model][tensor].float(), (0, length))
        return padded[torch.from_numpy(np.asarray(starts))[:, None] + torch.arange(length)]

    def prefetch(self, tensor: int, start: int, stop: int) -> None:
        """They are in memory."""

    def release(self, tensor: int, start: int, stop: int) -> None:
        """They stay there."""


class Kept:
    """Masks in memory (`ck.Masks`)."""

    def __init__(self, models: Sliced):
        words = [-(-size // 32) for size in models.sizes]
        self._words = [[np.zeros(count, np.uint32) for count in words] for _ in range(models.tasks)]

    def store(self, task: int, k: int, tensor: int, first: int, words: Any) -> None:
        self._words[task][tensor][first : first + len(words)] = words

    def words(self, task: int, k: int, tensor: int) -> Any:
        return self._words[task][tensor].view(np.int32)


def bits(card: Card, sizes: Sizes) -> Iterator[Row]:
    """Fused slices and core regions through a lane, each against the CPU's kernels."""
    count, elements = sizes.lanes
    models = Sliced.made(count, elements)
    named = {"dtype": "bf16", "elements": count * elements, "slices": count, "tasks": models.tasks}
    wanted = [torch.empty_like(x) for x in models.slices[0]]
    on_cpu(models, wanted)
    for slots in (placement.SLOTS, MANY):
        found = [torch.zeros_like(x) for x in wanted]
        with patch.object(placement, "SLOTS", slots), closing(Lane(card.place())) as lane:
            merged(lane, models, found)
        for at, (mine, its) in enumerate(zip(found, wanted, strict=True)):
            same(f"slice {at} of {count}", mine, its)
    yield {"operation": "fused_apply of slices", **named, "correct": True}
    if CPU == "cpu":  # numba's kernels have a part in a streamed selection wherever its pass runs
        _selected(card, models, held=False)
        yield {"operation": "stream_cores", **named, "correct": True}
        layout = ck.FlatLayout(models.sizes)
        buffers = [card.there(laid(model, layout)) for model in models.slices]
        card.wait()
        _selected(card, models, held=[ck.Flat(layout, range(count), buffers)])
        yield {"operation": "stream_cores, one buffer a model", **named, "correct": True}


def _selected(card: Card, models: Sliced, held: bool | Sequence[ck.Flat]) -> None:
    wanted, found = Kept(models), Kept(models)
    counts = [int(SHARE * sum(models.sizes))]
    there = ck.stream_cores(models, counts, place=card.place(), held=held, backend="triton")
    here = ck.stream_cores(models, counts, backend="cpu")
    each = max(models.sizes)
    mine, its = (one.select(masks, one.ranges(each)) for one, masks in ((there, found), (here, wanted)))
    if mine != its:
        raise WrongError(f"stream_cores: {mine[0][0]}, not {its[0][0]}")
    for task in range(models.tasks):
        for tensor in range(len(models.sizes)):
            words = [torch.from_numpy(masks.words(task, 0, tensor)) for masks in (found, wanted)]
            same(f"mask of task {task}, slice {tensor}", *words)


def rates(card: Card, sizes: Sizes) -> Iterator[Row]:
    """The parts of a merge's slices alone, all beside each other, and the CPU's kernels on the same slices."""
    count, elements = sizes.lanes
    models = Sliced.made(count, elements)
    out = [card.pinned(x.nbytes).view(x.dtype) for x in models.slices[0]]
    resident = [card.there(model[0]) for model in models.slices], [card.there(task[0]) for task in models.masks]
    inward = sum(x.nbytes for model in (*models.slices, *models.masks) for x in model)

    def through(part: Callable[[Lane], None]) -> float:
        with closing(Lane(card.place())) as lane:
            return card.walled(lambda: part(lane), sizes.repeats)

    counted = Counted(card.place())
    with closing(Lane(counted)) as lane:
        merged(lane, models, out)
    alone = {
        "copies in": through(lambda lane: copied_in(lane, models)),
        "compute": through(lambda lane: computed(lane, *resident, count)),
        "copies out": through(lambda lane: copied_out(lane, resident[0][0], out)),
    }
    together = through(lambda lane: merged(lane, models, out))
    named = {"dtype": "bf16", "elements": count * elements, "slices": count, "tasks": models.tasks}
    moved = {"copies in": inward, "copies out": sum(x.nbytes for x in out)}
    for part, seconds in alone.items():
        speed = {"gb_per_second": moved[part] / seconds / 1e9} if part in moved else {}
        yield {"operation": f"slices: {part} alone", **named, "seconds": seconds, **speed}
    hidden, most = sum(alone.values()) - together, sum(alone.values()) - max(alone.values())
    yield {
        "operation": "slices: all together",
        **named,
        "seconds": together,
        "gb_per_second": inward / together / 1e9,
        "overlap": hidden / most,  # 1: as long as the longest part alone; 0: as long as one after the other
        "host_waits_a_slice": counted.waits / count,
    }
    threads = torch.get_num_threads()
    seconds = card.walled(lambda: on_cpu(models, out), sizes.repeats)
    by = {"backend": CPU, "threads": threads, "gb_per_second": inward / seconds / 1e9}
    yield {"operation": "slices: the CPU", **named, "seconds": seconds, **by}


# ---- the parts -------------------------------------------------------------------------------------------------------


def merged(lane: Lane, models: Sliced, out: Sequence[Tensor]) -> None:
    """Every slice: its models and masks to the device, fused there, back into `out`; as merges do it."""
    readies: list[Ready] = []
    coming = _staged(lane, models, 0)
    for at, target in enumerate(out):
        staged = coming
        coming = _staged(lane, models, at + 1) if at + 1 < len(out) else []
        with lane.place.computing():
            values = [lane.use(one) for one in staged]
            masks = [lane.load(task[at]) for task in models.masks]
            room = lane.place.room(target.nbytes, "compute").view(target.dtype)
            ck.fused_apply(room, values, SCALE, [None, *masks], backend="triton")
        for one in staged:
            lane.done(one)
        readies.append(lane.fetch(room, target))
    for ready in readies:
        ready()


def _staged(lane: Lane, models: Sliced, at: int) -> list[Staged]:
    return [lane.stage(model[at]) for model in models.slices]


def copied_in(lane: Lane, models: Sliced) -> None:
    for at in range(len(models.sizes)):
        for one in _staged(lane, models, at):
            lane.done(one)
        for task in models.masks:
            lane.load(task[at])


def computed(lane: Lane, values: Sequence[Tensor], masks: Sequence[Tensor], count: int) -> None:
    """So many slices, all of them the first."""
    with lane.place.computing():
        for _ in range(count):
            room = lane.place.room(values[0].nbytes, "compute").view(values[0].dtype)
            ck.fused_apply(room, list(values), SCALE, [None, *masks], backend="triton")


def copied_out(lane: Lane, values: Tensor, out: Sequence[Tensor]) -> None:
    for ready in [lane.fetch(values, target) for target in out]:
        ready()


def on_cpu(models: Sliced, out: Sequence[Tensor]) -> None:
    """By the kernels of the CPU."""
    for at, target in enumerate(out):
        masks = [None, *(task[at] for task in models.masks)]
        ck.fused_apply(target, [model[at] for model in models.slices], SCALE, masks, backend=CPU)


class Counted:
    """A placement that counts what the host waits for."""

    def __init__(self, place: Placement):
        self._place, self.waits = place, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)

    def wait(self, event: Any) -> None:
        self.waits += 1
        self._place.wait(event)
