"""How far a model has moved, block by block: what a fine-tune changed, and where.

    dj = |xj − oj|  (fp32: one subtraction)      of every block of BLOCK elements, the last may be shorter:
    largest = max dj      changed = #{dj > 0}      l1 = Σ dj      squares = Σ dj²      origin_squares = Σ oj²

`largest` and `changed` have the same bits on every backend. The sums are of fp64 terms that are exact and not negative:
in whatever order they are added, a block's is within 2⁻⁴⁰ of itself. One backend gives the same bits on every run and
for every number of threads. A NaN or Inf in either model makes `largest` one that is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checks import check_same_shape, check_values
from .dispatch import Backend, implementation, resolve

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 4096  # elements; part of what the results mean
_CHUNK = 1 << 10  # blocks that the reference widens together


@dataclass(frozen=True)
class Magnitudes:
    """Of every block, on the CPU: largest fp32, changed int64, l1, squares and origin_squares fp64, each [blocks]."""

    largest: Tensor
    changed: Tensor
    l1: Tensor
    squares: Tensor
    origin_squares: Tensor


def delta_magnitudes_reference(pretrained: Tensor, tuned: Tensor) -> Magnitudes:
    """`delta_magnitudes` in plain torch."""
    import torch

    parts = [
        _blocks(*(torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK) for part in both))
        for both in zip(*(x.view(-1).split(_CHUNK * BLOCK) for x in (pretrained, tuned)), strict=True)
    ]
    return Magnitudes(*(torch.cat(found).cpu() for found in zip(*parts, strict=True)))


def _blocks(origin: Tensor, tuned: Tensor) -> tuple[Tensor, ...]:
    delta = (tuned.float() - origin.float()).abs()
    squares = (x.double().square().sum(1) for x in (delta, origin))
    return delta.amax(1), (delta > 0).sum(1), delta.double().sum(1), *squares


def delta_magnitudes(pretrained: Tensor, tuned: Tensor, *, backend: Backend = "auto") -> Magnitudes:
    """Largest, count and sums of |tuned − pretrained| in every block of BLOCK elements, row-major.

    pretrained, tuned: bf16, fp16 or fp32 of one shape, contiguous, with at least one element. Raises ValueError.
    """
    for name, tensor in (("pretrained", pretrained), ("tuned", tuned)):
        check_values(name, tensor)
    check_same_shape("tuned", tuned, pretrained)
    if not pretrained.numel():
        raise ValueError(f"pretrained has no elements (shape {tuple(pretrained.shape)}); leave it out")
    return implementation(resolve(backend, pretrained, tuned), delta_magnitudes_reference)(pretrained, tuned)
