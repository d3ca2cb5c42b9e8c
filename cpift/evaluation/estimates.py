"""A figure with its interval, and Student's quantiles without scipy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean, stdev


@dataclass(frozen=True)
class Estimate:
    """One figure over repeats with other seeds. The interval is Student's; None with a single value, or with one that
    is no finite number."""

    values: list[float]
    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """Mean and the two-sided t interval over independent repeats."""
    middle = mean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Estimate(list(values), middle, None, None)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(list(values), middle, middle - half, middle + half)


def estimates(repeats: Sequence[Mapping[str, float]], confidence: float) -> dict[str, Estimate]:
    """Each figure that all repeats have."""
    shared = [name for name in repeats[0] if all(name in figures for figures in repeats)] if repeats else []
    return {name: estimate([figures[name] for figures in repeats], confidence) for name in shared}


def weighted_mean(values: Sequence[float], weights: Sequence[float], confidence: float) -> Estimate:
    """Σ w·x / Σ w over rows that are drawn together with their weights, with its linearised t interval; for equal
    weights it is that of `estimate`. Without an interval for a single row, or where one is no finite number."""
    total, rows = sum(weights), len(values)
    middle = sum(w * x for w, x in zip(weights, values, strict=True)) / total
    if rows < 2 or not math.isfinite(middle):
        return Estimate(list(values), middle, None, None)
    squares = sum((w * (x - middle)) ** 2 for w, x in zip(weights, values, strict=True))
    half = t_quantile(0.5 + confidence / 2, rows - 1) * math.sqrt(squares * rows / (rows - 1)) / total
    return Estimate(list(values), middle, middle - half, middle + half)


@lru_cache(maxsize=1024)  # a report asks for the same few, hundreds of times
def t_quantile(q: float, freedom: int) -> float:
    """Quantile q > ½ of Student's t distribution, to about 1e-9: bisection on its distribution function."""
    low, high = 0.0, 1.0
    while _t_distribution(high, freedom) < q:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_distribution(middle, freedom) < q else (low, middle)
    return (low + high) / 2


def _t_distribution(t: float, freedom: int) -> float:
    """P(T ≤ t), t ≥ 0: with θ = atan(t/√ν) it is ½ + c·∫₀^θ cos^(ν−1), by Simpson's rule."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    width, parts = math.atan(t / math.sqrt(freedom)), 400
    weights = [1, *[4, 2] * (parts // 2 - 1), 4, 1]
    area = sum(w * math.cos(i * width / parts) ** (freedom - 1) for i, w in enumerate(weights)) * width / parts / 3
    return 0.5 + constant * area
