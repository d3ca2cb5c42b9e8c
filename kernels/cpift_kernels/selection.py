"""Core regions: the elements that fine-tuning moved most (CPI-FT, arXiv 2508.21741, section on core
parameter regions).

    Δi = |θi − θ0|,   Ci = the k elements of largest Δi over all tensors of the model at once

Δ is the fp32 difference of the stored values, so bf16, fp16 and fp32 models, mixed or not, share one
order. Among equal magnitudes the lower linear index wins (tensor order, then row-major), which makes Ci the
same on every backend. An element that did not move (Δ = 0) is never selected: if fewer than k elements
moved, Ci is those, and `CoreMask.count < CoreMask.requested` says so. k = 0 gives empty masks, k = D every
element that moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checks import check_models
from .dispatch import Backend, implementation, resolve
from .masks import pack_mask

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CoreMask:
    """One core region.

    words: one packed mask per tensor of the model; count: the elements selected; requested: the k asked for;
    threshold: the smallest |Δ| selected, inf if none.
    """

    words: list[Tensor]
    count: int
    requested: int
    threshold: float


def select_cores_reference(
    pretrained: Sequence[Tensor], tuned: Sequence[Sequence[Tensor]], counts: Sequence[int]
) -> list[list[CoreMask]]:
    """`select_cores` in plain torch; holds |Δ| of one task in fp32 at a time."""
    import torch

    cores = []
    for task, model in enumerate(tuned):
        magnitudes = [(x.float() - x0.float()).abs().reshape(-1) for x, x0 in zip(model, pretrained, strict=True)]
        for index, magnitude in enumerate(magnitudes):
            if not magnitude.isfinite().all():
                raise nonfinite_update(index, task)
        flat = torch.cat(magnitudes) if magnitudes else torch.zeros(0)
        sizes = [magnitude.numel() for magnitude in magnitudes]
        del magnitudes
        cores.append([top_elements(flat, sizes, count) for count in counts])
    return cores


def top_elements(magnitude: Tensor, sizes: list[int], count: int) -> CoreMask:
    """The `count` largest of magnitude [D], in plain torch, as masks of tensors of these sizes."""
    import torch

    moved = int((magnitude > 0).sum())
    kept = min(count, moved)
    selected = torch.zeros_like(magnitude, dtype=torch.bool)
    threshold = math.inf
    if kept:
        threshold = float(magnitude.kthvalue(magnitude.numel() - kept + 1).values)
        selected = magnitude > threshold
        ties = (magnitude == threshold).nonzero()[:, 0]
        selected[ties[: kept - int(selected.sum())]] = True
    return CoreMask([pack_mask(part) for part in selected.split(sizes)], kept, count, threshold)


def select_cores(
    pretrained: Sequence[Tensor],
    tuned: Sequence[Sequence[Tensor]],
    counts: Sequence[int],
    *,
    backend: Backend = "auto",
) -> list[list[CoreMask]]:
    """The exact top-`counts[k]` elements of |θi − θ0| over all tensors, as `[task][k]`.

    pretrained: the tensors of θ0; tuned: up to 16 models with the same shapes; bf16, fp16 or fp32,
    contiguous, one device. counts: any numbers of elements in 0..D.

    Raises ValueError for a count outside 0..D, for mismatched models, and for a NaN or Inf in θi − θ0
    (naming the tensor's index and the task).
    """
    check_models(pretrained, tuned)
    total = sum(tensor.numel() for tensor in pretrained)
    for count in counts:
        if not 0 <= count <= total:
            raise ValueError(f"counts holds {count}; the models have {total} elements, so use 0..{total}")
    resolved = resolve(backend, *pretrained, *(tensor for model in tuned for tensor in model))
    return implementation(resolved, select_cores_reference)(pretrained, tuned, counts)


def nonfinite_update(tensor: int, task: int) -> ValueError:
    """The error of an update that is NaN or Inf, in the words that every backend uses."""
    return ValueError(
        f"tuned[{task}][{tensor}] − pretrained[{tensor}] holds NaN or Inf (task {task}, tensor {tensor}); "
        "repair or exclude that tensor"
    )
