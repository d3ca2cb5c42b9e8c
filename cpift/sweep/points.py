"""Which points of a sweep's space are tried, and which of them come to the same models and so are one trial."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cpift.config.loading import Fields, Value, describe
from cpift.errors import ConfigError, Problem
from cpift.pipeline.outcomes import outcome
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import field_problems
from cpift.sweep.config import Range, Sweep, SweepConfig


@dataclass(frozen=True)
class Trial:
    """Points of the space with the same outcome, and the runs (one a seed) that give it."""

    points: tuple[Fields, ...]
    runs: tuple[Pipeline, ...]

    @property
    def fields(self) -> Fields:
        """The first of its points."""
        return self.points[0]


def choose_points(config: SweepConfig) -> list[Fields]:
    """Every point that is tried, where that is known beforehand (all methods but optuna); none twice."""
    return list(_grid(config) if config.search.samples is None else _random(config, config.search.samples))


def check_points(sweep: Sweep, stage: str) -> None:
    """Raise ConfigError for points whose fields cannot be done, such as a backbone to train where there are no rows, or
    cores by second moments that probes do not keep.

    Of a range, and where the search chooses as it goes, each value of a field alone is looked at.
    """
    listed = {name: values for name, values in sweep.config.space.items() if not isinstance(values, Range)}
    points: list[Fields] = [{name: value} for name, values in listed.items() for value in values]
    if sweep.config.search.method != "optuna":
        points = choose_points(sweep.config)
    where: dict[Problem, Fields] = {}
    for point in points:
        config = sweep.plain(point, sweep.seeds[0])
        for problem in field_problems(config, stage):
            where.setdefault(problem, point)
    if where:
        problems = [replace(problem, what=f"{problem.what} (at {describe(at)})") for problem, at in where.items()]
        raise ConfigError(f"sweep {sweep.name}", problems)


def _grid(config: SweepConfig) -> Iterator[Fields]:
    lists = [list(dict.fromkeys(values)) for values in config.space.values() if not isinstance(values, Range)]
    for values in itertools.product(*lists):
        yield dict(zip(config.space, values, strict=True))


def _random(config: SweepConfig, samples: int) -> Iterator[Fields]:
    """Independent draws; one that was there before is drawn again, until the space seems to hold no more."""
    source, seen = random.Random(config.search.seed), set[tuple[Value, ...]]()
    for _ in range(20 * samples):
        point = {name: _draw(values, source) for name, values in config.space.items()}
        if len(seen) < samples and tuple(point.values()) not in seen:
            seen.add(tuple(point.values()))
            yield point


def _draw(values: Sequence[Value] | Range, source: random.Random) -> Value:
    if not isinstance(values, Range):
        return source.choice(values)
    if values.log:
        value = math.exp(source.uniform(math.log(values.low), math.log(values.high)))
    else:
        value = source.uniform(values.low, values.high)
    return round(value) if values.integer else float(f"{value:.4g}")  # as many digits as a table shows


def group_points(points: Sequence[Fields], runs: Sequence[Sequence[Pipeline]], model: str) -> list[Trial]:
    """Trials in the order of their first points. `runs`: each point's pipelines, one a seed, groups already made;
    model: the one that is judged."""
    by_outcome: dict[tuple[str, ...], list[int]] = {}
    for place, pipelines in enumerate(runs):
        by_outcome.setdefault(tuple(outcome(run, model).fingerprint for run in pipelines), []).append(place)
    return [Trial(tuple(points[i] for i in places), tuple(runs[places[0]])) for places in by_outcome.values()]
