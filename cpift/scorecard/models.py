"""What is scored: models as arguments name them, as a run's config whose tasks are the tests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpift.checkpoints.lora_config import ADAPTER_CONFIG
from cpift.checkpoints.opening import locate, pinned
from cpift.config.inputs import CheckpointConfig, ModelConfig
from cpift.config.loading import dump_fields, parse_config
from cpift.config.run import RunConfig
from cpift.errors import ConfigError, Problem
from cpift.init.given_tests import GivenTest, given_tests, scoring_fields
from cpift.merge_folder import given_source
from cpift.models.sources import load_tokenizer, source_of

SUBJECT = "scores"
FOLDER = Path("runs/scores")
_SETTINGS = ("evaluation.", "resources.", "model.chat_template")


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
    sources = {title: given_source(title, where, problems) for title, where in models.items()}
    origin = None if base is None else given_source("base", base, problems)
    if problems:
        raise ConfigError(SUBJECT, problems)
    if base is not None and origin is not None:
        sources = {"base": origin, **sources}
    given = {title: pinned(CheckpointConfig.model_validate(source)) for title, source in sources.items()}
    first = origin or _first_whole(given)
    stated = {name: value for name, value in (settings or {}).items() if name.startswith(_SETTINGS)}
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
