"""What a check of a merged model says, what slices of it show, and comparisons bit for bit: of copied tensors, of cores
with their donors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from cpift.checkpoints.finite import bits_of

if TYPE_CHECKING:
    import torch


_RUN = 1 << 18  # elements that are compared together, a multiple of 32


class Check(TypedDict):
    """What was compared after the work, and whether it is as it has to be."""

    name: str
    passed: bool | None  # None: there was nothing to compare
    detail: str


OnElements = Callable[[int, str], None]  # elements since the last call, and the tensor they belong to


def failures(checks: Sequence[Check]) -> list[str]:
    """The checks that failed, in words. One that had nothing to compare did not fail."""
    return [f"{check['name']}: {check['detail']}" for check in checks if check["passed"] is False]


def compared(name: str, count: int, wrong: Sequence[str] | int, what: str, more: str = "") -> Check:
    """A check that looked at so many things; `wrong`: those that are not as they have to be, or how many."""
    if not count:
        return {"name": name, "passed": None, "detail": f"nothing to compare: {what}"}
    listed = "" if isinstance(wrong, int) or not wrong else f", wrong: {', '.join(wrong[:5])}"
    return {"name": name, "passed": not wrong, "detail": what + listed + more}


@dataclass(frozen=True)
class Tally:
    """What slices of a tensor show beside their models."""

    compared: int = 0  # elements that have to be some model's bit for bit
    differing: int = 0  # of those, elements that are not
    finite: bool = True

    def __add__(self, other: Tally) -> Tally:
        both = self.finite and other.finite
        return Tally(self.compared + other.compared, self.differing + other.differing, both)


@dataclass(frozen=True)
class CheckedFile:
    """A file whose slices were looked at while they were merged, and that was read back from the disk."""

    sha256: str  # of what was written
    starts: Mapping[str, int]  # the byte at which each tensor was written
    tallies: Mapping[str, Tally]


def check_copied(tallies: Mapping[str, Tally], names: Sequence[str], name: str) -> Check:
    """Whether tensors equal those that they are copies of, bit for bit; `name`: how that is said."""
    wrong = [one for one in names if tallies[one].differing]
    what = f"{len(names)} tensors compared, {len(wrong)} differ" if names else "every tensor is in it"
    return compared(name, len(names), wrong, what)


def check_cores(tallies: Mapping[str, Tally], names: Sequence[str]) -> Check:
    """Whether every core element that has one donor equals that donor's; names: of the tensors that have cores."""
    total, differing = (sum(getattr(tallies[one], of) for one in names) for of in ("compared", "differing"))
    name = "every core element of the fused model equals its donor bit for bit"
    what = f"{total:,} elements compared, {differing:,} differ" if total else "no element is one task's core alone"
    return compared(name, total, differing, what)


def differing_bits(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """How many elements there are, and how many are not the same bit for bit; [n] each, of one dtype, on the CPU."""
    left, right = bits_of(one), bits_of(other)
    runs = (slice(start, start + _RUN) for start in range(0, len(left), _RUN))
    return len(left), sum(int(np.count_nonzero(left[run] != right[run])) for run in runs)


@dataclass(frozen=True)
class Operands:
    """Some elements of one parameter in all models. `masks` has a packed mask a task, conflicts resolved."""

    sources: list[torch.Tensor]  # [θ0 (delta space only), θ_base, θ1..θN]
    masks: list[torch.Tensor | None]  # one a source; None for those that donate nothing
    core: torch.Tensor  # union of the cores


def differing_cores(operands: Operands, out: torch.Tensor) -> tuple[int, int]:
    """Elements of a slice with one donor, and how many of them are not the donor's bit for bit; all on the CPU.

    In short runs, all of which stays in a processor's own cache, and by numpy, which has no threads that would wait for
    more by turning round: this looks on beside a merge.
    """
    donors = [
        (bits_of(source.to(out.dtype)), mask.numpy().view(np.uint32))
        for source, mask in zip(operands.sources, operands.masks, strict=True)
        if mask is not None
    ]
    made, total, differing = bits_of(out), 0, 0
    for start in range(0, len(made), _RUN):
        here, words = slice(start, start + _RUN), slice(start // 32, (start + _RUN) // 32)
        masks = [mask[words] for _, mask in donors]
        shared = _shared(masks)
        for (source, _), mask in zip(donors, masks, strict=True):
            sole = mask & ~shared
            if sole.any():
                total += int(np.bitwise_count(sole).sum(dtype=np.int64))
                other = _differing_words(source[here], made[here])
                differing += int(np.bitwise_count(sole & other).sum(dtype=np.int64))
    return total, differing


def _shared(masks: Sequence[np.ndarray]) -> np.ndarray:
    """uint32 [words]: the elements of more than one packed mask."""
    held = shared = np.zeros(masks[0].shape if masks else 0, np.uint32)
    for mask in masks:
        shared, held = shared | (held & mask), held | mask
    return shared


def _differing_words(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """uint32 [words]: a packed mask of the elements that are not the same; [n] each."""
    packed = np.packbits(one != other, bitorder="little")
    return (np.pad(packed, (0, -len(packed) % 4)) if len(packed) % 4 else packed).view(np.uint32)
