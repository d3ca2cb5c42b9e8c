"""Models that are there already, scored on rows that are given: `cpift evaluate MODEL… --test`, `cpift merge … --test`.

They are scored as a run's models are: the tests are the tasks of its config. What was scored before on the same rows in
the same way is read, not scored again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.opening import locate, pinned
from cpift.config.inputs import CheckpointConfig, ModelConfig, Name
from cpift.config.loading import dump_fields, parse_config
from cpift.config.run import RunConfig
from cpift.console.view import View
from cpift.disk.locks import exclusive
from cpift.disk.top_files import SCORES_FILES
from cpift.errors import ConfigError, Problem
from cpift.evaluation.retention import larger_is_better
from cpift.evaluation.scores import Score
from cpift.init.given_tests import GivenTest, given_tests, scoring_fields
from cpift.merge_folder import given_source
from cpift.models.sources import load_tokenizer, source_of
from cpift.pipeline.engine import Engine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import examined
from cpift.pipeline.stages import evaluate
from cpift.scorecard.card import Scorecard

SUBJECT = "scores"
FOLDER = Path("runs/scores")
SETTINGS = ("evaluation.", "resources.", "model.chat_template")


@dataclass(frozen=True)
class ToScore:
    """Models by title, and the config that says on what and how. base: the title of the model behind the others."""

    config: RunConfig
    models: Mapping[str, CheckpointConfig]
    tests: Sequence[GivenTest]
    base: str | None = None
    merged: str | None = None

    def with_merged(self, title: str, folder: Path) -> ToScore:
        """The same with a model that has been merged."""
        models = {**self.models, title: CheckpointConfig(path=folder)}
        return ToScore(self.config, models, self.tests, self.base, title)

    @property
    def yaml(self) -> str:
        """For people, what was scored on what."""
        models = {title: str(source.path or source.hub) for title, source in self.models.items()}
        tests = {test.name: test.fields for test in self.tests}
        settings = self.config.evaluation.model_dump(mode="json", exclude_defaults=True)
        return dump_fields({"models": models, "tests": tests, "evaluation": settings})


def to_score(
    models: Mapping[str, str | os.PathLike[str]],
    tests: Sequence[str],
    *,
    base: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    output: Path = FOLDER,
    reserved: Sequence[str] = (),
) -> ToScore:
    """Models by title (folders, adapters of `base`, hub ids) and tests as `NAME=FILE`; files are looked at.

    settings: by dotted name, of the sections `evaluation` and `resources` of a run, and `model.chat_template`.
    reserved: titles that no model may have. Raises ConfigError with all that is wrong with models, or with tests.
    """
    problems: list[Problem] = []
    taken = [*reserved, *(["base"] if base is not None else [])]
    for title in (title for title in models if title in taken):
        problems.append(Problem(title, "is the name of another model here", "name it apart: NAME=MODEL"))
    problems += [problem for title in models for problem in _no_name(title)]
    sources = {title: given_source(title, where, problems) for title, where in models.items()}
    origin = None if base is None else given_source("base", base, problems)
    if problems:
        raise ConfigError(SUBJECT, problems)
    if base is not None and origin is not None:
        sources = {"base": origin, **sources}
    given = {title: pinned(CheckpointConfig.model_validate(source)) for title, source in sources.items()}
    first = origin or _first_whole(given)
    stated = {name: value for name, value in (settings or {}).items() if name.startswith(SETTINGS)}
    found = given_tests(tests, _tokenizer(first, stated.get("model.chat_template")))
    raw = {
        "name": SUBJECT,
        "model": first,
        # A task has a fine-tune: here nothing is made of it, and the first model is as good as any.
        "tasks": [{"name": test.name, "checkpoint": first, **test.fields} for test in found],
        "backbone": {"source": "pretrained"},
        "evaluation": scoring_fields(found),
    }
    config = parse_config(raw, Path.cwd(), SUBJECT, changes={**stated, "output": str(output.absolute())})
    return ToScore(config, given, found, "base" if base is not None else None)


def _no_name(title: str) -> list[Problem]:
    """Why files and tables cannot have it for a name."""
    try:
        TypeAdapter(Name).validate_python(title)
    except ValidationError as error:
        what = error.errors()[0]["msg"].removeprefix("Value error, ")
        return [Problem(f"{title!r:.70}", f"names a model: {what}", "name it otherwise: NAME=MODEL")]
    return []


def _first_whole(models: Mapping[str, CheckpointConfig]) -> dict[str, str]:
    """The first of the models, none of which may be an adapter: of what, nobody said."""
    adapters = [title for title, source in models.items() if (locate(source) / ADAPTER_CONFIG).is_file()]
    if adapters:
        remedy = "name the model that it adapts: --base MODEL"
        raise ConfigError(SUBJECT, [Problem(title, "is an adapter", remedy) for title in adapters])
    return next(iter(models.values())).model_dump(mode="json", exclude_none=True)


def _tokenizer(source: dict[str, str], template: str | None) -> Any:
    model = ModelConfig.model_validate(source | ({"chat_template": template} if template else {}))
    return source_of(model).tokenizer() or load_tokenizer(locate(model), model)


def check(asked: ToScore, download: bool = True) -> list[str]:
    """What is worth knowing before anything is scored. Raises ConfigError with everything wrong."""
    return list(examined(asked.config, stage="evaluate", download=download, writes=SCORES_FILES).notes)


def score(asked: ToScore, engine: Engine, view: View) -> Scorecard:
    """The card of these models. A killed scoring goes on with the models that have no scores yet."""
    run = Pipeline(asked.config, engine, view)
    models = [run.artifacts.input_model(title, title, source) for title, source in asked.models.items()]
    with exclusive(run.root), view.recorded(run.root, "evaluate", [evaluate.TITLE]), run.session():
        scores = run.evaluate(models)
    own, chosen = _own(asked, scores)
    tests = {test.name: f"{test.summary}; {test.guess.metric}: {test.guess.why}" for test in asked.tests}
    return Scorecard(
        asked.merged or asked.config.name, tests, scores, asked.base, own, tuple(chosen), asked.merged, asked.yaml
    )


def _own(asked: ToScore, scores: Mapping[str, Mapping[str, Score]]) -> tuple[dict[str, str], list[str]]:
    """By test the fine-tune of its name; of a merge with none the best fine-tune on its rows, and which tests these
    are."""
    tuned = [title for title in asked.models if title not in (asked.base, asked.merged)]
    named = {test.name: test.name for test in asked.tests if test.name in tuned}
    if asked.merged is None:
        return (named if len(named) == len(asked.tests) else {}), []
    chosen = [test.name for test in asked.tests if test.name not in named]
    best = {test: max(tuned, key=lambda title: larger_is_better(scores[title][test])) for test in chosen}
    return {test.name: {**named, **best}[test.name] for test in asked.tests}, chosen
