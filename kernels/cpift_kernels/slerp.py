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
that noise, it would be anything once ‖b‖ is a millionth of ‖a‖. All of it is fp64 on [..., N+1, N+1] matrices, in
numpy's additions, multiplications, divisions and square roots alone, in one order: sines of libraries and sums of BLAS
differ from processor to processor, and a model's bytes would with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Doubles: TypeAlias = NDArray[np.float64]
Booleans: TypeAlias = NDArray[np.bool_]

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
    products = gram.numpy()
    size = products.shape[-1]
    basis = np.eye(size)
    first = 1 if space == "weights" else 2
    running = np.broadcast_to(basis[first - 1], products.shape[:-1])
    angles = np.zeros((*products.shape[:-2], size - first))
    lerp = np.zeros(angles.shape, bool)
    for step, omega in enumerate(omegas):
        target = basis[first + step] + basis[0] if space == "weights" else basis[first + step]
        angle, collinear = _angle(products, running, np.broadcast_to(target, running.shape), epsilon)
        scale_a, scale_b = _weights(angle, collinear, omega)
        running = scale_a[..., None] * running + scale_b[..., None] * target
        angles[..., step], lerp[..., step] = angle, collinear
    coefficients = running.copy()
    origin = running[..., 0] if space == "weights" else 1.0
    coefficients[..., 0] = origin - _sum(running[..., 1:])
    return SlerpResult(torch.from_numpy(coefficients), torch.from_numpy(angles), torch.from_numpy(lerp))


def _angle(gram: Doubles, a: Doubles, b: Doubles, epsilon: float) -> tuple[Doubles, Booleans]:
    """The angle between the combinations a and b of the Gram matrix's vectors, and whether to take LERP."""
    d = b - a
    aa, dd, ad, bb = _inner(gram, a, a), _inner(gram, d, d), _inner(gram, a, d), _inner(gram, b, b)
    squared = aa * dd - ad * ad
    angle = _arc(np.sqrt(np.where(squared > _NOISE * aa * dd, squared, 0.0)), aa + ad)
    vanishing = (aa <= 0) | (bb <= 0)
    angle = np.where(vanishing, 0.0, angle)
    collinear = vanishing | (angle < epsilon) | (angle == 0) | (math.pi - angle < max(epsilon, _ANTIPARALLEL))
    return angle, collinear


def _inner(gram: Doubles, a: Doubles, b: Doubles) -> Doubles:
    return _sum(a * _sum(gram * b[..., None, :]))


def _sum(terms: Doubles) -> Doubles:
    """Along the last dimension, one after another."""
    total = np.zeros(terms.shape[:-1])
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def _weights(angle: Doubles, collinear: Booleans, omega: float) -> tuple[Doubles, Doubles]:
    sine = np.where(collinear, 1.0, _sine(angle))
    scale_a = np.where(collinear, 1.0 - omega, _sine((1.0 - omega) * angle) / sine)
    scale_b = np.where(collinear, omega, _sine(omega * angle) / sine)
    return scale_a, scale_b


_BEYOND_PI = 1.2246467991473532e-16  # π less the fp64 number next to it
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12)]
_ARCTANGENT = [(-1) ** k / (2 * k + 1) for k in range(13)]


def _sine(x: Doubles) -> Doubles:
    """sin x of 0 to π, within a few units of the last place: its series at x or π − x, whichever is smaller."""
    other = (math.pi - x) + _BEYOND_PI
    return _odd_series(_SINE, np.where(x < other, x, other))


def _arc(sine: Doubles, cosine: Doubles) -> Doubles:
    """atan2 of what is not negative and anything, within a few units of the last place; 0 of two zeros.

    An angle up to π/2 is halved three times, by tan(α/2) = sin α / (1 + cos α), to where its series is short.
    """
    length = np.sqrt(sine * sine + cosine * cosine)
    tangent = sine / np.where(length > 0, length + np.abs(cosine), 1.0)
    for _ in range(2):
        tangent = tangent / (1.0 + np.sqrt(1.0 + tangent * tangent))
    angle = 8.0 * _odd_series(_ARCTANGENT, tangent)
    return np.where(cosine < 0, (math.pi - angle) + _BEYOND_PI, angle)


def _odd_series(factors: Sequence[float], x: Doubles) -> Doubles:
    """Σ factors[k]·x^(2k+1)."""
    square, total = x * x, np.zeros(x.shape)
    for factor in reversed(factors):
        total = total * square + factor
    return total * x


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
