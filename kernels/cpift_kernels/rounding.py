"""Fused multiply-adds in plain torch, as processors and GPUs round them: once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def fma(left: Tensor, right: Tensor, addend: Tensor) -> Tensor:
    """left·right + addend of fp32 tensors, rounded to fp32 once.

    fp64 has the product exactly, but rounds the sum. Where that is not exact its last bit is made 1 (rounding to odd),
    so that rounding it to fp32 falls to the side where the exact sum lies.
    """
    import torch

    product, other = left.double() * right.double(), addend.double()
    total = product + other
    back = total - product
    error = (product - (total - back)) + (other - back)
    bits = total.view(torch.int64)
    to_odd = (error != 0) & error.isfinite() & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    bits = torch.where(to_odd, bits + torch.where(away, 1, -1), bits)
    return bits.view(torch.float64).float()
