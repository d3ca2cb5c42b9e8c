"""Masked Gram matrix: every inner product that N-way SLERP needs, from one pass over the models.

    v0 = r,  vi = xi − r  (fp32),   G[a, b] = Σ_j va[j]·vb[j]  over the positions j outside `excluded`

The differences carry the angle: for near-parallel xi the cosine of xi and r rounds to 1 in fp32, while G
of (r, xi − r) keeps it (see `slerp`). G is fp64; partial sums are fp32 over short runs at most and are
added in a fixed order, so one backend gives the same bits on every run and for every number of threads. An
empty selection gives zeros.

Every backend sums a run of elements with at most FEW of them left in fp64 throughout: there the rounding of fp32
products does not average out, and a vector of one element, parallel or opposite to every other, would get an angle
that is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .checks import MAX_TASKS, check_same_shape, check_values, check_words
from .dispatch import Backend, implementation, resolve
from .masks import unpack_mask

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["tensor", "row"]
FEW = 128  # elements left of a run (a block, a row, or what a GPU program sums) that are summed in fp64
_CHUNK = 1 << 20


def masked_gram_reference(
    reference: Tensor,
    vectors: Sequence[Tensor],
    excluded: Tensor | None,
    *,
    granularity: Granularity = "tensor",
) -> Tensor:
    """`masked_gram` in plain torch: fp32 differences, fp64 products and sums."""
    import torch

    rows = row_count(reference, granularity)
    numel = reference.numel()
    kept = None if excluded is None else ~unpack_mask(excluded, numel)
    gram = torch.zeros(rows, len(vectors) + 1, len(vectors) + 1, dtype=torch.float64)
    width = numel // rows if rows else 0
    for row in range(rows):
        for start in range(row * width, (row + 1) * width, _CHUNK):
            stop = min(start + _CHUNK, (row + 1) * width)
            base = reference.reshape(-1)[start:stop].float()
            parts = [base, *(x.reshape(-1)[start:stop].float() - base for x in vectors)]
            chunk = torch.stack(parts).double()
            if kept is not None:
                chunk = chunk[:, kept[start:stop]]
            gram[row] += (chunk @ chunk.T).cpu()
    return gram


def masked_gram(
    reference: Tensor,
    vectors: Sequence[Tensor],
    excluded: Tensor | None,
    *,
    granularity: Granularity = "tensor",
    backend: Backend = "auto",
) -> Tensor:
    """The Gram matrices of (r, x1 − r, ..., xN − r) over the positions outside `excluded`.

    reference: r, any shape; vectors: x1..xN, N in 1..16, the same shape; excluded: packed mask, None
    excludes nothing. Returns fp64 [R, N+1, N+1] on the CPU with R = 1 for granularity `tensor` and shape[0]
    for `row` (1 below two dimensions); for a whole model add the tensors' matrices.
    """
    if granularity not in ("tensor", "row"):
        raise ValueError(f"granularity={granularity!r} is unknown; use 'tensor' or 'row'")
    if not 1 <= len(vectors) <= MAX_TASKS:
        raise ValueError(f"vectors holds {len(vectors)} tensors; between 1 and {MAX_TASKS} are supported")
    check_values("reference", reference)
    for i, vector in enumerate(vectors):
        check_values(f"vectors[{i}]", vector)
        check_same_shape(f"vectors[{i}]", vector, reference)
    masks = [] if excluded is None else [excluded]
    for words in masks:
        check_words("excluded", words, reference.numel())
    resolved = resolve(backend, reference, *vectors, *masks)
    run = implementation(resolved, masked_gram_reference)
    return run(reference, vectors, excluded, granularity=granularity)


def row_count(tensor: Tensor, granularity: Granularity) -> int:
    """R: the number of vectors that `tensor` is treated as."""
    return tensor.shape[0] if granularity == "row" and tensor.dim() >= 2 else 1
