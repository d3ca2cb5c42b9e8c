"""A low-rank update added to values, any run of elements, with bits that do not depend on which run is asked for.

    out[j] = values[j] + scaling · Σ_k left[row(j), k] · right[k, column(j)]

in fp32: every product rounded, then added, k ascending; the sum rounded to the values' dtype. A matrix library chooses
its order of summation by the shape; a model that is streamed in slices needs one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checks import check_values
from .dispatch import Backend, implementation, resolve

if TYPE_CHECKING:
    from torch import Tensor


def add_low_rank_reference(values: Tensor, left: Tensor, right: Tensor, start: int, scaling: float) -> Tensor:
    """`add_low_rank` in plain torch."""
    import torch

    places = torch.arange(start, start + values.numel(), device=values.device)
    rows, columns = places // right.shape[1], places % right.shape[1]
    sums = torch.zeros(values.numel(), device=values.device)
    for k in range(left.shape[1]):
        sums += left[rows, k] * right[k, columns]
    return sums.mul_(scaling).add_(values.float()).to(values.dtype)


def add_low_rank(
    values: Tensor, left: Tensor, right: Tensor, start: int, scaling: float, *, backend: Backend = "auto"
) -> Tensor:
    """values [n] + scaling · elements start..start+n-1 of left [R, K] @ right [K, C], row-major; a new tensor.

    values: bf16, fp16 or fp32; left, right: fp32. Raises ValueError for factors that do not fit, or elements past the
    product's end.
    """
    check_values("values", values)
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} are no factors [R, K] and [K, C]")
    if not 0 <= start <= start + values.numel() <= left.shape[0] * right.shape[1]:
        total = left.shape[0] * right.shape[1]
        raise ValueError(f"elements {start} to {start + values.numel()} are asked for; the product has {total}")
    resolved = resolve(backend, values, left, right)
    return implementation(resolved, add_low_rank_reference)(values, left, right, start, scaling)
