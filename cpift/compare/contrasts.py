"""Primary contrasts: differences named before any score was seen, tested together by Holm's procedure.

With m contrasts and their p values in ascending order, the k-th (k = 0, 1, …) is tested at α/(m − k), and shown only if
all before it are (Holm 1979). So the chance that any of them is shown by mistake is at most α. Its interval has the
confidence of its own test, 1 − α/(m − k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np

from cpift.compare.config import Comparison, Contrast
from cpift.compare.frontier import Frontiers
from cpift.errors import ConfigError, Problem, entry
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.measures import References, Scores, log_loss_ratio, mean_retention, worst_retention


@dataclass(frozen=True)
class Tested:
    """A contrast's outcome. p: adjusted by Holm's procedure; None where the difference has no interval. side: 1 above,
    -1 below, 0 no difference shown."""

    contrast: Contrast
    difference: Estimate
    p: float | None
    side: int


def require_compared(comparison: Comparison, names: Sequence[str]) -> None:
    """Raise ConfigError where a contrast names a method that is none of `names`."""
    problems, arrival = [], comparison.config.arrival
    for number, contrast in enumerate(comparison.config.contrasts):
        known = list(arrival.methods) if contrast.by == "arrival" and arrival is not None else names
        for field, name in (("method", contrast.method), ("rival", contrast.rival)):
            if name not in known:
                close = get_close_matches(name, known, 1)
                remedy = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(known)}"
                problems.append(Problem(f"contrasts.{number}.{field}", f"{name!r} is not compared", remedy))
    if problems:
        raise ConfigError(f"comparison {comparison.name}", problems)


def by_holm(
    scores: Scores, contrasts: Sequence[Contrast], references: References, frontiers: Frontiers | None = None
) -> list[Tested]:
    """Every contrast whose methods are there, in their order. Those without an interval count as not shown.

    frontiers: of methods for tasks that arrive, where a contrast is by `arrival`.
    """
    values = [
        frontiers.difference(contrast.method, contrast.rival)
        if frontiers is not None and contrast.by == "arrival"
        else entry(SCALES, contrast.by, "contrasts.by").difference(scores, contrast.method, contrast.rival, references)
        for contrast in contrasts
    ]
    ps = [scores.p_value(difference) for difference in values]
    order = sorted(range(len(ps)), key=lambda place: (1.0 if (p := ps[place]) is None else p, place))
    outcomes: dict[int, Tested] = {}
    largest, open_ = 0.0, True
    for k, place in enumerate(order):
        left, p = len(order) - k, ps[place]
        level = 1 - (1 - scores.confidence) / left
        difference = replace(scores, confidence=level).estimate(values[place])
        largest = max(largest, min(1.0, left * p)) if p is not None else 1.0
        open_ = open_ and p is not None and largest <= 1 - scores.confidence
        side = int(np.sign(difference.mean)) if open_ else 0
        outcomes[place] = Tested(contrasts[place], difference, None if p is None else largest, side)
    return [outcomes[place] for place in range(len(contrasts))]


Figure = Callable[[Scores, str, str, References], np.ndarray]  # [seeds, 1 + draws], above zero: the method is better


@dataclass(frozen=True)
class Scale:
    """What `contrasts.by` may name."""

    title: str
    difference: Figure


def _retained(figure: Callable[[Scores, str, References], np.ndarray]) -> Figure:
    def difference(scores: Scores, method: str, rival: str, references: References) -> np.ndarray:
        return np.asarray(figure(scores, method, references) - figure(scores, rival, references))

    return difference


def _of_frontiers(scores: Scores, method: str, rival: str, references: References) -> np.ndarray:
    raise LookupError("ΔA at equal ΔB is asked of the frontiers")


SCALES = {
    "retention": Scale("mean retention", _retained(mean_retention)),
    "worst": Scale("worst task", _retained(worst_retention)),
    "loss": Scale("ln of the losses' ratio", log_loss_ratio),
    "arrival": Scale("ΔA at equal ΔB", _of_frontiers),
}
