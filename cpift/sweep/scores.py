"""What a sweep found, as plain data: figures over seeds with their intervals, the best trial, the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpift.config.loading import Fields
from cpift.evaluation.estimates import Estimate
from cpift.scorecard.card import Scorecard
from cpift.sweep.objectives import less_is_better


@dataclass(frozen=True)
class TrialRow:
    """One trial: the points of the space that came to it, and how it went."""

    number: int
    points: list[Fields]
    status: str  # done | stopped (early, by ASHA) | failed
    reason: str
    groups: list[list[list[str]]]  # one a seed, in stage order
    figures: dict[str, dict[str, Estimate]]  # model → figure → over seeds
    seconds: float  # work done for this trial alone: fusion, integration, their scores


@dataclass(frozen=True)
class Overlaps:
    """Jaccard overlaps at one p with one seed: what any τ groups by."""

    title: str
    tasks: list[str]
    jaccard: list[list[float]]
    chance: float
    taus: list[float]  # absolute thresholds that the sweep tried here


@dataclass(frozen=True)
class Reuse:
    """One stage: outputs that separate runs would have made, those made, and their work in seconds."""

    stage: str
    needed: int
    made: int
    seconds_needed: float
    seconds_made: float


@dataclass(frozen=True)
class SweepData:
    """Everything the sweep's report shows."""

    name: str
    sweep_yaml: str
    best_yaml: str
    keep: str  # whose weights are there: best | all | scores (none)
    space: dict[str, list[Any]]  # field → values that were tried, ascending where they are numbers
    method: str
    seeds: list[int]
    confidence: float
    model: str  # the one that is judged
    objectives: list[tuple[str, int]]  # figure, and 1 where more is better, −1 where less is
    tasks: list[str]
    metrics: dict[str, str]
    trials: list[TrialRow]
    references: dict[str, dict[str, Estimate]]  # θ0 and probes, as TrialRow.figures
    overlaps: list[Overlaps]
    reuse: list[Reuse]
    points: int
    started: str
    best_model: str = ""  # its folder, where its weights are kept
    reported: Scorecard | None = None  # on the rows that the search never saw
    learning: list[str] = field(default_factory=list)  # sentences on tasks that their own probe did not learn


def remaking(model: str) -> str:
    """The command that makes the judged model of a config again."""
    return {"final": "run", "fused": "evaluate"}[model]


def judged(data: SweepData, trial: TrialRow, figure: str) -> Estimate | None:
    """A figure of a trial's judged model; None where the trial did not come so far."""
    return trial.figures.get(data.model, {}).get(figure) if trial.status == "done" else None


def trials_at(data: SweepData, point: Mapping[str, Any]) -> list[TrialRow]:
    """Trials with a point that has these values; several where the space has more fields."""

    def holds(fields: Mapping[str, Any]) -> bool:
        return all(fields[name] == value for name, value in point.items())

    return [trial for trial in data.trials if any(map(holds, trial.points))]


def trial_at(data: SweepData, point: Mapping[str, Any], figure: str | None = None) -> TrialRow | None:
    """The best of `trials_at` by a figure (default: the first objective), else the first of them."""
    trials = trials_at(data, point)
    name = figure or data.objectives[0][0]
    scored = [(trial, estimate) for trial in trials if (estimate := judged(data, trial, name)) is not None]
    if not scored:
        return trials[0] if trials else None
    return max(scored, key=lambda pair: _sign(data, name) * pair[1].mean)[0]


def values_at(data: SweepData, figure: str, point: Mapping[str, Any]) -> Estimate | None:
    """A figure where the fields have these values; the best over fields that `point` leaves open."""
    trial = trial_at(data, point, figure)
    return judged(data, trial, figure) if trial is not None else None


def _sign(data: SweepData, figure: str) -> int:
    return dict(data.objectives).get(figure, -1 if less_is_better(figure) else 1)


def best_trial(data: SweepData) -> TrialRow | None:
    """The finished trial with the best mean of the first objective; of equals the first."""
    figure, sign = data.objectives[0]
    scored = [(trial, estimate) for trial in data.trials if (estimate := judged(data, trial, figure)) is not None]
    return max(scored, key=lambda pair: sign * pair[1].mean)[0] if scored else None


def pareto_front(data: SweepData) -> list[TrialRow]:
    """Finished trials that no other one beats in one objective without losing in another."""
    vectors = {}
    for trial in data.trials:
        estimates = [judged(data, trial, figure) for figure, _ in data.objectives]
        if all(estimate is not None for estimate in estimates):
            pairs = zip(estimates, data.objectives, strict=True)
            vectors[trial.number] = [sign * estimate.mean for estimate, (_, sign) in pairs if estimate is not None]
    return [
        trial
        for trial in data.trials
        if (own := vectors.get(trial.number)) is not None
        and not any(_dominates(other, own) for other in vectors.values())
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)
