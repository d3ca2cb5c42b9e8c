"""Where fine-tunes and evaluations run, and what becomes of what they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from cpift.checkpoints.opening import model_files
from cpift.config.run import ResourcesConfig, TaskConfig
from cpift.config.tasks import EvaluationConfig
from cpift.console.progress import OnProgress
from cpift.console.view import View
from cpift.data.use import use_sentences
from cpift.disk.artifact_state import make_folder, set_aside
from cpift.disk.artifacts import Artifact, claimed, require_sound
from cpift.disk.files import is_json, link_or_copy, write_json
from cpift.disk.input_watch import noted
from cpift.errors import ChangedInput, CpiftError, Problem
from cpift.evaluation.scores import SCORES, Evaluation, OnResult
from cpift.training.spec import RESULT, FitSpec, read_training
from cpift.training.speed import keep_speed

if TYPE_CHECKING:
    from cpift.merging.engine import Merging
    from cpift.merging.in_memory import MergeInMemory

_PARTS = 8  # each of which loads the model
Finish = Callable[[Artifact, Path], None]  # adds to what a fine-tune exported before its artifact is complete


@dataclass(frozen=True)
class Scoring:
    """A model to be scored on every task, as a FitSpec is one to be trained. `resources`: what it may use.

    merge: what makes its weights, where `path` has none. kept: where results of rows are put as they come. part: k of
    n, which is scored and kept, and nothing else.
    """

    title: str
    path: Path
    tasks: tuple[TaskConfig, ...]
    settings: EvaluationConfig
    resources: ResourcesConfig
    merge: MergeInMemory | None = None
    kept: Path | None = None
    part: tuple[int, int] | None = None


def in_parts(scorings: Sequence[Scoring], workers: int) -> tuple[list[Scoring], list[Scoring]]:
    """Work that keeps so many workers busy to the end: whole models while each has one, the others in parts; and those
    others, to be scored once their parts are kept."""
    cut = [scoring for scoring in scorings if scoring.kept is not None and scoring.merge is None]
    cut = cut[len(cut) - len(scorings) % workers :] if len(scorings) % workers else []
    parts = min(workers // len(cut), _PARTS) if cut else 1
    if parts == 1:
        return list(scorings), []
    whole = [scoring for scoring in scorings if scoring not in cut]
    return whole + [replace(scoring, part=(part, parts)) for scoring in cut for part in range(parts)], cut


def name_of(scoring: Scoring) -> str:
    """Of a model or of a part of it, for those who do several at once."""
    return (
        scoring.title if scoring.part is None else f"{scoring.title}, part {scoring.part[0] + 1} of {scoring.part[1]}"
    )


class Engine(Protocol):
    """Where fine-tunes and evaluations run. Each says itself what it needs, so one engine serves any number of runs."""

    merging: Merging | None  # where regions and fusions run, if not in this process

    def session(self) -> AbstractContextManager[None]:
        """Keep one connection over several stages."""

    def expect(self, specs: Sequence[FitSpec]) -> None:
        """These follow within this session: what takes its time to start may start now."""

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        """Run every FitSpec, `resources.parallel` of the first at once; each leaves its model in its `export`."""

    def evaluate(self, scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
        """Score every model; a result, by title, is as `Evaluation` has it."""


@runtime_checkable
class KeepsModels(Protocol):
    """An engine that may keep models in memory from one of several merges of them to the next."""

    def keeping(
        self, runs: Sequence[Any], view: View
    ) -> AbstractContextManager[Callable[[Merging | None], Merging | None]]:
        """What makes of how these runs merge how they merge meanwhile."""


class NoEngine:
    """The engine of runs in which nothing is trained or scored."""

    def __init__(self, merging: Merging | None = None):
        self.merging = merging

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def expect(self, specs: Sequence[FitSpec]) -> None:
        raise CpiftError("this command trains nothing")

    def fit(self, specs: Sequence[FitSpec], on_progress: OnProgress) -> None:
        raise CpiftError(f"{', '.join(spec.title for spec in specs)}: this command trains nothing")

    def evaluate(self, scorings: Sequence[Scoring], on_result: OnResult, on_progress: OnProgress) -> None:
        raise CpiftError(f"{', '.join(scoring.title for scoring in scorings)}: this command scores nothing")


def keep_scores(artifact: Artifact, result: Evaluation, changes: Callable[[], Sequence[Problem]]) -> None:
    """Complete an evaluation with its result: `scores`, `seconds`, `device`, and `data`, what the rows were that it
    read; `changes` of the model meanwhile. Raises ChangedInput where model or rows are not what it is named by."""
    with artifact.build(result["device"], result["seconds"]) as out:
        if problems := changes():
            raise ChangedInput(artifact.title, problems)
        for task, value in result.get("data", {}).items():
            if artifact.inputs[f"data {task}"] != value:
                what = "the rows that were read are not those that were there when the command began"
                raise ChangedInput(artifact.title, [Problem(f"tasks.{task}.test", what, "run it again")])
        write_json(out / SCORES, result["scores"])


def train_all(
    engine: Engine,
    view: View,
    title: str,
    artifacts: Sequence[Artifact],
    specs: Sequence[FitSpec],
    finish: Finish = lambda artifact, out: None,
) -> None:
    """Run the fine-tunes that export for these artifacts, and complete each one that ended."""
    with claimed(artifacts, view.warn):
        wanted = {artifact.work_dir / "export": artifact for artifact in artifacts if not artifact.has_weights}
        chosen = [spec for spec in specs if spec.export in wanted]
        for export in wanted:
            if (export / RESULT).is_file() and not is_json(export / RESULT):
                warn = f"{export} is damaged ({RESULT}): set aside as {set_aside(export).name}, trained again"
                view.warn(warn)
        if not chosen:  # other processes made them while this one waited
            return
        for spec in chosen:
            make_folder(spec.logs.parent, spec.logs.parents[1], view.warn)
        read = [folder for spec in chosen for folder in (spec.model, spec.regions) if folder is not None]
        require_sound(read, artifacts[0].root, view.warn)
        with view.stage(title, [spec.title for spec in chosen]):
            changes = noted(file for folder in read for file in model_files(folder))
            try:
                engine.fit(chosen, view.progress)
            finally:  # a failed one does not cost the others
                if problems := changes():
                    for artifact in wanted.values():
                        artifact.discard_work()
                    raise ChangedInput(title, problems)
                for export, artifact in wanted.items():
                    if (export / RESULT).is_file():
                        _note_speed(chosen, export)
                        with artifact.compared(view.warn):
                            _adopt(artifact, export, finish, view)


def _note_speed(specs: Sequence[FitSpec], export: Path) -> None:
    """For `plan`; of a fine-tune that was trained in this call."""
    for spec in specs:
        if spec.export == export:
            keep_speed(spec, read_training(export))


def _adopt(artifact: Artifact, export: Path, finish: Finish, view: View) -> None:
    """Complete an artifact with the files that a fine-tune exported."""
    trained = read_training(export)
    for sentence, warns in use_sentences(trained.get("title", artifact.title), trained.get("rows", ())):
        (view.warn if warns else view.note)(sentence)
    with artifact.build(trained["device"], trained["seconds"]) as out:
        for path in sorted(export.iterdir()):
            link_or_copy(path, out / path.name)  # not moved: a crash here must leave the export whole
        finish(artifact, out)
