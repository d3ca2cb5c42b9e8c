"""Differences in words: "above" or "below" only where a whole interval lies on one side of zero."""

from __future__ import annotations

import math

from cpift.compare.contrasts import SCALES, Tested
from cpift.evaluation.estimates import Estimate


def side(estimate: Estimate) -> int:
    """1 where the whole interval is above zero, −1 where below, else 0."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def points(estimate: Estimate) -> str:
    """A difference of retentions in points, with its interval and what it shows."""
    shown = {1: "above", -1: "below", 0: "no difference shown"}[side(estimate)]
    if estimate.low is None or estimate.high is None:
        return _alone(estimate)
    return f"{signed(100 * estimate.mean)} [{signed(100 * estimate.low)}, {signed(100 * estimate.high)}], {shown}"


def _alone(estimate: Estimate) -> str:
    """A difference that has no interval; where no task is judged it has no value either."""
    return f"{signed(100 * estimate.mean)} (no interval)" if math.isfinite(estimate.mean) else "no value"


def share(estimate: Estimate) -> str:
    """A share in percent with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{number(100 * estimate.mean)} %"
    return f"{number(100 * estimate.mean)} % [{number(100 * estimate.low)}, {number(100 * estimate.high)}]"


def number(value: float, digits: int = 1) -> str:
    """A number with a true minus sign, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    text = number(value, digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def primary_sentence(outcome: Tested) -> str:
    """A primary contrast, what it came to, and what it shows."""
    contrast = outcome.contrast
    return f"{contrast.method} − {contrast.rival}, {SCALES[contrast.by].title}: {primary_points(outcome)}."


def primary_points(outcome: Tested) -> str:
    """In points (of ln ratios: hundredths), with the interval of its own test, the adjusted p, and what it shows."""
    shown = {1: "above", -1: "below", 0: "no difference shown"}[outcome.side]
    difference = outcome.difference
    if difference.low is None or difference.high is None or outcome.p is None:
        return _alone(difference)
    p = f"p {outcome.p:.3f}" if outcome.p >= 0.001 else "p < 0.001"
    interval = f"[{signed(100 * difference.low)}, {signed(100 * difference.high)}]"
    return f"{signed(100 * difference.mean)} {interval}, {p}, {shown}"
