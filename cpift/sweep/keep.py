"""Which trials' weights a sweep keeps: of the models that only one trial needs, those of the best config by default.

A model of a trial is dropped once it is scored, no trial that is still to come has it among its own, and none of the
best so far has. A fused model that no trial integrates is not even written, but for the best one at the end. What
trials share (θ0, probes, backbones) is never dropped, nor what another sweep or run has made.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from cpift.config.loading import Fields
from cpift.config.run import RunConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import digest
from cpift.errors import entry
from cpift.pipeline.outcomes import INTEGRATES, benchmark_figures, benchmarked, known_scores, own_models
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages.names import ModelRef
from cpift.sweep.config import KEEPS, Sweep
from cpift.sweep.objectives import figures
from cpift.sweep.record import Attempt, sweep_record
from cpift.sweep.scores import remaking

Runs = Sequence[Pipeline]


def hands_over(sweep: Sweep) -> bool:
    """Whether trials score their fused models in memory: none is integrated, not all are kept, and lm-eval, which reads
    folders, scores none."""
    every = entry(KEEPS, sweep.config.keep, "keep").every or sweep.config.benchmarks is not None
    return not every and not entry(INTEGRATES, sweep.config.model, "model")


@dataclass(frozen=True)
class _Ended:
    """A trial that has ended. `value`: its first objective, more is better; −inf where it was stopped before."""

    fields: Fields
    runs: Runs
    value: float


class Keeper:
    """Told of every trial that ends, it drops the weights that need not be kept."""

    def __init__(self, sweep: Sweep, pipeline: Callable[[RunConfig], Pipeline], to_come: Sequence[Fields] | None):
        """`to_come`: the points of trials that will run; None where a search chooses them as it goes."""
        self._sweep, self._pipeline, self._maker = sweep, pipeline, sweep_record(sweep).name
        self._to_come = None if to_come is None else {digest(fields): self._runs(fields) for fields in to_come}
        self._ended: dict[str, _Ended] = {}
        self.freed = 0  # bytes

    def ended(self, fields: Fields) -> None:
        """A trial ended, by itself or stopped early. Don't tell of one that failed: it will be tried again."""
        if entry(KEEPS, self._sweep.config.keep, "keep").every:
            return
        self._add(fields)
        if self._to_come is not None:
            self._to_come.pop(digest(fields), None)
        # Later trials of a search may integrate the same fused model with other settings.
        self._drop({"final"} if self._to_come is None else {"fused", "final"}, of_equals=None)

    def finish(self, attempts: Sequence[Attempt]) -> None:
        """All trials have ended; of equally good ones the first of these is the best."""
        if entry(KEEPS, self._sweep.config.keep, "keep").every:
            return
        self._to_come, self._ended = {}, {}
        for attempt in attempts:
            if attempt.status != "failed":
                self._add(attempt.points[0])
        self._drop({"fused", "final"}, of_equals=1)

    def to_write(self) -> Runs:
        """After `finish`: the best trial's runs whose fused models were scored and never written."""
        if not hands_over(self._sweep):
            return []
        runs = [run for ended in self._best()[:1] for run in ended.runs]
        return [run for run in runs if not own_models(run, "fused")["fused"].has_weights]

    def _add(self, fields: Fields) -> None:
        runs = self._runs(fields)
        self._ended[digest(fields)] = _Ended(fields, runs, self._value(runs))

    def _runs(self, fields: Fields) -> Runs:
        return [self._pipeline(self._sweep.run(fields, seed)) for seed in self._sweep.seeds]

    def _value(self, runs: Runs) -> float:
        model, objective = self._sweep.config.model, self._sweep.config.objectives[0]
        by_run: list[Mapping[str, float]] = []
        for run in runs:
            scores = known_scores(run, model)
            of_benchmarks = benchmark_figures(run, model, self._sweep.benchmarks)
            names = [task.name for task in run.config.tasks]
            by_run += [] if scores is None else [figures(scores, names, model) | of_benchmarks]
        if len(by_run) < len(runs) or not all(objective.figure in by_name for by_name in by_run):
            return -math.inf
        return objective.sign * mean(by_name[objective.figure] for by_name in by_run)

    def _drop(self, titles: set[str], of_equals: int | None) -> None:
        """`of_equals`: how many of equally good trials keep their weights."""
        spared = {
            artifact.path for runs in (self._to_come or {}).values() for run in runs for _, artifact in self._own(run)
        }
        for ended in self._best()[:of_equals]:
            spared |= {artifact.path for run in ended.runs for _, artifact in self._own(run)}
        for ended in self._ended.values():
            for run in ended.runs:
                for title, artifact in self._own(run):
                    if title in titles and artifact.path not in spared and self._may_go(run, title, artifact):
                        self.freed += artifact.drop_weights(remake_command(self._sweep, ended.fields, run.config.seed))

    def _own(self, run: Pipeline) -> Iterable[tuple[str, Artifact]]:
        return own_models(run, self._sweep.config.model).items()

    def _may_go(self, run: Pipeline, title: str, artifact: Artifact) -> bool:
        scored = artifact.complete and run.artifacts.evaluate(ModelRef.of(title, artifact)).complete
        wanted = self._sweep.benchmarks if title == self._sweep.config.model else None
        scored = scored and (wanted is None or benchmarked(run, title, wanted).complete)
        return scored and artifact.manifest().get("made_for") == self._maker

    def _best(self) -> list[_Ended]:
        best = max((ended.value for ended in self._ended.values()), default=-math.inf)
        none = not entry(KEEPS, self._sweep.config.keep, "keep").best or best == -math.inf
        return [] if none else [ended for ended in self._ended.values() if ended.value == best]


def remake_command(sweep: Sweep, fields: Fields, seed: int) -> str:
    """What makes the weights of a trial's models again."""
    values = {**fields, "seed": seed}
    command = ["cpift", remaking(sweep.config.model), str(sweep.base.output_dir / "best.yaml")]
    return shlex.join([*command, *(f"--set={name}={value}" for name, value in values.items())])
