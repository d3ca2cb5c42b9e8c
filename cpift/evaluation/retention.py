"""Retention: what a model keeps of what each task's own probe learnt. The one definition, of runs, sweeps, comparisons.

    of a task           its score ÷ its own probe's; where the metric is the loss, the probe's loss ÷ its loss
    mean, worst task    over the judged tasks: those that their own probe learnt
    learnt              the probe is better than θ0 on the task's metric and, of a choice, better than guessing, and
                        scores at least 5 %; with several seeds their mean does, and the probe scored something
                        with each

By point estimates: intervals over a few dozen rows would leave out nearly every task. A task whose gain over θ0 is not
beyond its interval is judged, and a sentence says that the gain is not shown. The 5 % are there because the quotient of
two scores near 0 is any number: one right reply more of 25 would double what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpift.evaluation.estimates import Estimate, weighted_mean
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.scores import Score

DEFINITION = (
    "Retention is score ÷ the own probe's score, of a loss the other way round; means and the worst task are over the "
    "tasks whose own probe is better than θ0 and, of a choice, than guessing, and scores at least 5 %."
)
DECIDED = (
    "Retention is score ÷ the own probe's score, of a loss the other way round; means and the worst task are over the "
    "tasks that were admitted on other seeds, before these were scored."
)
LEAST = 0.05  # a probe's score below which its task is not judged; losses have no such bound
_CONFIDENCE = 0.95


def retained(own: np.ndarray, probe: np.ndarray) -> np.ndarray:
    """Retention, of values where larger is better (losses negated); NaN where what divides is 0."""
    above, below = np.where(probe < 0, probe, own), np.where(probe < 0, own, probe)
    ratios: np.ndarray = np.divide(above, below, out=np.full_like(own, np.nan), where=below != 0)
    return ratios


@dataclass(frozen=True)
class Learning:
    """What a task's own probe learnt, in values where larger is better: scores, or negated losses."""

    task: str
    metric: str
    probe: float
    base: float | None  # θ0; None where it was not scored
    chance: float | None = None  # what guessing scores
    gain: Estimate | None = None  # over θ0; None where rows are not at hand
    always: bool = True  # whether the probe scored something with every seed
    decided: str | None = None  # beforehand: why the task is not judged, "" if it is; None: by what is here

    @property
    def left_out(self) -> str:
        """Why the task is not judged; empty where it is."""
        if self.decided is not None:
            return self.decided
        if self.base is not None and self.probe <= self.base:
            return f"probe {self._shown(self.probe)}, θ0 {self._shown(self.base)}"
        if self.chance is not None and self.probe <= self.chance:
            return f"probe {self._shown(self.probe)}, guessing {self._shown(self.chance)}"
        if not metric_of(self.metric).by_loss and self.probe < LEAST:
            return f"probe {self._shown(self.probe)}, less than {100 * LEAST:g} %"
        return "" if self.always and self.probe != 0 else "its probe scored nothing with some seed"

    @property
    def not_shown(self) -> str:
        """Of a judged task, the interval of the gain where that holds 0; else empty."""
        if self.left_out or self.gain is None or self.gain.low is None or self.gain.high is None or self.gain.low > 0:
            return ""
        scale, digits, unit = (1, 3, "nats") if metric_of(self.metric).by_loss else (100, 1, "points")
        middle, low, high = (
            f"{scale * value:+.{digits}f}" for value in (self.gain.mean, self.gain.low, self.gain.high)
        )
        return f"gain {middle} [{low}, {high}] {unit}"

    def _shown(self, value: float) -> str:
        return f"loss {-value:.3f}" if metric_of(self.metric).by_loss else f"{100 * value:.1f} %"


def judged(learning: Mapping[str, Learning]) -> list[str]:
    """The tasks that means are over."""
    return [task for task, learnt in learning.items() if not learnt.left_out]


