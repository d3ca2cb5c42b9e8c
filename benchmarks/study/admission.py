"""Which tasks of the fair trial count (protocol.md, Admission): decided once, from the record of development seeds.

A task counts if with every development seed its own probe is better than θ0 and, of a choice, better than guessing,
each by the whole 95 % interval over test rows. The decision and its reasons are kept in the record's header; records of
test seeds carry the same. A task that is not admitted stays in every table and is in no mean and no contrast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpift.compare.record import BASE, PROBES, Record
from cpift.evaluation.estimates import Estimate, weighted_mean
from cpift.evaluation.metrics import metric_of

CONFIDENCE = 0.95
LEAST = 3  # admitted tasks that a kind needs to have a contrast
Admission = dict[str, dict[str, Any]]  # by task: `admitted`, and `reasons`, a sentence a seed and comparison


def decided(record: Record, seeds: Sequence[int]) -> Admission:
    """What these development seeds show of every task. The record must have θ0 and the probes with each."""
    return {task: _of_task(record, task, metric, seeds) for task, metric in record.header.tasks.items()}


def _of_task(record: Record, task: str, metric: str, seeds: Sequence[int]) -> dict[str, Any]:
    by_seed = {(row.method, row.seed): row.scores[task]["items"] for row in record.rows if row.method in (BASE, PROBES)}
    chance, found = record.header.chance.get(task), list[tuple[str, Estimate]]()
    for seed in seeds:
        probe, base = by_seed[PROBES, seed], by_seed[BASE, seed]
        found.append((f"seed {seed}, probe less θ0", _gain(probe, base, metric)))
        if chance is not None:
            found.append((f"seed {seed}, probe less guessing", _gain(probe, [chance] * len(probe), metric)))
    reasons = [f"{what}: {_shown(gain, metric)}" for what, gain in found]
    return {"admitted": all(gain.low is not None and gain.low > 0 for _, gain in found), "reasons": reasons}


def _gain(own: Sequence[Any], other: Sequence[Any], metric: str) -> Estimate:
    """By how much the first is better, row by row."""
    if metric_of(metric).by_loss:
        gains = [before[0] - after[0] for after, before in zip(own, other, strict=True)]
        return weighted_mean(gains, [tokens for _, tokens in own], CONFIDENCE)
    return weighted_mean([one - two for one, two in zip(own, other, strict=True)], [1] * len(own), CONFIDENCE)


def _shown(gain: Estimate, metric: str) -> str:
    scale, digits, unit = (1, 3, "nats") if metric_of(metric).by_loss else (100, 1, "points")
    if gain.low is None or gain.high is None:
        return f"{scale * gain.mean:+.{digits}f} {unit}, no interval"
    middle, low, high = (f"{scale * value:+.{digits}f}" for value in (gain.mean, gain.low, gain.high))
    return f"{middle} [{low}, {high}] {unit}"


def admitted(admission: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tasks that count."""
    return [task for task, one in admission.items() if one["admitted"]]


def told(admission: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task."""
    return [
        f"{task}: {'admitted' if one['admitted'] else 'not admitted'}; {'; '.join(one['reasons'])}"
        for task, one in admission.items()
    ]
