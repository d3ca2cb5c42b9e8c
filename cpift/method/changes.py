"""What a fine-tune changed: of every tensor how many elements, by how much, and how much that is of the weight.

|θt − θ0| is taken in fp32, as core regions are selected by it; sums are fp64 (`cpift_kernels.delta_magnitudes`). Models
are read in slices: a tensor need not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from cpift_kernels import delta_magnitudes

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.checkpoints.finite import require_finite
from cpift.checkpoints.slices import pieces, sweep
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

BLOCK, SEGMENT = 1 << 12, 1 << 18  # elements that a kernel sums together, and that one sum is kept of
OnElements = Callable[[int, int], None]  # elements measured so far, of all


@dataclass(frozen=True)
class Change:
    """Of some elements: how many there are and changed; of |θt − θ0| the largest, the sum (l1) and the root of the sum
    of squares (l2); weight_l2: the latter of θ0."""

    elements: int
    changed: int
    largest: float
    l1: float
    l2: float
    weight_l2: float

    @property
    def share(self) -> float:
        """Of the elements, those that changed."""
        return self.changed / self.elements

    @property
    def relative(self) -> float | None:
        """l2 ÷ weight_l2; 0 where nothing changed, None where all of θ0 is 0 and something did."""
        if not self.l2:
            return 0.0
        return self.l2 / self.weight_l2 if self.weight_l2 else None


def together(parts: Iterable[Change]) -> Change:
    """The change of all elements of some parts, of which there is one at least."""
    found = list(parts)
    return Change(
        sum(part.elements for part in found),
        sum(part.changed for part in found),
        max(part.largest for part in found),
        math.fsum(part.l1 for part in found),
        math.hypot(*(part.l2 for part in found)),
        math.hypot(*(part.weight_l2 for part in found)),
    )


class ChangesInPassing:
    """Measures what is read of fine-tunes anyway: slices that begin at multiples of SEGMENT, in any order and thread.

    Sums are kept by segment, so that they do not depend on how the reading was cut.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, str], dict[int, _Part]] = {}

    def __call__(self, task: int, name: str, start: int, origin: torch.Tensor, tuned: torch.Tensor) -> None:
        """Elements from `start` on of tensor `name` of θ0 and of a task's fine-tune; the same again change nothing."""
        self._parts.setdefault((task, name), {})[start] = _part(origin, tuned)

    def of(self, task: int, sizes: Mapping[str, int]) -> dict[str, Change] | None:
        """What changed of tensors of these sizes, by name; None where some of it was not read here."""
        found = {name: list(self._parts.get((task, name), {}).items()) for name in sizes}
        read = {name: sum(part.elements for _, part in parts) for name, parts in found.items()}
        if read != dict(sizes):
            return None
        return {name: _joined([part for _, part in sorted(parts, key=itemgetter(0))]) for name, parts in found.items()}


@dataclass(frozen=True)
class _Part:
    """Of one slice, as `Change`; sums [3][segments] of |Δ|, Δ² and θ0²."""

    elements: int
    changed: int
    largest: float
    sums: list[list[float]]


def _part(origin: torch.Tensor, tuned: torch.Tensor) -> _Part:
    from torch.nn.functional import pad

    blocks, together = delta_magnitudes(origin, tuned), SEGMENT // BLOCK
    sums = [
        pad(of_blocks, (0, -len(of_blocks) % together)).view(-1, together).sum(1).tolist()
        for of_blocks in (blocks.l1, blocks.squares, blocks.origin_squares)
    ]
    return _Part(len(tuned), int(blocks.changed.sum()), float(blocks.largest.max()), sums)


def _joined(parts: Sequence[_Part]) -> Change:
    l1, squares, origin_squares = (math.fsum(x for part in parts for x in part.sums[column]) for column in range(3))
    return Change(
        sum(part.elements for part in parts),
        sum(part.changed for part in parts),
        max(part.largest for part in parts),
        l1,
        math.sqrt(squares),
        math.sqrt(origin_squares),
    )


def changes(
    base: Checkpoint,
    tuned: Checkpoint,
    on_elements: OnElements | None = None,
    parts_of: Callable[[TensorInfo], int] = lambda info: 0,
    parts: dict[str, list[Change]] | None = None,
) -> dict[str, Change]:
    """By name what changed of every floating-point tensor that has elements; both models have the same tensors.

    parts_of: in how many parts along its first dimension a tensor is looked at; each part's change goes to `parts`.
    Raises CheckpointError naming tensors that hold NaN or Inf.
    """
    infos = [info for info in base.tensors.values() if info.floating and info.numel]
    total, done = sum(info.numel for info in infos), 0
    found: dict[str, Change] = {}
    for info in infos:
        count = parts_of(info)
        if parts is not None and count:
            size = info.numel // count
            own = [_change(base, tuned, info, number * size, (number + 1) * size) for number in range(count)]
            parts[info.name], found[info.name] = own, together(own)
        else:
            found[info.name] = _change(base, tuned, info, 0, info.numel)
        done += info.numel
        if on_elements:
            on_elements(done, total)
    _require_finite(base, tuned, [name for name, change in found.items() if not math.isfinite(change.largest)])
    return found


def _require_finite(base: Checkpoint, tuned: Checkpoint, beyond: list[str]) -> None:
    if beyond:
        require_finite("base model", base, beyond)
        require_finite("fine-tune", tuned, beyond)
        problems = [
            Problem(name, "differs by more than float32 holds", "give a fine-tune of this base") for name in beyond
        ]
        raise CheckpointError(f"fine-tune {tuned.folder}", first_problems(problems, 20))


def _change(base: Checkpoint, tuned: Checkpoint, info: TensorInfo, first: int, last: int) -> Change:
    """Of elements first..last-1 of a tensor."""
    cut = [(first + start, first + stop) for start, stop in pieces(last - first)]
    parts = [
        _part(base.slice(info.name, start, stop), tuned.slice(info.name, start, stop))
        for start, stop in sweep([base, tuned], info, cut)
    ]
    return _joined(parts)