def sentences(learning: Mapping[str, Learning]) -> list[str]:
    """What has to be said before any mean."""
    out = {task: learnt.left_out for task, learnt in learning.items() if learnt.left_out}
    vague = {task: learnt.not_shown for task, learnt in learning.items() if learnt.not_shown}
    texts = []
    if out and len(out) == len(learning):
        texts.append(f"No own probe learnt its task, so retention means nothing here and has no mean: {_listed(out)}.")
    elif out:
        texts.append(
            "Left out of mean retention and of the worst task, for the own probe did not learn the task, and retention "
            f"means nothing there: {_listed(out)}."
        )
    if vague:
        texts.append(
            f"Judged, though the test rows are too few to show that the probe is better than θ0 "
            f"({100 * _CONFIDENCE:g} % interval): {_listed(vague)}."
        )
    return texts


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{task} ({reason})" for task, reason in reasons.items())


# ---- one run ---------------------------------------------------------------------------------------------------------


def probe_of(task: str) -> str:
    """The title of a task's probe among the models."""
    return f"probe {task}"


def learning_of(tasks: Sequence[str], scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Learning]:
    """Of the tasks whose probe was scored. `scores`: by model and task, as `scores.json` or as `condensed` has them."""
    learning = {}
    for task in tasks:
        probe, base = scores.get(probe_of(task), {}).get(task), scores.get("base", {}).get(task)
        if probe is not None:
            value = None if base is None else larger_is_better(base)
            gain = probe["gain"] if "gain" in probe else None if base is None else difference(probe, base)
            learning[task] = Learning(task, probe["metric"], larger_is_better(probe), value, chance_of(probe), gain)
    return learning


def condensed(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, Score]]:
    """Scores without their rows, but with what was learnt from these: `chance`, and of own probes the `gain`."""
    scores_of_model: dict[str, dict[str, Score]] = {}
    for model, tasks in scores.items():
        scores_of_model[model] = {}
        for task, score in tasks.items():
            short = score.copy()
            short.pop("examples", None)
            if (chance := chance_of(score)) is not None:
                short["chance"] = chance
            base = scores.get("base", {}).get(task) if model == probe_of(task) else None
            if base is not None and (gain := difference(score, base)) is not None:
                short["gain"] = replace(gain, values=[])
            scores_of_model[model][task] = short
    return scores_of_model


def larger_is_better(score: Score) -> float:
    """The task's metric, or the negated loss where that is the metric; what is not a number is worse than every one."""
    value = -float(score["loss"]) if score["score"] is None else float(score["score"])
    return -math.inf if math.isnan(value) else value


def chance_of(score: Score) -> float | None:
    """What guessing scores: of a choice the mean over rows of 1 ÷ options; None of other metrics, or without rows."""
    if "chance" in score:
        return float(score["chance"])
    options = [len(row["option_nll"]) for row in score.get("examples", ()) if "option_nll" in row]
    return sum(1 / count for count in options) / len(options) if options else None


def measured(score: Score) -> Estimate:
    """The task's metric, or the loss where that is the metric, with its interval over test rows.

    Of rows that all have the same score, `alike_half` of others may have another.
    """
    rows = score.get("examples", ())
    if score["score"] is None:
        figure = weighted_mean([row["loss"] for row in rows], [row["tokens"] for row in rows], _CONFIDENCE)
        return replace(figure, values=[])
    figure = weighted_mean([row["score"] for row in rows], [1] * len(rows), _CONFIDENCE)
    if figure.low is None or figure.high is None:
        return figure
    alike = alike_half(len(rows)) if figure.low == figure.high else 0.0
    return Estimate([], figure.mean, max(0.0, figure.low - alike), min(1.0, figure.high + alike))


def alike_half(rows: int) -> float:
    """Up to which share of all rows may do otherwise, where so many all do the same: 1 − 0.05^(1/n)."""
    return float(1 - (1 - _CONFIDENCE) ** (1 / rows))


def difference(one: Score, other: Score) -> Estimate | None:
    """By how much `one` is better, paired by test row; None where rows are not at hand."""
    if not one.get("examples") or len(one["examples"]) != len(other.get("examples", ())):
        return None
    pairs = list(zip(one["examples"], other["examples"], strict=True))
    if one["score"] is None:
        gains, weights = [two["loss"] - own["loss"] for own, two in pairs], [own["tokens"] for own, _ in pairs]
    else:
        gains, weights = [own["score"] - two["score"] for own, two in pairs], [1] * len(pairs)
    return weighted_mean(gains, weights, _CONFIDENCE)
