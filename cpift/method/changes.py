"""What a fine-tune changed: of every tensor how many elements, by how much, and how much that is of the weight.

|θt − θ0| is taken in fp32, as core regions are selected by it; sums are fp64 (`cpift_kernels.delta_magnitudes`), added
block after block. Models are read in slices: a tensor need not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cpift_kernels import delta_magnitudes

from cpift.checkpoints.checkpoint import Checkpoint, first_problems
from cpift.checkpoints.finite import require_finite
from cpift.checkpoints.slices import pieces, sweep
from cpift.errors import CheckpointError, Problem
from cpift.formats.safetensors import TensorInfo

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


def changes(base: Checkpoint, tuned: Checkpoint, on_elements: OnElements | None = None) -> dict[str, Change]:
    """By name what changed of every floating-point tensor that has elements; both models have the same tensors.

    Raises CheckpointError naming tensors that hold NaN or Inf.
    """
    infos = [info for info in base.tensors.values() if info.floating and info.numel]
    total, done = sum(info.numel for info in infos), 0
    found: dict[str, Change] = {}
    for info in infos:
        found[info.name] = _change(base, tuned, info)
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


def _change(base: Checkpoint, tuned: Checkpoint, info: TensorInfo) -> Change:
    parts = []
    for start, stop in sweep([base, tuned], info, pieces(info.numel)):
        blocks = delta_magnitudes(base.slice(info.name, start, stop), tuned.slice(info.name, start, stop))
        squares, origin_squares = (float(sums.sum()) for sums in (blocks.squares, blocks.origin_squares))
        roots = math.sqrt(squares), math.sqrt(origin_squares)
        parts.append(
            Change(stop - start, int(blocks.changed.sum()), float(blocks.largest.max()), float(blocks.l1.sum()), *roots)
        )
    return together(parts)
