"""Whether cores were transplanted: every core element of a merged model beside its donor, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpift_kernels import count_mask, gather_masked, union_mask

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.slices import pieces, sweep
from cpift.merging.checks import Check, OnElements, compared

if TYPE_CHECKING:
    import torch


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
