"""How far core regions overlap, and which task keeps an element that several regions hold.

    counts[i, j] = |Ci ∩ Cj|, so that the Jaccard overlap (CPI-FT) is S(i, j) = counts[i, j] / |Ci ∪ Cj|
                   with |Ci ∪ Cj| = counts[i, i] + counts[j, j] − counts[i, j]

Masks are packed (see `masks`). Empty masks give zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .checks import MAX_TASKS, check_same_shape, check_values, check_words
from .dispatch import Backend, implementation, resolve
from .masks import count_mask, pack_mask, unpack_mask

if TYPE_CHECKING:
    from torch import Tensor

ConflictPolicy = Literal["magnitude", "last", "mean"]


def overlap_counts_per_tensor_reference(masks: Sequence[Sequence[Tensor]]) -> Tensor:
    """`overlap_counts_per_tensor` in plain torch, one pair at a time."""
    import torch

    tasks, tensors = len(masks), len(masks[0])
    counts = torch.zeros(tensors, tasks, tasks, dtype=torch.int64)
    for t in range(tensors):
        for i in range(tasks):
            for j in range(i, tasks):
                counts[t, i, j] = counts[t, j, i] = count_mask(masks[i][t] & masks[j][t])
    return counts


def overlap_counts_per_tensor(masks: Sequence[Sequence[Tensor]], *, backend: Backend = "auto") -> Tensor:
    """|Ci ∩ Cj| in each tensor: int64 [T, N, N] on the CPU, the diagonal being |Ci|.

    masks[i][t]: the packed mask of task i over tensor t; 1 to 16 tasks.
    """
    _check_masks(masks)
    resolved = resolve(backend, *(words for task in masks for words in task))
    return implementation(resolved, overlap_counts_per_tensor_reference)(masks)


def overlap_counts(masks: Sequence[Sequence[Tensor]], *, backend: Backend = "auto") -> Tensor:
    """|Ci ∩ Cj| over all tensors: int64 [N, N] on the CPU, the diagonal being |Ci|."""
    return overlap_counts_per_tensor(masks, backend=backend).sum(0)


def resolve_conflicts_reference(
    policy: ConflictPolicy, pretrained: Tensor, tuned: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Tensor]:
    """`resolve_conflicts` in plain torch."""
    import torch

    if policy == "mean":
        return [words.clone() for words in masks]
    members = torch.stack([unpack_mask(words, pretrained.numel()) for words in masks])
    owner = torch.zeros(pretrained.numel(), dtype=torch.int64, device=pretrained.device)
    best = torch.full((pretrained.numel(),), -1.0, device=pretrained.device)
    for task, model in enumerate(tuned):
        claim = (model.float() - pretrained.float()).abs().reshape(-1)
        takes = members[task] if policy == "last" else members[task] & (claim > best)
        best = torch.where(takes, claim, best)
        owner = torch.where(takes, task, owner)
    return [pack_mask(members[task] & (owner == task)) for task in range(len(masks))]


def resolve_conflicts(
    policy: ConflictPolicy,
    pretrained: Tensor,
    tuned: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    backend: Backend = "auto",
) -> list[Tensor]:
    """The masks of one tensor after each contested element has been given to its owner; new tensors.

    policy: `magnitude` keeps a bit only for the task with the largest |θi − θ0| (fp32), ties to the earlier
    task; `last` only for the last task that holds it; `mean` keeps all (`fused_apply` then averages). The
    first two give disjoint masks with the same union.
    """
    _check_conflict(policy, pretrained, tuned, masks)
    resolved = resolve(backend, pretrained, *tuned, *masks)
    return implementation(resolved, resolve_conflicts_reference)(policy, pretrained, tuned, masks)


def _check_masks(masks: Sequence[Sequence[Tensor]]) -> None:
    if not 1 <= len(masks) <= MAX_TASKS:
        raise ValueError(f"masks holds {len(masks)} tasks; between 1 and {MAX_TASKS} are supported")
    for i, task in enumerate(masks):
        if len(task) != len(masks[0]):
            raise ValueError(f"masks[{i}] covers {len(task)} tensors, masks[0] {len(masks[0])}; pass the same tensors")
        for t, words in enumerate(task):
            check_words(f"masks[{i}][{t}]", words, 32 * masks[0][t].numel())


def _check_conflict(
    policy: ConflictPolicy, pretrained: Tensor, tuned: Sequence[Tensor], masks: Sequence[Tensor]
) -> None:
    if policy not in ("magnitude", "last", "mean"):
        raise ValueError(f"policy={policy!r} is unknown; use 'magnitude', 'last' or 'mean'")
    if not 1 <= len(tuned) <= MAX_TASKS or len(masks) != len(tuned):
        raise ValueError(f"{len(tuned)} tuned tensors and {len(masks)} masks; pass 1 to {MAX_TASKS} of each")
    check_values("pretrained", pretrained)
    for i, (tensor, words) in enumerate(zip(tuned, masks, strict=True)):
        check_values(f"tuned[{i}]", tensor)
        check_same_shape(f"tuned[{i}]", tensor, pretrained)
        check_words(f"masks[{i}]", words, pretrained.numel())
