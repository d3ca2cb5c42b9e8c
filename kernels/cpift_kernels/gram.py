"""Masked Gram matrix: every inner product that N-way SLERP needs, from one pass over the models.

    v0 = r,  vi = xi − r  (fp32),   G[a, b] = Σ_j va[j]·vb[j]  over the positions j outside `excluded`

The differences carry the angle: for near-parallel xi the cosine of xi and r rounds to 1 in fp32, while G
of (r, xi − r) keeps it (see `slerp`). G is fp64. Every backend on every processor gives the same bits, for the sums
have one order:

1. A vector is cut into blocks of BLOCK elements. What is excluded counts as 0, and so does what a last block lacks.
2. A block has SUMS running sums in fp32: element j belongs to sum j mod SUMS, which takes its elements in order, each
   by one fused multiply-add. In a block with at most FEW elements left they are fp64, where the products are exact:
   there the rounding of fp32 does not average out, and a vector of one element, parallel or opposite to every other,
   would get an angle that is neither.
3. The running sums of all blocks, in order, are a list in fp64: neighbours are added until one number is left. A number
   without a neighbour stays as it is.

An empty selection gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

from .checks import MAX_TASKS, check_same_shape, check_values, check_words
from .dispatch import Backend, implementation, resolve
from .masks import unpack_mask
from .rounding import fma

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["tensor", "row"]
BLOCK, SUMS = 4096, 16  # powers of two; with FEW part of what the results mean
FEW = 128  # elements left of a block that are summed in fp64
_CHUNK = 1 << 18  # elements that the reference has at once, a multiple of BLOCK


def masked_gram_reference(
    reference: Tensor,
    vectors: Sequence[Tensor],
    excluded: Tensor | None,
    *,
    granularity: Granularity = "tensor",
) -> Tensor:
    """`masked_gram` in plain torch."""
    import torch

    rows, size = row_count(reference, granularity), len(vectors) + 1
    width = reference.numel() // rows if rows else 0
    models = [model.reshape(rows, width) for model in (reference, *vectors)]
    kept = None if excluded is None else ~unpack_mask(excluded, rows * width).view(rows, width)
    grams, step = [torch.zeros(0, size * (size + 1) // 2, dtype=torch.float64)], max(1, _CHUNK // max(width, 1))
    for row in range(0, rows, step):
        chunks = []
        for start in range(0, max(width, 1), _CHUNK):
            part = slice(row, row + step), slice(start, start + _CHUNK)
            base = models[0][part].float()
            values = torch.stack([base, *(model[part].float() - base for model in models[1:])])
            here = torch.ones_like(values[0], dtype=torch.bool) if kept is None else kept[part]
            chunks.append(add_neighbours(_running_sums(torch.where(here, values, 0.0), here).flatten(1, 2)))
        grams.append(add_neighbours(torch.stack(chunks, 1)))
    return matrices(torch.cat(grams), size)


def _running_sums(values: Tensor, kept: Tensor) -> Tensor:
    """fp64 [rows, blocks, SUMS, P] of values [M, rows, width], of which `kept` [rows, width] are not excluded."""
    import torch

    width = max(values.shape[2], 1)
    block = min(BLOCK, -(-width // SUMS) * SUMS)
    fill = (0, -(-width // block) * block - values.shape[2])
    values, kept = torch.nn.functional.pad(values, fill), torch.nn.functional.pad(kept, fill)
    steps = values.unflatten(2, (-1, block // SUMS, SUMS))  # [M, rows, blocks, steps, SUMS]
    a, b = torch.tril_indices(len(values), len(values))
    sums = torch.zeros(len(a), *steps.shape[1:3], SUMS, device=values.device)
    exact = sums.double()
    for step in steps.unbind(3):
        sums = fma(step[a], step[b], sums)
        exact += step[a].double() * step[b].double()
    few = kept.unflatten(1, (-1, block)).sum(2) <= FEW
    return torch.where(few[..., None], exact, sums.double()).movedim(0, 3)


def add_neighbours(sums: Tensor) -> Tensor:
    """[..., P] of [..., n, P], n at least 1: neighbours added until one is left."""
    import torch

    while (count := sums.shape[-2]) > 1:
        if count % 2:
            sums = torch.nn.functional.pad(sums, (0, 0, 0, 1))
        sums = sums[..., 0::2, :] + sums[..., 1::2, :]
    return sums[..., 0, :]


def matrices(products: Tensor, size: int) -> Tensor:
    """fp64 [R, size, size] on the CPU of [R, P]: the lower triangles, row by row."""
    return products.cpu()[:, _places(size)].view(-1, size, size)


@cache
def _places(size: int) -> Tensor:
    """Where in a lower triangle each entry of the whole matrix stands."""
    import torch

    places = torch.empty(size, size, dtype=torch.int64)
    a, b = torch.tril_indices(size, size)
    places[a, b] = places[b, a] = torch.arange(len(a))
    return places.view(-1)


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
