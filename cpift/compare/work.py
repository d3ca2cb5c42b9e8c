"""A comparison: every method with every seed, through the stages and artifacts of ordinary runs.

Work is put together across methods and seeds. Probes, regions and groups come first, for budgets follow from them; then
every fine-tune from θ0 side by side; fusions; integrations; and the scores of every model on the run's test rows. What
two methods share is one artifact and made once, so the same command after a crash goes on, and a longer list of
methods costs only what is new.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.compare.budgets import Budgets
from cpift.compare.config import Comparison, of_training
from cpift.compare.files import RUN_FILE
from cpift.compare.methods import ComparedMethod, Entry, methods_of, seconds_of
from cpift.compare.record import Header, Record, Row, kept_scores
from cpift.config.loading import dump_config
from cpift.console.view import View, quiet
from cpift.data.tasks import count_examples
from cpift.devices import device_name
from cpift.disk.artifacts import Artifact, package_versions, source_commit
from cpift.disk.top_files import write_top
from cpift.errors import ConfigError, Problem
from cpift.evaluation.retention import chance_of
from cpift.evaluation.scores import Score, read_scores
from cpift.pipeline.engine import Engine, KeepsModels, NoEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork, Wanted
from cpift.pipeline.stages.fuse import add_card
from cpift.pipeline.stages.handover import ToScore, score_each
from cpift.pipeline.stages.names import ModelRef
from cpift.report.facts import tokens_of

_UNGROUPED = ("base", "probe", "probes", "arrived")  # models that no groups have a part in
WantedScores = tuple[Artifact, ModelRef, Pipeline]


def run_comparison(comparison: Comparison, engine: Engine, view: View) -> Record:
    """Make whatever is missing and return what was found. Raises what a fine-tune, a fusion or an evaluation raises."""
    work = ComparisonWork(comparison, engine, view)
    work.make()
    return work.record()


class ComparisonWork:
    """All methods with all seeds, less those (method, seed) that somebody has a record of already: nothing is made for
    them alone. Raises ConfigError if that leaves nothing."""

    def __init__(self, comparison: Comparison, engine: Engine, view: View, known: Collection[tuple[str, int]] = ()):
        self.comparison, self.view = comparison, view
        self._merging = engine.merging.telling(view.note) if engine.merging else None
        self.entries = [
            Entry(method, self._pipeline(method, seed))
            for seed in comparison.seeds
            for method in methods_of(comparison)
            if (method.name, seed) not in known
        ]
        seeds = dict.fromkeys(entry.run.config.seed for entry in self.entries)
        if not seeds:
            raise ConfigError(comparison.name, [Problem("seeds", "the record has every method with each of them")])
        self.full_runs = {seed: Pipeline(comparison.run({}, seed), NoEngine(self._merging), quiet()) for seed in seeds}
        self.shared = SharedWork([*self.full_runs.values(), *(entry.run for entry in self.entries)], engine, view)

    def _pipeline(self, method: ComparedMethod, seed: int) -> Pipeline:
        comparison, fields = self.comparison, method.fields
        if method.arriving is not None:  # between models of the whole run
            return Pipeline(comparison.run({}, seed), NoEngine(self._merging), quiet())
        config = comparison.pair(fields, seed, method.pair) if method.pair else comparison.run(fields, seed)
        return Pipeline(config, NoEngine(self._merging), quiet())

    def make(self) -> None:
        """Everything, in order; what is there is not made again."""
        self.prepare()
        self.train()
        self.arrive()
        self.fuse()
        self.integrate()
        self.score_fused()
        self.score()

    def prepare(self) -> None:
        """Probes, regions and groups of all runs, and then the budgets of plain SFT."""
        self.shared.prepare()
        budgets = Budgets()
        with self.view.stage(f"budgets of {sum(entry.method.judged == 'sft' for entry in self.entries)} baselines"):
            for place, entry in enumerate(self.entries):
                entry.plan(budgets)
                self.view.progress(
                    {"title": "budgets", "done": (place + 1) / len(self.entries), "task": entry.method.name}
                )

    def train(self) -> None:
        """Everything that starts from θ0: plain SFT of every order, and staged backbones."""
        wanted = _each_once(fit for entry in self.entries if (fit := entry.sft_fit()) is not None)
        runs = [
            entry.run for entry in self.entries if entry.needs_backbone and entry.run.config.backbone_source == "staged"
        ]
        self.shared.train("baselines and backbones", _each_once([*wanted, *self.shared.backbones(runs)]))

    def arrive(self) -> None:
        """What goes on from a probe: fine-tunes on a task that arrives after it, and averages of before and after."""
        arriving = [(entry.run, one) for entry in self.entries if (one := entry.method.arriving) is not None]
        self.shared.train("fine-tunes on tasks that arrive", _each_once(one.wanted(run) for run, one in arriving))
        for run, one in arriving:
            one.average(run)

    def fuse(self) -> None:
        """Fusions one after the other, in this process; less those that are only scored."""
        held = [entry.fused().path for entry in self._only_scored()]
        entries = [entry for entry in self.entries if entry.needs_fusion and entry.fused().path not in held]
        with self.view.stage(f"fusions of {len(entries)} models"):
            for place, entry in enumerate(entries):
                entry.run.fuse()
                self.view.progress({"title": "fusions", "done": (place + 1) / len(entries), "task": entry.method.name})

    def _only_scored(self) -> list[Entry]:
        """Fusions whose weights nothing else reads, each once: they are made in memory, where they are scored.

        On one machine alone, whose memory is known; and of methods and rules that are loaded everywhere.
        """
        if self.comparison.base.resources.on_cluster:
            return []
        fusing = [entry for entry in self.entries if entry.needs_fusion]
        read = {entry.fused().path for entry in fusing if entry.needs_integration}
        found = {entry.fused().path: entry for entry in fusing if not entry.run.artifacts.code("fusion.")}
        return [entry for path, entry in found.items() if path not in read and self._scored_alike(entry)]

    def _scored_alike(self, entry: Entry) -> bool:
        """Whether its own run names its scores as the comparison does."""
        ((scored, model, _),) = self._scorings(entry)
        return scored.path == entry.run.artifacts.evaluate(model).path

    def score_fused(self) -> None:
        """The fusions that are only scored: nothing of them is written but their scores, records and hashes."""
        several, held = len(self.full_runs) > 1, []
        for entry in self._only_scored():
            name = f"{entry.method.name} (seed {entry.run.config.seed})" if several else entry.method.name
            held.append(ToScore(entry.run, name, self._remake(entry)))
        if held:
            write_top(self.comparison.base.output_dir, {RUN_FILE: dump_config(self.comparison.base)})
            with self._models_kept(held):
                score_each(Pipeline(held[0].run.config, self.shared.engine, self.view), held)

    @contextmanager
    def _models_kept(self, held: Sequence[ToScore]) -> Iterator[None]:
        """Several of them read the same models, which the engine may keep meanwhile."""
        engine = self.shared.engine
        if len(held) == 1 or not isinstance(engine, KeepsModels):
            yield
            return
        with engine.keeping(list(self.full_runs.values()), self.view) as staying:
            for one in held:
                one.run.merging = staying(self._merging)
            try:
                yield
            finally:
                for one in held:
                    one.run.merging = self._merging

    def _remake(self, entry: Entry) -> str:
        """What writes the weights of an entry's fused model."""
        values = {**entry.method.fields, "seed": entry.run.config.seed}
        command = ["cpift", "fuse", str(self.comparison.base.output_dir / RUN_FILE)]
        return shlex.join([*command, *(f"--set={name}={value}" for name, value in values.items())])

    def integrate(self) -> None:
        wanted, owners = [], {}
        for entry in self.entries:
            if (fit := entry.integration()) is not None:
                wanted.append(fit)
                owners[fit[0].path] = entry

        def finish(artifact: Artifact, out: Path) -> None:
            owner = owners[artifact.path]
            add_card(owner.run, "final", owner.groups, artifact, out)

        self.shared.train("integrations", _each_once(wanted), finish)

    def score(self) -> None:
        """Every model on every task of the whole run, also where it was trained on two of them."""
        wanted: dict[Path, WantedScores] = {}
        for entry in self.entries:
            for scoring in self._scorings(entry):
                wanted.setdefault(scoring[0].path, scoring)
        self.shared.score("models", list(wanted.values()))

    def _scorings(self, entry: Entry) -> list[WantedScores]:
        run = self.full_runs[entry.run.config.seed]
        if entry.method.judged == "probes":
            models = list(run.artifacts.tuned.values())
        else:
            title = entry.method.name if entry.method.judged == "probe" else entry.method.judged
            models = [ModelRef.of(title, entry.artifacts()[-1])]
        return [(run.artifacts.evaluate(model), model, run) for model in models]

    # ---- what was found ----------------------------------------------------------------------------------------------

    def record(self) -> Record:
        """What is finished: all of it after `make`, less where that was stopped."""
        done = self.done
        return Record(
            self._header([seed for seed in self.full_runs if self._has(done, seed)]), list(map(self._row, done))
        )

    @property
    def done(self) -> list[Entry]:
        """The entries that have their scores."""
        return [entry for entry in self.entries if self._finished(entry)]

    def _finished(self, entry: Entry) -> bool:
        if entry.method.judged not in _UNGROUPED and not entry.groups:
            return False  # stopped before there was a plan
        return all(artifact.complete for artifact, _, _ in self._scorings(entry))

    @staticmethod
    def _has(done: Sequence[Entry], seed: int) -> bool:
        return any(entry.run.config.seed == seed for entry in done)

    def _row(self, entry: Entry) -> Row:
        method, artifacts = entry.method, entry.artifacts()
        return Row(
            method=method.name,
            kind=method.kind,
            seed=entry.run.config.seed,
            budget=method.budget,
            pair=method.pair,
            fields={**method.fields, **(of_training(entry.run.config, method.training) if method.training else {})},
            groups=[list(group) for group in entry.groups],
            tokens=tokens_of(artifacts),
            seconds=round(seconds_of(artifacts), 1),
            scores=kept_scores(self._scores(entry)),
        )

    def _scores(self, entry: Entry) -> dict[str, Score]:
        """By task; of the probes as one method each task's own."""
        of_models = [read_scores(artifact.path) for artifact, _, _ in self._scorings(entry)]
        if entry.method.judged != "probes":
            return dict(of_models[0])
        return {
            task.name: scores[task.name] for task, scores in zip(self.comparison.base.tasks, of_models, strict=True)
        }

    def _header(self, seeds: Sequence[int]) -> Header:
        comparison, first = self.comparison, next(iter(self.full_runs.values()))
        every_method = comparison.config.model_copy(update={"methods": ("*",)})
        return Header(
            name=comparison.name,
            config=_without_paths(comparison.base.model_dump(mode="json", exclude_none=True, exclude={"output"})),
            comparison=comparison.config.model_dump(mode="json", exclude_none=True, exclude={"run", "output", "fixed"}),
            tasks={task.name: task.metric_name for task in comparison.base.tasks},
            seeds=list(seeds),
            parameters=Checkpoint(first.artifacts.base.path).numel,
            versions=package_versions(),
            device=_device(first),
            commit=source_commit(),
            confidence=comparison.config.confidence,
            resamples=comparison.config.resamples,
            overlaps=[self._overlap(self.full_runs[seed]) for seed in seeds],
            methods=[method.name for method in methods_of(replace(comparison, config=every_method))],
            chance=self._chance(),
            train_rows={task.name: count_examples(task.train_data) for task in comparison.base.tasks},
        )

    def _chance(self) -> dict[str, float]:
        """What guessing scores, of the tasks where that is known."""
        scored = next((self._scores(entry) for entry in self.done), {})
        return {task: chance for task, score in scored.items() if (chance := chance_of(score)) is not None}

    def _overlap(self, run: Pipeline) -> dict[str, Any]:
        grouping = run.group()
        jaccard = [[round(value, 5) for value in row] for row in grouping.jaccard.tolist()]
        groups = [list(group) for group in grouping.groups]
        return {"seed": run.config.seed, "jaccard": jaccard, "chance": grouping.chance, "groups": groups}


def _device(run: Pipeline) -> str:
    """What θ0 was scored on."""
    scored = run.artifacts.evaluate(run.artifacts.base)
    return str(scored.manifest()["device"]) if scored.complete else device_name()


def _each_once(wanted: Iterable[Wanted]) -> list[Wanted]:
    by_path: dict[Path, Wanted] = {}
    for item in wanted:
        by_path.setdefault(item[0].path, item)
    return list(by_path.values())


def _without_paths(node: Any) -> Any:
    """A config whose absolute paths have become file names: a record is read on other machines."""
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_without_paths(value) for value in node]
    return Path(node).name if isinstance(node, str) and node.startswith("/") else node
