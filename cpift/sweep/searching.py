"""How points of a sweep's space are chosen, and on which rows.

Rows that a search never sees decide what is reported: the best of many looks too good where it was chosen. Of Optuna's
searches also the study, which may lie on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cpift.config.identity import identity
from cpift.config.inputs import DataSource, Holdout, Seed
from cpift.config.needs import absent_extra
from cpift.config.run import RunConfig, Section
from cpift.config.tasks import TaskConfig, side_of
from cpift.data.tasks import count_examples
from cpift.errors import ConfigError, CpiftError, Problem, entry
from cpift.text.redaction import redacted

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study

    from cpift.evaluation.standard import Benchmarks


@dataclass(frozen=True)
class SearchKind:
    """What `search.method` may be."""

    grids: bool = False  # without `samples` it tries every combination
    draws: bool = False  # it takes `samples`
    stops_early: bool = False
    as_it_goes: bool = False  # a point follows from the results before it


SEARCHES = {
    "grid": SearchKind(grids=True),
    "random": SearchKind(draws=True),
    "asha": SearchKind(grids=True, draws=True, stops_early=True),
    "optuna": SearchKind(draws=True, as_it_goes=True),
}


@dataclass(frozen=True)
class Sampler:
    """What `search.sampler` may be: the name of Optuna's class. numbers: it knows ranges and one objective alone."""

    name: str
    numbers: bool = False


SAMPLERS = {"tpe": Sampler("TPESampler"), "cmaes": Sampler("CmaEsSampler", numbers=True)}


class Search(Section):
    """How points of the space are chosen."""

    method: Literal["grid", "random", "asha", "optuna"] = Field(
        "grid",
        **identity("sweep"),
        description="grid: every combination; random: `samples` of them; asha: as random (without `samples` as grid), "
        "and the worse ones stop early; optuna: each point is chosen in the light of those before (extra `optuna`)",
    )
    samples: int | None = Field(
        None, **identity("sweep"), ge=1, description="points to try; for grid it follows from the space"
    )
    seed: Seed = Field(0, **identity("sweep"), description="of the choice of points")
    reduction: int = Field(
        2,
        **identity("sweep"),
        ge=2,
        description="asha: of so many trials that reach a rung, one goes on",
    )

    sampler: Literal["tpe", "cmaes"] | None = Field(
        None,
        **identity("sweep", absent=None),
        description="optuna's: tpe (default), for lists, ranges and several objectives; cmaes (extra `cmaes`), for "
        "ranges and one objective",
    )
    storage: str | None = Field(
        None,
        **identity(absent=None),
        description="optuna: where its study is kept, for example sqlite:///study.db (from the working directory); "
        "optuna-dashboard shows it, and a search whose folder is lost goes on from it",
    )

    @property
    def kind(self) -> SearchKind:
        return entry(SEARCHES, self.method, "search.method")

    @model_validator(mode="after")
    def _samples_given(self) -> Search:
        if not self.kind.draws and self.samples is not None:
            raise ValueError("a grid tries every combination: leave `samples` out, or use method: random")
        if not self.kind.grids and self.samples is None:
            raise ValueError(f"method {self.method} needs `samples`, the number of points to try")
        given = [name for name in ("sampler", "storage") if getattr(self, name) is not None]
        if given and not self.kind.as_it_goes:
            raise ValueError(f"{' and '.join(given)}: of method optuna alone; leave it out, or use method: optuna")
        if self.storage is not None and not re.match(r"\w[\w+]*://", self.storage):
            raise ValueError(f"storage {self.storage!r} is no URL; for a file write sqlite:///{self.storage}")
        return self


# ---- standard benchmarks ---------------------------------------------------------------------------------------------


class BenchmarksConfig(Section):
    """Standard benchmarks that every trial's judged model is scored on, by lm-eval (the extra `eval`)."""

    tasks: tuple[str, ...] = Field(
        **identity("sweep", absent=None), min_length=1, max_length=16, description="lm-eval's names, for example gsm8k"
    )
    folder: Path | None = Field(
        None, **identity("sweep", absent=None), description="of lm-eval YAML files of your own, from the file's folder"
    )
    limit: int | None = Field(None, **identity("sweep", absent=None), ge=1, description="rows of each task at most")
    shots: int | None = Field(
        None,
        **identity("sweep", absent=None),
        ge=0,
        description="examples before a question; default: the task's",
    )
    chat: bool = Field(
        False, **identity("sweep", absent=False), description="put prompts through the model's chat template"
    )
    batch_size: int = Field(8, **identity("sweep", absent=8), ge=1, description="rows scored at once")

    def below(self, folder: Path) -> BenchmarksConfig:
        """The same with a folder that does not depend on where one is."""
        return self if self.folder is None else self.model_copy(update={"folder": (folder / self.folder).resolve()})

    def wanted(self, base: RunConfig) -> Benchmarks:
        """What lm-eval is to run, for trials of a run."""
        from cpift.evaluation.standard import Benchmarks

        gpu = base.resources.gpus_per_worker > 0
        return Benchmarks(self.tasks, self.folder, self.limit, self.shots, self.chat, self.batch_size, gpu)

    def problems(self, base: RunConfig) -> list[Problem]:
        """Why trials of a run could not be scored so; lm-eval itself is not loaded."""
        found = absent_extra("eval", "lm-eval", "benchmarks")
        if self.folder is not None and not self.folder.is_dir():
            found.append(Problem("benchmarks.folder", f"{self.folder} is no folder", "check the path"))
        if base.resources.by_train or base.resources.on_cluster:
            what = (
                "are scored in the trials' own processes, and these hold no CPUs on a cluster or with several workers"
            )
            found.append(Problem("benchmarks", what, "leave them out, or sweep on one machine with one worker a fit"))
        return found


