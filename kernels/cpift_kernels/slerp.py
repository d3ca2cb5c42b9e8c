"""N-way sequential SLERP as a linear combination of its inputs.

    SLERP(a, b, ω) = sin((1−ω)Ω)/sinΩ · a + sin(ωΩ)/sinΩ · b,    cosΩ = ⟨a, b⟩ / (‖a‖‖b‖)   (arXiv 2508.21741)

Folding one vector after another keeps the running result a combination Σ c_m v_m, so each angle follows
from the Gram matrix of the inputs (`gram`) and no intermediate vector exists. The angle is taken from its
sine with d = b − a,

    sinΩ · ‖a‖‖b‖ = sqrt(‖a‖²‖d‖² − ⟨a, d⟩²),    Ω = atan2(sinΩ · ‖a‖‖b‖, ⟨a, b⟩),

which keeps the angle of near-parallel vectors, where 1 − cosΩ is lost in rounding.

Degenerate cases take LERP, (1−ω)·a + ω·b, and are recorded: Ω < epsilon, a vector of zero norm (its angle
is recorded as 0), and antiparallel vectors (π − Ω < max(epsilon, 0.01)), between which no great circle is
singled out: there the weights grow like 1/(π − Ω), and the Gram matrix's rounding (fp32 products) moves Ω by
about 5e-4, so a closer angle would be noise. Where a and d are parallel but for fp64's rounding, Ω is 0 or π: left at
that noise, it would be anything once ‖b‖ is a millionth of ‖a‖. All of it is fp64 on [..., N+1, N+1] matrices: no
backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


Space = Literal["weights", "delta"]
_ANTIPARALLEL = 1e-2
_NOISE = 2.0**-48  # of ‖a‖²‖d‖²: sin²(a, d) below it is rounding


@dataclass(frozen=True)
class SlerpResult:
    """coefficients: fp64 [..., N+1] on [r, x1, ..., xN]; angles: fp64 [..., steps], radians; lerp: bool
    [..., steps]."""

    coefficients: Tensor
    angles: Tensor
    lerp: Tensor


def slerp_coefficients(
    gram: Tensor, omegas: Sequence[float], epsilon: float, *, space: Space = "weights"
) -> SlerpResult:
    """The coefficients c with fused = c[0]·r + Σ c[i]·xi of a sequential SLERP.

    gram: fp64 [..., N+1, N+1] from `masked_gram`, of (r, x1 − r, ..., xN − r). omegas: one interpolation
    factor in [0, 1] a step. epsilon: collinearity threshold in radians. space `weights`: start from r, fold
    x1..xN with omegas[0..N-1]. space `delta`: SLERP of the differences around r (r is θ0, xi − r a task
    vector): start from x1 − r, fold x2 − r .. xN − r with omegas[0..N-2]. Raises ValueError for a wrong
    number of factors, a factor outside [0, 1], a negative epsilon, or NaN/Inf in gram.
    """
    import torch

    _check(gram, omegas, epsilon, space)
    size = gram.shape[-1]
    basis = torch.eye(size, dtype=torch.float64, device=gram.device)
    first = 1 if space == "weights" else 2
    running = basis[first - 1].expand(gram.shape[:-1]).clone()
    angles, lerp = [], []
    for omega, index in zip(omegas, range(first, size), strict=True):
        target = basis[index] + basis[0] if space == "weights" else basis[index]
        angle, collinear = _angle(gram, running, target, epsilon)
        scale_a, scale_b = _weights(angle, collinear, omega)
        running = scale_a[..., None] * running + scale_b[..., None] * target
        angles.append(angle)
        lerp.append(collinear)
    coefficients = running.clone()
    origin = running[..., 0] if space == "weights" else 1.0
    coefficients[..., 0] = origin - running[..., 1:].sum(-1)
    return SlerpResult(coefficients, _stack(angles, gram), _stack(lerp, gram).bool())


def _angle(gram: Tensor, a: Tensor, b: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The angle between the combinations a and b of the Gram matrix's vectors, and whether to take LERP."""
    import torch

    d = b - a
    aa, dd, ad = _inner(gram, a, a), _inner(gram, d, d), _inner(gram, a, d)
    bb = _inner(gram, b.expand_as(a), b.expand_as(a))
    squared = aa * dd - ad * ad
    cross = torch.where(squared > _NOISE * aa * dd, squared, 0.0).sqrt()
    angle = torch.atan2(cross, aa + ad)
    vanishing = (aa <= 0) | (bb <= 0)
    angle = torch.where(vanishing, 0.0, angle)
    collinear = vanishing | (angle < epsilon) | (angle == 0) | (math.pi - angle < max(epsilon, _ANTIPARALLEL))
    return angle, collinear


def _inner(gram: Tensor, a: Tensor, b: Tensor) -> Tensor:
    import torch

    return torch.einsum("...i,...ij,...j->...", a, gram, b)


def _weights(angle: Tensor, collinear: Tensor, omega: float) -> tuple[Tensor, Tensor]:
    import torch

    sine = torch.where(collinear, 1.0, angle.sin())
    scale_a = torch.where(collinear, 1.0 - omega, ((1.0 - omega) * angle).sin() / sine)
    scale_b = torch.where(collinear, omega, (omega * angle).sin() / sine)
    return scale_a, scale_b


def _stack(columns: list[Tensor], gram: Tensor) -> Tensor:
    import torch

    return torch.stack(columns, -1) if columns else gram.new_zeros((*gram.shape[:-2], 0))


def _check(gram: Tensor, omegas: Sequence[float], epsilon: float, space: Space) -> None:
    import torch

    if space not in ("weights", "delta"):
        raise ValueError(f"space={space!r} is unknown; use 'weights' or 'delta'")
    if gram.dtype != torch.float64 or gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] < 2:
        raise ValueError(f"gram is {gram.dtype} {tuple(gram.shape)}; pass float64 [..., N+1, N+1] from masked_gram")
    if not gram.isfinite().all():
        raise ValueError("gram holds NaN or Inf; look for NaN or Inf in the models, or overflow of their squares")
    steps = gram.shape[-1] - (1 if space == "weights" else 2)
    if len(omegas) != steps:
        raise ValueError(f"omegas holds {len(omegas)} factors; {steps} steps in space={space!r} need {steps}")
    if not all(0.0 <= omega <= 1.0 for omega in omegas):
        raise ValueError(f"omegas={list(omegas)} leaves [0, 1]")
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon={epsilon} is not a non-negative angle in radians")
