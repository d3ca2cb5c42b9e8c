"""Score given models: what was scored before on the same rows in the same way is read, not scored again."""

from __future__ import annotations

from collections.abc import Mapping

from cpift.console.view import View
from cpift.disk.locks import exclusive
from cpift.disk.top_files import SCORES_FILES
from cpift.evaluation.retention import larger_is_better
from cpift.evaluation.scores import Score
from cpift.pipeline.engine import Engine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.preflight import examined
from cpift.pipeline.stages import evaluate
from cpift.scorecard.card import Scorecard
from cpift.scorecard.models import ToScore


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