# ---- rows that the search never sees ---------------------------------------------------------------------------------


class ReportRows(Section):
    """Rows that the search never sees: on them the best config, the run as it stands, θ0 and the fine-tunes are scored
    in the end."""

    share: float = Field(0.5, **identity("sweep", absent=0.5), gt=0, lt=1, description="of each task's test rows")
    seed: Seed = Field(0, **identity("sweep", absent=0), description="decides which rows")
    tests: dict[str, DataSource] = Field(
        **identity("sweep", by="their rows"),
        default_factory=dict,
        description="by task, other rows to report on; the search then has all rows of the task's `test`",
    )

    def below(self, folder: Path) -> ReportRows:
        """With files of `tests` from this folder on."""
        files = {task: source.file for task, source in self.tests.items()}
        tests = {
            task: source if (file := files[task]) is None else source.model_copy(update={"file": folder / file})
            for task, source in self.tests.items()
        }
        return self.model_copy(update={"tests": tests})


@dataclass(frozen=True)
class Sides:
    """Test rows by task, where they are not all that the task has."""

    searched: Mapping[str, DataSource]
    reported: Mapping[str, DataSource]


def sides_of(report: ReportRows | None, tasks: Sequence[TaskConfig]) -> Sides:
    """Which rows are searched and which are reported on; reads them. Raises ConfigError, DataError, HubError."""
    if report is None:
        return Sides({}, {})
    held = {task.name: _held(report, task) for task in tasks if task.name not in report.tests}
    sides = {
        side: {task.name: side_of(task.test_data, held[task.name], side) for task in tasks if task.name in held}
        for side in (False, True)
    }
    return Sides(sides[False], {**sides[True], **report.tests})


def _held(report: ReportRows, task: TaskConfig) -> Holdout:
    count = count_examples(task.test_data)
    if count < 2:
        remedy = f"give more, or report.tests.{task.name}"
        raise ConfigError("report", [Problem(f"tasks.{task.name}.test", "has one row, which cannot be split", remedy)])
    return Holdout(rows=min(max(round(report.share * count), 1), count - 1), seed=report.seed)


def on(rows: Mapping[str, DataSource], run: RunConfig) -> RunConfig:
    """The run with these test rows."""
    tasks = tuple(task.on(rows[task.name]) if task.name in rows else task for task in run.tasks)
    return run.model_copy(update={"tasks": tasks})


def unknown_tests(report: ReportRows | None, tasks: Sequence[TaskConfig]) -> list[Problem]:
    """Rows to report on of tasks that there are not."""
    known = [task.name for task in tasks]
    named = report.tests if report is not None else {}
    there_are = f"the run has {', '.join(known)}"
    return [Problem(f"report.tests.{task}", "there is no such task", there_are) for task in named if task not in known]


# ---- Optuna --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptunaStudy:
    """A search's study. storage: None where it is kept in memory. signs: of the objectives, 1 where more is better."""

    name: str
    storage: BaseStorage | None
    sampler: BaseSampler
    signs: Sequence[int]

    def opened(self) -> Study:
        """The study on disk, made if it is not there."""
        import optuna

        return optuna.create_study(
            storage=self.storage,
            sampler=self.sampler,
            study_name=self.name,
            directions=["maximize" if sign > 0 else "minimize" for sign in self.signs],
            load_if_exists=True,
        )

    def tried(self, close: bool) -> list[Mapping[str, Any]]:
        """The points of the trials that finished, of a study on disk. close: trials that a killed search left open."""
        from optuna.trial import TrialState

        if self.storage is None:
            return []
        study = self.opened()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if close else ():
            study.tell(trial.number, state=TrialState.FAIL)
        return [trial.params for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]


def optuna_study(search: Search, name: str, figures: Sequence[tuple[str, int]]) -> OptunaStudy:
    """The study of a search. figures: the objectives with their signs. Raises CpiftError where its storage cannot be
    used."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage, before = (None, 0) if search.storage is None else _opened(search.storage, name)
    sampler = getattr(optuna.samplers, entry(SAMPLERS, search.sampler or "tpe", "search.sampler").name)
    # What is drawn at random after a kill must not be what was drawn before it.
    return OptunaStudy(name, storage, sampler(seed=search.seed + before), [sign for _, sign in figures])


def _opened(url: str, name: str) -> tuple[BaseStorage, int]:
    """Where a study is kept, and how many trials it has there."""
    import optuna

    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(url)
        known = {study.study_name: study.n_trials for study in optuna.get_all_study_summaries(storage)}
    except Exception as error:  # what SQLAlchemy, its drivers and Optuna raise
        remedy = "check the URL, its folder and its driver"
        raise CpiftError(f"search.storage {redacted(url)}: {error} → {remedy}") from None
    return storage, known.get(name, 0)
