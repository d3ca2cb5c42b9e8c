"""A run in one sentence: what the one model keeps of the fine-tunes' own scores, beside what else could be made.

Every figure is a mean of `retention.retained` over the judged tasks. Its interval is over test rows, by linearisation,
with the probe's rows paired to the model's; differences between two models are paired in the same way. Where every row
of a task says the same (all right, all wrong, or as the probe did), linearisation would call the figure certain. Of n
rows that agree, up to 1 − 0.05^(1/n) of all rows may yet do otherwise (95 %; about 3 ÷ n): that is the task's part
then. One run has one seed, of whose variation no interval here knows: the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

import numpy as np

from cpift.config.tasks import BASELINES
from cpift.evaluation.estimates import t_quantile
from cpift.evaluation.retention import judged, learning_of, probe_of
from cpift.evaluation.scores import Score

_CONFIDENCE = 0.95
# Models that are compared with the last one, and what a sentence calls them.
RIVALS = {
    **{baseline.title: baseline.phrase for baseline in BASELINES.values() if not baseline.trained},
    "backbone": "the staged backbone alone",
    **{baseline.title: baseline.phrase for baseline in BASELINES.values() if baseline.trained},
}


@dataclass(frozen=True)
class Share:
    """A model's mean retention. errors: by task, what each test row adds to the figure's error; they sum to 0.
    unseen: by task whose rows all say the same, half of its part of the interval."""

    mean: float
    errors: Mapping[str, np.ndarray]
    unseen: Mapping[str, float] = field(default_factory=dict)

    def minus(self, other: Share) -> Share:
        """The difference of two models on the same rows."""
        errors = {task: self.errors[task] - other.errors[task] for task in self.errors}
        unseen = {
            task: math.hypot(self.unseen.get(task, 0.0), other.unseen.get(task, 0.0))
            for task in {*self.unseen, *other.unseen}
        }
        return Share(self.mean - other.mean, errors, unseen)

    @property
    def half(self) -> float | None:
        """Half of the interval; None where a task has one row, or rows are not at hand."""
        rows = [len(error) for error in self.errors.values()]
        if min(rows, default=0) < 2:
            return None
        variance = sum(len(error) / (len(error) - 1) * float((error**2).sum()) for error in self.errors.values())
        half = t_quantile(0.5 + _CONFIDENCE / 2, min(rows) - 1) * math.sqrt(variance)
        return math.hypot(half, *self.unseen.values())

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies above or below 0, else 0."""
        clear = self.half is not None and abs(self.mean) > self.half
        return (1 if self.mean > 0 else -1) if clear else 0


def verdict_sentence(tasks: Sequence[str], scores: Mapping[str, Mapping[str, Score]]) -> str:
    """The verdict over the last model of `scores`, which are by model and task as `scores.json` has them."""
    learnt = judged(learning_of(tasks, scores))
    own = list(scores)[-1]
    if not learnt or own == "base":
        return "One model; how good it is cannot be said, for no fine-tune is better than θ0 on its own task."
    rivals = [title for title in RIVALS if title in scores and title != own]
    shares = {title: share_of(scores, title, learnt) for title in (own, *rivals)}
    parts = [f"One model: {_percent(shares[own])} of the fine-tunes' own scores"]
    for full in (False, True):
        if named := [f"{RIVALS[title]} {_percent(shares[title])}" for title in rivals if _is_full(title) == full]:
            parts.append(", ".join(named))
    return f"{'; '.join(parts)} ({_basis(tasks, learnt, scores[own], shares)}).{_shown(own, shares)}"


def share_of(scores: Mapping[str, Mapping[str, Score]], model: str, tasks: Sequence[str]) -> Share:
    """A model's mean retention over these tasks."""
    parts = {task: _kept(scores[model][task], scores[probe_of(task)][task]) for task in tasks}
    errors = {task: error / len(tasks) for task, (_, error) in parts.items()}
    alike = [task for task, error in errors.items() if len(error) and not error.any() and model != probe_of(task)]
    unseen = {task: _unseen(scores[probe_of(task)][task]) / len(tasks) for task in alike}
    return Share(mean(value for value, _ in parts.values()), errors, unseen)


def _unseen(probe: Score) -> float:
    """How far retention may be from where all rows put it; 0 for a loss, which is alike only for the same weights."""
    if probe["score"] is None:
        return 0.0
    rows = _of_rows(probe)
    return float((1 - (1 - _CONFIDENCE) ** (1 / len(rows))) / rows.mean())


def _value(score: Score) -> float:
    return score["loss"] if score["score"] is None else score["score"]


def _kept(own: Score, probe: Score) -> tuple[float, np.ndarray]:
    """Retention on a task as a ratio of sums over rows, and each row's part of its error: (a − r·b) ÷ Σb."""
    above, below = (probe, own) if own["score"] is None else (own, probe)
    a, b = _of_rows(above), _of_rows(below)
    if len(a) != len(b) or not len(a):
        return _value(above) / _value(below), np.zeros(0)
    ratio = float(a.sum() / b.sum())
    return ratio, (a - ratio * b) / b.sum()


def _of_rows(score: Score) -> np.ndarray:
    rows = score.get("examples", ())
    if score["score"] is None:
        return np.array([row["loss"] * row["tokens"] for row in rows])
    return np.array([row["score"] for row in rows])


def _is_full(title: str) -> bool:
    """Whether it is trained on all data at once."""
    return title in {baseline.title for baseline in BASELINES.values() if baseline.trained}


def _percent(share: Share) -> str:
    return f"{100 * share.mean:.0f} %"


def _basis(tasks: Sequence[str], learnt: Sequence[str], own: Mapping[str, Score], shares: Mapping[str, Share]) -> str:
    """What the figures are means of, and how far they can be trusted."""
    counts = sorted({own[task]["rows"] for task in learnt})
    rows = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    of = f"{len(learnt)}" if len(learnt) == len(tasks) else f"{len(learnt)} of {len(tasks)}"
    over = f"mean of {of} tasks, " if len(tasks) > 1 else ""
    halves = [share.half for share in shares.values()]
    within = "" if None in halves else f": ±{100 * max(half for half in halves if half is not None):.0f}"
    return f"{over}one seed, {rows} rows a task{within}"


def _shown(own: str, shares: Mapping[str, Share]) -> str:
    """From which of the others the rows tell the model apart."""
    signs = {title: shares[own].minus(share).sign for title, share in shares.items() if title != own}
    words = {1: "better than", -1: "worse than", 0: "not told apart from"}
    parts = [
        f"{words[sign]} {_listed([RIVALS[title] for title in titles])}"
        for sign in words
        if (titles := [title for title, outcome in signs.items() if outcome == sign])
    ]
    return f" By these rows it is {', '.join(parts)}." if parts else ""


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
