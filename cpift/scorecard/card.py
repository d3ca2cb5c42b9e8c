"""What models scored on the tests, as plain data: figures with intervals, retention, and what the rows show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cpift.evaluation.estimates import Estimate
from cpift.evaluation.metrics import described
from cpift.evaluation.retention import (
    alike_half,
    difference,
    judged,
    larger_is_better,
    learning_of,
    measured,
    probe_of,
    sentences,
)
from cpift.evaluation.scores import Score, finite
from cpift.evaluation.verdict import Share, share_of


@dataclass(frozen=True)
class Scorecard:
    """Scores by model, in the order shown, and test. base: the model that the others were tuned from, if it is there.

    own: by test the fine-tune whose score is retention's whole; empty where no model is a fine-tune of a test.
    chosen: tests whose own fine-tune is the best on these very rows, for none has the test's name.
    """

    name: str
    tests: Mapping[str, str]  # by name, what its rows are
    scores: Mapping[str, Mapping[str, Score]]
    base: str | None = None
    own: Mapping[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    merged: str | None = None
    config: str = ""  # what was scored, as YAML
    beside: tuple[str, ...] = ()  # models that the merge is compared with too, over all tests at once as well

    @property
    def models(self) -> list[str]:
        return list(self.scores)

    @cached_property
    def as_run(self) -> dict[str, Mapping[str, Score]]:
        """The scores under the titles that a run's models have: `base` and each test's own `probe`."""
        titled = {probe_of(test): self.scores[model] for test, model in self.own.items()}
        titled |= {"base": self.scores[self.base]} if self.base is not None else {}
        return {**self.scores, **titled}

    @cached_property
    def judged(self) -> list[str]:
        """The tests that means are over: of an own fine-tune that learnt its task."""
        return judged(learning_of(list(self.own), self.as_run))

    def measured(self, model: str, test: str) -> Estimate:
        """Score from 0 to 1, or loss in nats per answer token."""
        return measured(self.scores[model][test])

    def retention(self, model: str) -> Share | None:
        """The mean over judged tests; None where there are none."""
        return share_of(self.as_run, model, self.judged) if self.judged else None

    @property
    def rival(self) -> str:
        """The model that others are compared with: the base, else the first."""
        return self.base if self.base is not None else self.models[0]

    def sentences(self) -> list[str]:
        """What the rows show of the merge, or of every model, and where they show no difference."""
        said = [self._kept()] if self.merged is not None and self.judged else []
        compared = [self.merged] if self.merged is not None else [model for model in self.models if model != self.rival]
        for model in compared:
            said.append(self._against(model, self.rival, dict.fromkeys(self.tests, self.rival)))
        if self.merged is not None and self.own:
            said.append(self._against(self.merged, "each test's own fine-tune", self.own))
        for other in self.beside:
            for model in compared:
                said += [*self._over_all(model, other), self._against(model, other, dict.fromkeys(self.tests, other))]
        return said

    def _over_all(self, model: str, other: str) -> Iterator[str]:
        """What the rows show of mean retention."""
        one, two = self.retention(model), self.retention(other)
        if one is None or two is None:
            return
        gap = one.minus(two)
        word = {1: "is better than", -1: "is worse than", 0: "shows no difference from"}[gap.sign]
        half = "" if gap.half is None else f" ±{100 * gap.half:.1f}"
        yield f"By mean retention {model} {word} {other} ({100 * gap.mean:+.1f}{half} points)."

    def warnings(self) -> list[str]:
        """What has to be said before any mean."""
        said = sentences(learning_of(list(self.own), self.as_run)) if self.own else []
        if self.chosen:
            said.append(
                f"No fine-tune has the name of {' or '.join(self.chosen)}: retention there is of the best of them on "
                "these rows."
            )
        return said + [
            f"{model} computes NaN or Inf on {', '.join(tests)}: its weights hold some, or overflow."
            for model, tests in self._not_finite().items()
        ]

    def _not_finite(self) -> dict[str, list[str]]:
        """The tests of which a model's loss is no number, whatever its replies score."""
        found = {
            model: [test for test, score in tests.items() if not math.isfinite(score["loss"])]
            for model, tests in self.scores.items()
        }
        return {model: tests for model, tests in found.items() if tests}

    def _kept(self) -> str:
        assert self.merged is not None
        parts = [f"{self.merged} keeps {shown_share(self.retention(self.merged))}"]
        parts += [f"{self.base} {shown_share(self.retention(self.base))}"] if self.base is not None else []
        of = f"{len(self.judged)} of {len(self.tests)}" if len(self.judged) < len(self.tests) else str(len(self.judged))
        return f"{', '.join(parts)} of what the fine-tunes themselves score (mean of {of} tests)."

    def _against(self, model: str, name: str, rivals: Mapping[str, str]) -> str:
        signs: dict[str, list[str]] = {}
        for test, rival in rivals.items():
            one, other = self.scores[model][test], self.scores[rival][test]
            word, figure = outcome(one, other)
            signs.setdefault(word, []).append(f"{test} ({figure})")
        parts = [f"{word} {', '.join(tests)}" for word, tests in signs.items()]
        return f"{model} against {name}: {'; '.join(parts)}."

    def summary(self) -> dict[str, Any]:
        """The card in figures, for machines."""
        return {
            "name": self.name,
            "tests": dict(self.tests),
            "base": self.base,
            "merged": self.merged,
            "own": dict(self.own),
            "models": {model: dict(self._figures(model)) for model in self.models},
            "said": [*self.warnings(), *self.sentences()],
        }

    def _figures(self, model: str) -> Iterator[tuple[str, Any]]:
        share = self.retention(model)
        yield "mean_retention", None if share is None else share.mean
        yield "mean_retention_half_interval", None if share is None else share.half
        scores: dict[str, Any] = {}
        for test in self.tests:
            figure, score = self.measured(model, test), self.scores[model][test]
            plain = {name: score[name] for name in ("metric", "score", "loss", "tokens", "rows")}
            scores[test] = finite(plain | {"low": figure.low, "high": figure.high})
        yield "scores", scores


def outcome(one: Score, other: Score) -> tuple[str, str]:
    """What the rows show of `one` beside `other`, paired by row, and the difference with its interval."""
    gain = difference(one, other)
    by_loss = described(one).by_loss
    scale, digits, unit = (1, 3, "nats") if by_loss else (100, 1, "points")
    if gain is None or gain.low is None or gain.high is None:
        better = larger_is_better(one) - larger_is_better(other)
        return "too few rows to say on", f"{scale * better:+.{digits}f} {unit}"
    # Rows that all differ alike would make it certain: see `retention.measured`.
    alike = alike_half(one["rows"]) if gain.low == gain.high and not by_loss else 0.0
    least, most = gain.low - alike, gain.high + alike
    middle, low, high = (f"{scale * value:+.{digits}f}" for value in (gain.mean, least, most))
    word = "better on" if least > 0 else "worse on" if most < 0 else "no difference shown on"
    return word, f"{middle} [{low}, {high}] {unit}"


def shown_share(share: Share | None) -> str:
    """A retention in percent and half of its interval."""
    if share is None:
        return "–"
    return f"{100 * share.mean:.1f} %" + ("" if share.half is None else f" ±{100 * share.half:.1f}")
