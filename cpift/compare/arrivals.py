"""Tasks that arrive one after another: how the model of A's probe learns B, as artifacts of the run.

From A's probe one fine-tune on B, as long as B's own probe, at a learning rate and under one control: what is held or
pulled back, and which of A's rows go along. `keep` then averages its weights with those before it, without training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.opening import MOMENTS
from cpift.compare.config import Arrival, ArrivalMethod, Comparison
from cpift.config.fusion import FusionConfig
from cpift.config.training import TrainingConfig
from cpift.disk.artifacts import Artifact
from cpift.disk.files import link_or_copy
from cpift.errors import Problem, entry
from cpift.merging.base import FusionInputs, Materials
from cpift.merging.engine import merge
from cpift.merging.registry import method_named
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import Wanted
from cpift.pipeline.stages import regions
from cpift.pipeline.stages.fits import fit_spec, training_fields
from cpift.pipeline.stages.names import ModelRef
from cpift.training.spec import StageSpec

STAGE, VERSION = "arrival", 1


@dataclass(frozen=True)
class Control:
    """What `arrival.methods.hold` means: a key of `method.held.HELD`, and whose core it is made of."""

    holds: str
    core_of: Callable[[str, str], tuple[str, ...]]


CONTROLS = {
    "none": Control("cores", lambda first, second: ()),
    "core": Control("cores", lambda first, second: (first,)),
    "random": Control("random", lambda first, second: (first,)),
    "others": Control("others", lambda first, second: (second,)),
    "half": Control("half", lambda first, second: ()),
    "all": Control("all", lambda first, second: ()),
}


@dataclass(frozen=True)
class Arriving:
    """One method on A → B at one learning rate."""

    label: str
    method: ArrivalMethod
    pair: tuple[str, str]
    learning_rate: float

    @property
    def name(self) -> str:
        """What tables and records call it."""
        return f"{self.label} {self.learning_rate:g}: {self.pair[0]} → {self.pair[1]}"

    @property
    def fields(self) -> dict[str, Any]:
        """What a record keeps of it."""
        described = self.method.model_dump(mode="json", exclude_defaults=True)
        return {"arrival": self.label, "learning_rate": self.learning_rate} | described

    # ---- names of what is made ---------------------------------------------------------------------------------------

    def artifacts(self, run: Pipeline) -> list[Artifact]:
        """Everything that is trained or made for it, in order."""
        probes = run.artifacts.probes
        before = [probes[self.pair[0]]]
        if self._control.core_of(*self.pair):
            before += [probes[self.pair[1]], regions.artifact(run.artifacts)]
        return [*before, self._fit(run), *([self._mean(run)] if self.method.keep else [])]

    def _fit(self, run: Pipeline) -> Artifact:
        names, (first, second), method = run.artifacts, self.pair, self.method
        training = self._training(run)
        own = run.config.resources.overridden(run.config.task(second).resources)
        inputs = {"before": names.probes[first].fingerprint} | {
            f"data {task}": names.train_rows(task) for task in self._tasks
        }
        if self._control.core_of(first, second):
            inputs["regions"] = regions.artifact(names).fingerprint
        fields = training_fields(names, "probe", training, own.threads, own) | {"pair": list(self.pair)}
        fields |= method.model_dump(mode="json", exclude={"keep"}, exclude_defaults=True)
        return names.artifact(STAGE, VERSION, inputs, fields, f"{first}-{second}")

    def _mean(self, run: Pipeline) -> Artifact:
        names, (first, second) = run.artifacts, self.pair
        inputs = {"before": names.probes[first].fingerprint, "after": self._fit(run).fingerprint}
        return names.artifact(STAGE, VERSION, inputs, {"keep": self.method.keep}, f"{first}-{second}-mean")

    def _training(self, run: Pipeline) -> TrainingConfig:
        """As long as a probe's, however many tasks give rows."""
        changes = {"learning_rate": self.learning_rate, "keep_moments": False, "steps_per": "stage"}
        return run.config.probe_training.model_copy(update=changes)

    @property
    def _control(self) -> Control:
        return entry(CONTROLS, self.method.hold, "hold")

    @property
    def _tasks(self) -> tuple[str, ...]:
        """Whose rows are trained on."""
        return self.pair if self.method.replay else self.pair[1:]

    # ---- work --------------------------------------------------------------------------------------------------------

    def wanted(self, run: Pipeline) -> Wanted:
        """The fine-tune."""
        names, (first, second), method, artifact = run.artifacts, self.pair, self.method, self._fit(run)
        before = ModelRef.of(f"probe {first}", names.probes[first])
        training = self._training(run)
        core_of = self._control.core_of(first, second)
        stage = StageSpec(self._tasks, core_of)
        own = run.config.resources.overridden(run.config.task(second).resources)
        spec = replace(
            fit_spec(names, self.name, before, training, (stage,), artifact),
            resources=own,
            threads=own.threads,
            logs=names.root / "logs" / re.sub(r"[^\w.-]+", "-", self.name),
            regions=regions.artifact(names).path if core_of else None,
            holds=self._control.holds,
            penalty=method.penalty,
            moments=before.path / MOMENTS if method.weighted else None,
            shares={first: method.replay} if method.replay else None,
        )
        return artifact, spec, run

    def average(self, run: Pipeline) -> None:
        """Make the mean of the weights before and after, where there is one."""
        if not self.method.keep:
            return
        mean, (before, after) = self._mean(run), (run.artifacts.probes[self.pair[0]].path, self._fit(run).path)

        def build(out: Path) -> None:
            base = Checkpoint(run.artifacts.base.path)
            inputs = FusionInputs(base, base, {"before": Checkpoint(before), "after": Checkpoint(after)}, out, ())
            inputs.check()
            config = FusionConfig(method="linear", weights={"before": self.method.keep, "after": 1 - self.method.keep})
            method = method_named("linear").make(Materials(inputs, config, 0, lambda wanted: []))
            shards = mean.work_dir / "shards"
            shards.mkdir(parents=True, exist_ok=True)
            merge(method, base, shards, mean.fingerprint, shard_size=config.shard_size)
            for path in sorted(shards.iterdir()):
                if not path.name.startswith("."):
                    link_or_copy(path, out / path.name)

        run.make(mean, self.name, build, [before, after])


def arriving(arrival: Arrival | None) -> Iterator[Arriving]:
    """Every method on every pair at every learning rate."""
    for pair in arrival.pairs if arrival is not None else ():
        for label, method in arrival.methods.items() if arrival is not None else ():
            for rate in arrival.learning_rates if arrival is not None else ():
                yield Arriving(label, method, pair, rate)


def arrival_problems(comparison: Comparison) -> Iterator[Problem]:
    """What the run lacks for a method, or trains in a form that nothing can be held in."""
    arrival, training = comparison.config.arrival, comparison.base.probe
    if arrival is None or training is None:
        return
    for label, method in arrival.methods.items():
        where = f"arrival.methods.{label}"
        if method.weighted and not training.keep_moments:
            what = "is by the second moments of A's probe, and probe.keep_moments is false"
            yield Problem(f"{where}.weighted", what, "set fixed: {probe.keep_moments: true}")
        if method.hold != "none" and training.lora is not None:
            what = "no mask can hold single elements of W + s·B·A, and the probes are trained with lora"
            yield Problem(f"{where}.hold", what, "leave probe.lora out")
