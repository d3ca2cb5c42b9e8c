"""Figures of many models on several tasks, each with an interval over test items and training seeds.

Item i of task t scored by method m trained with seed s gives a value; a figure (a mean score, a retention, a worst
task, a difference between two methods) is a function of all of them. Its interval has two sources of chance:

    items   the same test rows are drawn with replacement for every method and seed at once (a paired bootstrap);
            the figure's variance over draws is V_items
    seeds   the jackknife over the seeds, (S−1)/S · Σ (θ₋ₛ − θ̄)²; for a mean it is the sample variance ÷ S: V_seeds

    interval   θ ± √(t(rows−1)² · V_items + t(S−1)² · V_seeds),  t Student's quantile

Percentiles of a bootstrap over seeds would be the shorter recipe, but with three seeds they cover far less than they
say; so does one quantile with Welch's degrees of freedom (92.5 % for 95, simulated). What seeds and items do together
is counted in both variances: the interval errs on the wide side. With one seed only chance in the items is known: such
an interval says nothing about another training run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from cpift.evaluation.estimates import Estimate, t_quantile
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.retention import Learning, judged, retained

# Of the seeds at these places: the figure for the whole test set, then for every draw. [1 + draws]
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TaskItems:
    """One task's test items: a method's score is Σ totals / Σ weights over them.

    totals: float64 [methods, seeds, rows]; weights: float64 [rows], 1 for scores, answer tokens for losses.
    larger_is_better: False for losses, whose values are then negated.
    """

    task: str
    totals: np.ndarray
    weights: np.ndarray
    larger_is_better: bool


@dataclass(frozen=True)
class Scores:
    """Scores of all methods on all tasks. values: float64 [methods, seeds, tasks, 1 + draws], larger is better; the
    first along the last axis is the whole test set, the others are bootstrap draws of it."""

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    values: np.ndarray
    rows: int  # of the smallest task
    confidence: float = 0.95

    def of(self, method: str, task: str | None = None) -> np.ndarray:
        """[seeds, tasks, 1 + draws] of a method, or [seeds, 1 + draws] on one task."""
        values: np.ndarray = self.values[self.methods.index(method)]
        return values if task is None else values[:, self.tasks.index(task)]

    def estimate(self, values: np.ndarray) -> Estimate:
        """Mean over seeds of a figure [seeds, 1 + draws], with its interval."""
        return self.estimate_of(lambda seeds: values[seeds].mean(axis=0), values[:, 0])

    def p_value(self, values: np.ndarray) -> float | None:
        """Of a difference [seeds, 1 + draws] against none: `p_value`."""
        return p_value(lambda seeds: values[seeds].mean(axis=0), len(values), self.rows)

    def estimate_of(self, statistic: Statistic, values: Sequence[float] | np.ndarray) -> Estimate:
        """Any figure over seeds; `values` are what it is for each seed alone, kept for the reader."""
        return interval(statistic, list(map(float, values)), self.rows, self.confidence)


def bootstrap(items: Sequence[TaskItems], methods: Sequence[str], draws: int, seed: int, confidence: float) -> Scores:
    """Score every method on every task, on the whole test set and on `draws` resamples of its rows.

    One task's resamples are the same for all methods and seeds; tasks are resampled independently.
    """
    random, columns = np.random.default_rng(seed), []
    for item in items:
        rows = len(item.weights)
        counts = np.ones((rows, 1 + draws))
        counts[:, 1:] = random.multinomial(rows, np.full(rows, 1 / rows), size=draws).T
        value = (item.totals @ counts) / (item.weights @ counts)
        columns.append(value if item.larger_is_better else -value)
    rows = min(len(item.weights) for item in items)
    tasks = tuple(item.task for item in items)
    return Scores(tuple(methods), tasks, np.stack(columns, axis=2), rows, confidence)


def interval(statistic: Statistic, values: Sequence[float], rows: int, confidence: float) -> Estimate:
    """The figure and its interval (see the module's text); without an interval where the figure has no value.

    values: the figure of each seed alone. rows: test rows that were drawn from.
    """
    seeds = np.arange(len(values))
    figure = statistic(seeds)
    point, variances = float(figure[0]), _variances(statistic, seeds)
    if variances is None:
        return Estimate(list(values), point, None, None)
    half = _half(variances, rows, len(seeds), confidence)
    return Estimate(list(values), point, point - half, point + half)


def p_value(statistic: Statistic, seeds: int, rows: int) -> float | None:
    """The smallest α whose interval of confidence 1 − α leaves zero out, to about 1e-5; 1 where the figure is 0.
    None where there is no interval."""
    point, variances = float(statistic(np.arange(seeds))[0]), _variances(statistic, np.arange(seeds))
    if variances is None:
        return None
    low, high = 0.0, 1.0  # of α: the interval grows as α falls
    for _ in range(17):
        middle = (low + high) / 2
        excluded = abs(point) > _half(variances, rows, seeds, 1 - middle)
        low, high = (low, middle) if excluded else (middle, high)
    return high


def _variances(statistic: Statistic, seeds: np.ndarray) -> tuple[float, float] | None:
    """V_items and V_seeds; None where the figure has no value."""
    figure = statistic(seeds)
    draws = figure[1:][np.isfinite(figure[1:])]
    if not math.isfinite(float(figure[0])) or len(draws) < 2:
        return None
    return float(draws.var(ddof=1)), _jackknife(statistic, seeds)


def _half(variances: tuple[float, float], rows: int, seeds: int, confidence: float) -> float:
    by_items, by_seeds = variances
    return math.sqrt(by_items * _quantile(confidence, rows - 1) ** 2 + by_seeds * _quantile(confidence, seeds - 1) ** 2)


def _jackknife(statistic: Statistic, seeds: np.ndarray) -> float:
    if len(seeds) < 2:
        return 0.0
    without = np.array([statistic(np.delete(seeds, place))[0] for place in range(len(seeds))])
    return float((len(seeds) - 1) * without.var())


@cache
def _quantile(confidence: float, freedom: int) -> float:
    return t_quantile(0.5 + confidence / 2, max(freedom, 1))


@dataclass(frozen=True)
class References:
    """What methods are measured against: the names of θ0 and of the own probes, each task's metric, and what guessing
    scores where that is known. decided: by task why it is in no mean, "" where it is; None: these scores decide."""

    base: str
    probes: str
    metrics: Mapping[str, str]
    chance: Mapping[str, float] = field(default_factory=dict)
    decided: Mapping[str, str] | None = None


# ---- figures ---------------------------------------------------------------------------------------------------------


def retention(scores: Scores, method: str, probes: str) -> np.ndarray:
    """[seeds, tasks, 1 + draws]: `retention.retained`."""
    return retained(scores.of(method), scores.of(probes))


def learning(scores: Scores, references: References) -> dict[str, Learning]:
    """What the own probes learnt of every task, over all seeds, with the intervals of their gains."""
    gains = scores.of(references.probes) - scores.of(references.base)
    return {
        task: replace(learnt, gain=scores.estimate(gains[:, scores.tasks.index(task)]))
        for task, learnt in _learnt(scores, references).items()
    }


def _learnt(scores: Scores, references: References) -> dict[str, Learning]:
    """`learning` without intervals, which decide nothing about which tasks are judged and take most of the time."""
    probes, base, learnt = scores.of(references.probes)[..., 0], scores.of(references.base)[..., 0], {}
    for place, task in enumerate(scores.tasks):
        own, origin = probes[:, place], float(base[:, place].mean())
        chance, always = references.chance.get(task), bool((own != 0).all())
        decided = None if references.decided is None else references.decided[task]
        metric, mean = references.metrics[task], float(own.mean())
        learnt[task] = Learning(task, metric, mean, origin, chance, None, always, decided)
    return learnt


def mean_retention(scores: Scores, method: str, references: References) -> np.ndarray:
    """[seeds, 1 + draws]: the mean over judged tasks."""
    means: np.ndarray = _judged(scores, method, references).mean(axis=1)
    return means


def log_loss_ratio(scores: Scores, method: str, rival: str, references: References) -> np.ndarray:
    """[seeds, 1 + draws]: mean over judged tasks that are measured by their loss of ln(rival's loss ÷ method's loss);
    NaN where there is none. The own probes' noise is not in it."""
    tasks = [task for task in judged(_learnt(scores, references)) if metric_of(references.metrics[task]).by_loss]
    if not tasks:
        return np.full_like(scores.of(method)[:, 0], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [np.log(scores.of(rival, task) / scores.of(method, task)) for task in tasks]
    means: np.ndarray = np.mean(ratios, axis=0)
    return means


def worst_retention(scores: Scores, method: str, references: References) -> np.ndarray:
    """[seeds, 1 + draws]: of the judged task that is worst in this very run."""
    worst: np.ndarray = _judged(scores, method, references).min(axis=1)
    return worst


def _judged(scores: Scores, method: str, references: References) -> np.ndarray:
    places = [scores.tasks.index(task) for task in judged(_learnt(scores, references))]
    shares = retention(scores, method, references.probes)
    return shares[:, places] if places else np.full_like(shares[:, :1], np.nan)


def low_resource(rows: Mapping[str, int]) -> list[str]:
    """Tasks with less than half as many training rows as the tasks have on average; empty where data are balanced."""
    return [task for task, count in rows.items() if 2 * count * len(rows) < sum(rows.values())]


def imbalance(scores: Scores, method: str, references: References, low: Sequence[str]) -> np.ndarray:
    """[seeds, 1 + draws]: mean retention of the low-resource tasks less that of the others; below zero, the small pay.

    Over judged tasks; NaN where no low-resource task, or no other, is among them.
    """
    shares = retention(scores, method, references.probes)
    tasks = judged(_learnt(scores, references))
    parts = [[scores.tasks.index(task) for task in tasks if (task in low) == side] for side in (True, False)]
    if not all(parts):
        return np.full_like(shares[:, 0], np.nan)
    small, large = (shares[:, places].mean(axis=1) for places in parts)
    return np.asarray(small - large)


def ranks(scores: Scores, among: Sequence[str]) -> dict[str, np.ndarray]:
    """[seeds, 1 + draws] by method: its rank (1 is best, ties share the mean rank), averaged over tasks."""
    if not among:
        return {}
    values = np.stack([scores.of(method) for method in among])
    places = {}
    for place, method in enumerate(among):
        better, equal = (values > values[place]).sum(axis=0), (values == values[place]).sum(axis=0)
        places[method] = (better + (equal + 1) / 2).mean(axis=1)
    return places


@dataclass(frozen=True)
class Seesaw:
    """How many of a method's tasks came out worse than a reference by more than the interval of the difference."""

    below_base: int
    below_probe: int
    tasks: int


def seesaw(scores: Scores, method: str, base: str, probes: str) -> Seesaw:
    """Tasks on which the whole interval of (method − θ0), or of (method − own probe), lies below zero."""

    def below(reference: str) -> int:
        differences = scores.of(method) - scores.of(reference)
        highs = [scores.estimate(differences[:, task]).high for task in range(len(scores.tasks))]
        return sum(high is not None and high < 0 for high in highs)

    return Seesaw(below(base), below(probes), len(scores.tasks))


@dataclass(frozen=True)
class Forgetting:
    """What learning B does to A, in the metric's own units: score on A after B less A's own probe's, and the score on B
    less what A's probe has there."""

    first: Estimate
    second: Estimate


def forgetting(scores: Scores, after: str, probe: str, pair: tuple[str, str]) -> Forgetting:
    """ΔA and ΔB of the model `after` both, against the model `probe` of A alone."""
    one, two = (scores.of(after, task) - scores.of(probe, task) for task in pair)
    return Forgetting(scores.estimate(one), scores.estimate(two))


def forgetting_cut(scores: Scores, changes: Mapping[str, np.ndarray], rival: str, method: str) -> Estimate:
    """1 − ΔA of `method` ÷ ΔA of `rival`, ΔA averaged over pairs: 1 is no forgetting, 0 as much as the rival.

    changes: by method ΔA, [seeds, 1 + draws]. Means are divided, not seeds averaged: one seed's ΔA may be near 0.
    Without an interval where the rival is not shown to forget: a share of what may be nothing says nothing.
    """
    own, other = changes[method], changes[rival]
    forgets = scores.estimate(other)

    def cut(seeds: np.ndarray) -> np.ndarray:
        below = other[seeds].mean(axis=0)
        ratio = np.divide(own[seeds].mean(axis=0), below, out=np.full_like(below, np.nan), where=below != 0)
        reduction: np.ndarray = 1 - ratio
        return reduction

    alone = [float(cut(np.array([seed]))[0]) for seed in range(len(own))]
    estimate = scores.estimate_of(cut, alone)
    return estimate if forgets.high is not None and forgets.high < 0 else replace(estimate, low=None, high=None)
