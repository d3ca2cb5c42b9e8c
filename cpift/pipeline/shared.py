"""What trials share, made once before the first of them starts: probes, core regions, groups, backbones, their scores.

Work is put together across all runs of a sweep (points × seeds): distinct fine-tunes run side by side, and regions of
all p come from one pass over the checkpoints. Each output is the artifact that a single run would make and find.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpift.checkpoints.opening import model_files
from cpift.console.view import View
from cpift.devices import device_name
from cpift.disk.artifacts import Artifact, claimed, require_sound
from cpift.disk.files import digest, link_or_copy
from cpift.disk.input_watch import noted
from cpift.evaluation.scores import Evaluation
from cpift.pipeline.engine import Engine, Finish, keep_scores, train_all
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.stages import backbone, evaluate, order, probe, regions
from cpift.pipeline.stages.names import Groups, ModelRef
from cpift.training.spec import FitSpec

Wanted = tuple[Artifact, FitSpec, Pipeline]


class SharedWork:
    """The shared stages of many runs, each for all of them at once."""

    def __init__(self, runs: Sequence[Pipeline], engine: Engine, view: View):
        self.runs, self.engine, self.view = runs, engine, view

    def prepare(self) -> None:
        """θ0, probes, regions and groups: what decides which points are one trial."""
        for run in _distinct(self.runs, lambda run: run.artifacts.base.fingerprint):
            base = run.pretrained()
            first = run.artifacts.probes.values() or [run.artifacts.evaluate(run.artifacts.base)]
            if not all(artifact.complete for artifact in first):
                probe.check_data(run, base)
        self._probes()
        grouped = [run for run in self.runs if regions.wanted(run.config)]
        self._regions(grouped)
        for run in grouped:
            run.group()

    def complete(self, runs: Sequence[Pipeline]) -> None:
        """Backbones, and the scores of everything that several trials compare themselves with."""
        self.train("staged backbones", self.backbones(runs))
        self._scores(runs)

    def _probes(self) -> None:
        wanted: dict[Path, Wanted] = {}
        for run in _distinct(self.runs, lambda run: [probed.fingerprint for probed in run.artifacts.probes.values()]):
            base = run.pretrained()
            for artifact, spec in zip(run.artifacts.probes.values(), probe.specs(run, base), strict=True):
                wanted.setdefault(artifact.path, (artifact, spec, run))
        self.train("probes", list(wanted.values()))

    def backbones(self, runs: Sequence[Pipeline]) -> list[Wanted]:
        """The staged backbones of these runs, each once."""
        wanted: dict[Path, Wanted] = {}
        for run in runs:
            groups = run.group().groups if regions.wanted(run.config) else ()
            artifact = run.artifacts.backbone(groups)
            if artifact is not None and artifact.path not in wanted:
                wanted[artifact.path] = (artifact, titled_backbone(run, groups, artifact), run)
        return list(wanted.values())

    def train(self, title: str, wanted: Sequence[Wanted], finish: Finish = lambda artifact, out: None) -> None:
        """Make what is missing: runs that ask for other resources one after the other, all others side by side."""
        missing = [entry for entry in wanted if not entry[0].has_weights]
        if not missing:
            if wanted:
                self.view.cached(f"{len(wanted)} {title}")
            return
        several = len({run.config.seed for _, _, run in missing}) > 1
        for resources in dict.fromkeys(run.config.resources for _, _, run in missing):
            chosen = [entry for entry in missing if entry[2].config.resources == resources]
            specs = [
                replace(spec, title=f"{spec.title} (seed {run.config.seed})") if several else spec
                for _, spec, run in chosen
            ]
            artifacts = [artifact for artifact, _, _ in chosen]
            train_all(self.engine, self.view, f"{len(chosen)} {title}", artifacts, specs, finish)

    def _regions(self, grouped: Sequence[Pipeline]) -> None:
        """Families of runs whose regions differ in p alone are selected together."""
        families: dict[str, dict[Path, Pipeline]] = {}
        for run in grouped:
            artifact = run.artifacts.regions
            fields = {name: value for name, value in artifact.fields.items() if name != "p"}
            families.setdefault(digest([dict(artifact.inputs), fields]), {}).setdefault(artifact.path, run)
        for family in families.values():
            self._select(list(family.values()))

    def _select(self, runs: Sequence[Pipeline]) -> None:
        with claimed((run.artifacts.regions for run in runs if not run.artifacts.regions.complete), self.view.warn):
            missing = {
                run.config.regions.p: run.artifacts.regions for run in runs if not run.artifacts.regions.complete
            }
            if not missing:
                self.view.cached(f"core regions for {len(runs)} p")
                return
            first = runs[0]
            first.merging = first.merging.telling(self.view.note) if first.merging else None
            require_sound(regions.read(first.artifacts), first.root, self.view.warn)
            with self.view.stage(f"core regions for {len(missing)} p, one pass (seed {first.config.seed})"):
                started = time.time()
                folders = {p: artifact.work_dir / "regions" for p, artifact in missing.items()}
                for folder in folders.values():
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir(parents=True)
                regions.select(first, folders)
                share = (time.time() - started) / len(missing)
                for p, artifact in missing.items():
                    with artifact.build(device_name(), share) as out:
                        for path in folders[p].iterdir():
                            link_or_copy(path, out / path.name)

    def _scores(self, runs: Sequence[Pipeline]) -> None:
        wanted: dict[Path, tuple[Artifact, ModelRef, Pipeline]] = {}
        for run in runs:
            run.pretrained()
            for model in order.models(run.artifacts, run.known(), *order.FIRST):
                artifact = run.artifacts.evaluate(model)
                wanted.setdefault(artifact.path, (artifact, model, run))
        self.score("shared models", list(wanted.values()))

    def score(self, title: str, wanted: Sequence[tuple[Artifact, ModelRef, Pipeline]]) -> None:
        """Make the scores that are missing; `wanted` names no artifact twice."""
        missing = [entry for entry in wanted if not entry[0].complete]
        if not missing:
            self.view.cached(f"scores of {len(wanted)} {title}")
            return
        with (
            claimed((artifact for artifact, _, _ in missing), self.view.warn),
            self.view.stage(f"scores of {len(missing)} {title}"),
        ):
            self._score([entry for entry in missing if not entry[0].complete])

    def _score(self, entries: Sequence[tuple[Artifact, ModelRef, Pipeline]]) -> None:
        titled = {
            f"{model.title} [{artifact.fingerprint[:6]}]": (artifact, model, run) for artifact, model, run in entries
        }

        def keep(title: str, result: Evaluation) -> None:
            keep_scores(titled[title][0], result, changes[title])

        changes = {title: noted(model_files(model.path)) for title, (_, model, _) in titled.items()}
        if entries:
            require_sound((model.path for _, model, _ in entries), entries[0][0].root, self.view.warn)
            scorings = [
                evaluate.scoring(
                    run, title, evaluate.loadable(run, model, scored), evaluate.results(run, model, scored)
                )
                for title, (scored, model, run) in titled.items()
            ]
            self.engine.evaluate(scorings, keep, self.view.progress)


def titled_backbone(run: Pipeline, groups: Groups, artifact: Artifact) -> FitSpec:
    """The fine-tune from θ0 that goes over these groups, named after them: several may run side by side."""
    spec = backbone.spec(run, run.pretrained(), groups, artifact)
    return replace(spec, title=f"{spec.title} {' | '.join(' '.join(group) for group in groups)}")


def _distinct(runs: Iterable[Pipeline], key: Callable[[Pipeline], Any]) -> list[Pipeline]:
    """One run for each distinct key."""
    by_key: dict[str, Pipeline] = {}
    for run in runs:
        by_key.setdefault(digest(key(run)), run)
    return list(by_key.values())
