"""What a check of a merged model says, and comparisons bit for bit: of copied tensors, of cores with their donors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from cpift_kernels import count_mask, gather_masked, union_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import pieces, sweep

if TYPE_CHECKING:
    import torch


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


def check_copied(source: Checkpoint, written: Checkpoint, names: Sequence[str]) -> Check:
    """Tensors outside the parameter space equal θ_base bit for bit."""
    wrong = [name for name in names if not _same_bits(source, written, name)]
    name = "every tensor outside the parameter space equals the backbone bit for bit"
    what = f"{len(names)} tensors compared, {len(wrong)} differ" if names else "every tensor is in it"
    return compared(name, len(names), wrong, what)


def _same_bits(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    import torch

    return all(
        torch.equal(one.slice(name, *piece).view(torch.uint8), other.slice(name, *piece).view(torch.uint8))
        for piece in pieces(one.tensors[name].numel)
    )


@dataclass(frozen=True)
class Operands:
    """Some elements of one parameter in all models. `masks` has a packed mask a task, conflicts resolved."""

    sources: list[torch.Tensor]  # [θ0 (delta space only), θ_base, θ1..θN]
    masks: list[torch.Tensor | None]  # one a source; None for those that donate nothing
    core: torch.Tensor  # union of the cores


def check_cores(
    models: Sequence[Checkpoint],
    has: Callable[[str], bool],
    operands: Callable[[str, int, int], Operands],
    written: Checkpoint,
    progress: OnElements,
) -> Check:
    """Compare every core element that has one donor with that donor, bit for bit. `has`: whether a tensor has cores."""
    total = differing = 0
    for info in written.tensors.values():
        for start, stop in sweep([*models, written], info, pieces(info.numel)):
            progress(stop - start, info.name)
            if has(info.name):
                more, wrong = _differing(operands(info.name, start, stop), written.slice(info.name, start, stop))
                total, differing = total + more, differing + wrong
    name = "every core element of the fused model equals its donor bit for bit"
    what = f"{total:,} elements compared, {differing:,} differ" if total else "no element is one task's core alone"
    return compared(name, total, differing, what)


def _differing(operands: Operands, out: torch.Tensor) -> tuple[int, int]:
    """Elements with one donor, and how many of them are not the donor's."""
    import torch

    if count_mask(operands.core) == 0:
        return 0, 0
    total = differing = 0
    owned = [mask for mask in operands.masks if mask is not None]
    for source, mask in zip(operands.sources, operands.masks, strict=True):
        if mask is None:
            continue
        others = [other for other in owned if other is not mask]
        sole = mask & ~union_mask(others) if others else mask
        got, donor = gather_masked(out, sole), gather_masked(source, sole).to(out.dtype)
        total += donor.numel()
        differing += int((got.view(torch.uint8) != donor.view(torch.uint8)).sum())
    return total, differing
