"""Models whose updates are hard to select from, and independent oracles, shared by the kernel tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from cpift_kernels import Magnitudes
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Update = Callable[[int, torch.Generator], Tensor]


def _tied(n: int, g: torch.Generator) -> Tensor:
    """A bf16 fine-tune: 95 % of the elements unmoved, the rest on few values."""
    step = torch.randint(-3, 4, (n,), generator=g) * 2.0**-9
    return torch.where(torch.rand(n, generator=g) < 0.05, step, 0.0)


def _hot_block(n: int, g: torch.Generator) -> Tensor:
    update = torch.randn(n, generator=g) * 1e-3
    update[n // 3 : n // 3 + n // 50 + 1] += 1.0
    return update


UPDATES: dict[str, Update] = {
    "random": lambda n, g: torch.randn(n, generator=g) * 0.01,
    "constant": lambda n, g: torch.full((n,), 0.25),
    "unmoved": lambda n, g: torch.zeros(n),
    "tied": _tied,
    "denormal": lambda n, g: torch.randint(-40, 41, (n,), generator=g) * 2.0**-149,
    "ascending": lambda n, g: torch.arange(n) * 2.0**-12,
    "descending": lambda n, g: torch.arange(n, 0, -1) * 2.0**-12,
    "hot block": _hot_block,
    "two-valued": lambda n, g: torch.where(torch.arange(n) % 7 == 3, 0.5, 0.125),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(flat: Tensor) -> list[Tensor]:
    """A model of awkward shapes (empty, single, odd, two-dimensional) from its elements in order."""
    n = flat.numel()
    cuts = [0, min(1, n), min(1, n), n // 3, n // 3 + (n - n // 3) // 7 * 7, n]
    parts = [flat[a:b].clone() for a, b in pairwise(cuts)]
    parts[3] = parts[3].view(-1, 7)
    return parts


def models(
    update: str, n: int, base_dtype: torch.dtype, dtypes: Sequence[torch.dtype]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """A base of n elements and one fine-tuned model for each dtype."""
    g = generator(n)
    base = torch.zeros(n) if update == "denormal" else torch.randn(n, generator=g)
    tuned = [split((base.to(base_dtype).float() + UPDATES[update](n, g)).to(dtype)) for dtype in dtypes]
    return split(base.to(base_dtype)), tuned


def sorted_top(pretrained: Sequence[Tensor], tuned: Sequence[Tensor], count: int) -> np.ndarray:
    """The selection by a full sort: the indices of the `count` largest non-zero |Δ|, ties to the lower index."""
    delta = torch.cat([(x.float() - x0.float()).abs().reshape(-1) for x, x0 in zip(tuned, pretrained, strict=True)])
    order = np.lexsort((np.arange(delta.numel()), -delta.numpy()))[:count]
    return np.sort(order[delta.numpy()[order] > 0])


def sequential_slerp(start: Tensor, others: Sequence[Tensor], omegas: Sequence[float], epsilon: float) -> Tensor:
    """CPI-FT's definition in fp64, vector after vector, the angle by Kahan's formula for unit vectors."""
    a = start.double()
    for b, omega in zip((x.double() for x in others), omegas, strict=True):
        angle = _angle(a, b)
        if angle < epsilon or math.pi - angle < max(epsilon, 0.01):
            a = (1 - omega) * a + omega * b
        else:
            a = (math.sin((1 - omega) * angle) * a + math.sin(omega * angle) * b) / math.sin(angle)
    return a


def _angle(a: Tensor, b: Tensor) -> float:
    if not a.norm() or not b.norm():
        return 0.0
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


def same_magnitudes(found: Magnitudes, wanted: Magnitudes) -> None:
    """Largest and counts bit for bit; sums as closely as `cpift_kernels.magnitudes` says."""
    assert torch.equal(found.largest, wanted.largest)
    assert torch.equal(found.changed, wanted.changed)
    for mine, its in ((getattr(found, name), getattr(wanted, name)) for name in ("l1", "squares", "origin_squares")):
        assert mine.dtype == torch.float64
        assert bool(((mine - its).abs() <= 2.0**-40 * its).all())
