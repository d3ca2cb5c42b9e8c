"""What a comparison shows: figures of every method with intervals, and sentences that follow from them by rule.

A sentence says "above" or "below" only where a whole interval lies on one side of zero, and "no difference shown"
everywhere else. Each interval has the stated confidence by itself; none but those of primary contrasts is adjusted for
how many there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpift.compare.config import Contrast
from cpift.compare.contrasts import Tested, by_holm
from cpift.compare.frontier import Frontiers
from cpift.compare.record import BASE, OURS, PROBES, RECOMMENDED, Record
from cpift.compare.words import points, primary_sentence, share, side
from cpift.evaluation.estimates import Estimate
from cpift.evaluation.measures import (
    Forgetting,
    References,
    Scores,
    Seesaw,
    forgetting,
    forgetting_cut,
    imbalance,
    learning,
    low_resource,
    mean_retention,
    ranks,
    seesaw,
    worst_retention,
)
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.retention import Learning, judged, sentences

FULL = "full SFT"
REPLAYED = ("sequential SFT", "sequential SFT and replay")  # what CPI-FT's forgetting is measured against


@dataclass(frozen=True)
class Line:
    """One method of the comparison table."""

    method: str
    kind: str
    scores: dict[str, Estimate]  # in the metric's units: 0..1, or nats of a loss
    mean: Estimate  # retention, 1 is as good as each task's own probe
    worst: Estimate
    rank: Estimate | None
    seesaw: Seesaw
    imbalance: Estimate | None  # retention of low-resource tasks less that of the others; None where data are balanced
    tokens: float | None
    seconds: float


@dataclass(frozen=True)
class Against:
    """One method less another, in retention."""

    method: str
    rival: str
    mean: Estimate
    worst: Estimate


@dataclass(frozen=True)
class Learnt:
    """The forgetting protocol of one method on A→B."""

    method: str
    pair: tuple[str, str]
    change: Forgetting


class Findings:
    """Everything that tables, plots and sentences of one comparison show."""

    def __init__(self, record: Record):
        self.record, self._lines = record, dict[str, Line]()
        self.methods = record.of_kind("reference", "probe", "sft", "merge", "cpift", "part", "variant", "curve")
        self.ranked = [name for name in self.methods if self.kind(name) in ("sft", "merge", "cpift")]

    @cached_property
    def low(self) -> list[str]:
        """The low-resource tasks."""
        return low_resource(self.record.header.train_rows)

    @cached_property
    def scores(self) -> Scores:
        return self.record.scores([*self.methods, *self.record.of_kind("forgetting", "arrival")])

    @property
    def references(self) -> References:
        return self.record.references

    @cached_property
    def learning(self) -> dict[str, Learning]:
        """What the own probes learnt of every task."""
        return learning(self.scores, self.references)

    @cached_property
    def _ranks(self) -> dict[str, np.ndarray]:
        return ranks(self.scores, self.ranked)

    def kind(self, method: str) -> str:
        return next(row.kind for row in self.record.rows if row.method == method)

    def has(self, method: str) -> bool:
        return method in self.methods

    def line(self, method: str) -> Line:
        if method not in self._lines:
            self._lines[method] = self._line(method)
        return self._lines[method]

    def _line(self, method: str) -> Line:
        scores, rows = self.scores, self.record.rows_of(method)
        sign = {task: -1 if metric_of(metric).by_loss else 1 for task, metric in self.record.header.tasks.items()}
        return Line(
            method=method,
            kind=self.kind(method),
            scores={task: scores.estimate(sign[task] * scores.of(method, task)) for task in scores.tasks},
            mean=scores.estimate(mean_retention(scores, method, self.references)),
            worst=scores.estimate(worst_retention(scores, method, self.references)),
            rank=scores.estimate(self._ranks[method]) if method in self._ranks else None,
            seesaw=seesaw(scores, method, BASE, PROBES),
            imbalance=scores.estimate(imbalance(scores, method, self.references, self.low)) if self.low else None,
            tokens=_mean([row.tokens for row in rows]),
            seconds=_mean([row.seconds for row in rows]) or 0.0,
        )

    def against(self, method: str, rival: str) -> Against:
        """`method` less `rival`, paired by seed and test row."""
        mean, worst = (
            self.scores.estimate(
                figure(self.scores, method, self.references) - figure(self.scores, rival, self.references)
            )
            for figure in (mean_retention, worst_retention)
        )
        return Against(method, rival, mean, worst)

    @cached_property
    def primary(self) -> list[Tested]:
        """The contrasts that were named beforehand, of methods that the record has."""
        named = [Contrast.model_validate(entry) for entry in self.record.header.comparison.get("contrasts", ())]
        known = [one for one in named if {one.method, one.rival} <= self._contrasted(one.by)]
        return by_holm(self.scores, known, self.references, self.frontiers)

    def _contrasted(self, by: str) -> set[str]:
        """What a contrast may be of."""
        if by != "arrival":
            return {*self.methods}
        return {*self.frontiers.labels} if self.frontiers.at is not None else set()

    @cached_property
    def frontiers(self) -> Frontiers:
        """What learning tasks that arrive one after another costs."""
        return Frontiers(self.record, self.scores, judged(self.learning))

    # ---- forgetting --------------------------------------------------------------------------------------------------

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Every A→B, in the order of the record."""
        rows = [row for row in self.record.rows if row.kind == "forgetting"]
        return list(dict.fromkeys(row.pair for row in rows if row.pair is not None))

    @cached_property
    def sequences(self) -> list[Learnt]:
        """Every method on every A→B."""
        return [
            Learnt(label, pair, forgetting(self.scores, method, f"probe {pair[0]}", pair))
            for pair in self.pairs
            for label, method in self._labelled(pair).items()
        ]

    def _labelled(self, pair: tuple[str, str]) -> dict[str, str]:
        names = [row.method for row in self.record.rows if row.pair == pair and row.kind == "forgetting"]
        return {method.partition(":")[0]: method for method in dict.fromkeys(names)}

    def cut(self, method: str, rival: str) -> Estimate:
        """How much less of A is forgotten than by the rival, over all A→B."""
        changes = {}
        for name in (method, rival):
            each = [
                self.scores.of(self._labelled(pair)[name], pair[0]) - self.scores.of(f"probe {pair[0]}", pair[0])
                for pair in self.pairs
            ]
            changes[name] = np.mean(each, axis=0)
        return forgetting_cut(self.scores, changes, rival, method)

    # ---- sentences ---------------------------------------------------------------------------------------------------

    def verdict(self) -> list[str]:
        """What holds and what does not, most important first; second, what the own probes did not learn."""
        learnt = sentences(self.learning)
        if not judged(self.learning):
            return learnt + self.frontiers.why_not + self._of_forgetting()
        said = [primary_sentence(outcome) for outcome in self.primary]
        rivals = [name for name in self.methods if self.kind(name) in ("sft", "merge")]
        for ours in self.recipes if rivals else []:
            said.append(self.aim(ours, rivals))
            said += [self.sentence(ours, rival) for rival in rivals if self.kind(rival) == "sft"]
        said += self._of_best_variant(rivals) if rivals else []
        if self.has(RECOMMENDED):
            controls = [OURS, *(name for name in self.methods if name.startswith("recommended, "))]
            said += [self.sentence(RECOMMENDED, rival) for rival in controls]
        said += self._of_arrival() + self._of_imbalance() + self._of_forgetting() + self._of_stages()
        return said[:1] + learnt + said[1:]

    @property
    def recipes(self) -> list[str]:
        """The paper's CPI-FT and, if there is one, the recommended."""
        return [name for name in (OURS, RECOMMENDED) if self.has(name)]

    def aim(self, ours: str, rivals: Sequence[str]) -> str:
        """Whether a recipe is above every trained and merged baseline."""
        outcomes = {rival: self.against(ours, rival) for rival in rivals}
        above = [rival for rival, against in outcomes.items() if side(against.mean) > 0 and side(against.worst) > 0]
        ahead, below = ([rival for rival, against in outcomes.items() if side(against.mean) == way] for way in (1, -1))
        larger = [rival for rival, against in outcomes.items() if min(against.mean.values + against.worst.values) > 0]
        seeds = len(self.record.header.seeds)
        return (
            f"With {seeds} seed{'s' * (seeds > 1)} {ours} is shown above {len(above)} of {len(rivals)} baselines in "
            f"both mean retention and worst task; in mean retention alone above {len(ahead)}, and below {len(below)}"
            f"{' (' + '; '.join(below) + ')' if below else ''}. In every single seed, intervals left aside, it is "
            f"above {len(larger)} in both. The aim, to be shown above all of them in both, is "
            f"{'' if len(above) == len(rivals) else 'not '}met."
        )

    def sentence(self, method: str, rival: str) -> str:
        against, own, other = self.against(method, rival), self.line(method).tokens, self.line(rival).tokens
        share = own / other if own is not None and other else 1.0
        spent = f" ({share:.0%} of its tokens)" if abs(share - 1) > 0.02 else ""
        return f"{method} − {rival}{spent}: mean retention {points(against.mean)}; worst task {points(against.worst)}."

    def _of_best_variant(self, rivals: Sequence[str]) -> list[str]:
        """The aim once more, for a variant that these scores picked: which makes it look better than it is."""
        variants = self.record.of_kind("variant")
        if not variants:
            return []
        best = max(variants, key=lambda name: float(mean_retention(self.scores, name, self.references)[:, 0].mean()))
        picked = f"Of {len(variants)} variants “{best}” has the highest mean retention, picked by these very scores."
        differences = [self.sentence(best, rival) for rival in rivals]
        return [f"{picked} {self.aim(best, rivals)}", *differences]

    def _of_arrival(self) -> list[str]:
        if (at := self.frontiers.at) is None:
            return self.frontiers.why_not
        title = f"ΔA at the ΔB of {at[0]} {at[1]:g}, mean over {len(self.frontiers.compared)} A → B"
        found = [one for one in self.frontiers.estimates() if one[0] != at[0]]
        return [f"{label} − {at[0]}, {title}: {points(difference)}." for label, _, difference in found]

    def _of_imbalance(self) -> list[str]:
        if not self.low:
            return []
        shown = [name for name in (FULL, f"{FULL}, balanced", OURS, RECOMMENDED) if self.has(name)]
        of = {
            name: points(self.scores.estimate(imbalance(self.scores, name, self.references, self.low)))
            for name in shown
        }
        return [
            f"Retention of the low-resource tasks ({', '.join(self.low)}) less that of the others: "
            f"{'; '.join(f'{name} {text}' for name, text in of.items())}."
        ]

    def _of_forgetting(self) -> list[str]:
        if not self.pairs:
            return []
        sentences = []
        for ours, rival in itertools.product(self.recipes, REPLAYED):
            cut = self.cut(ours, rival)
            if cut.low is None or cut.high is None:
                sentences.append(f"{ours}, forgetting against {rival}: no share, for that is not shown to forget.")
                continue
            text = f"{ours}, forgetting against {rival}: cut by {share(cut)}"
            aim = "reached" if cut.low >= 0.65 else "missed" if cut.high < 0.65 else "not decided"
            shown = "a cut is shown" if cut.low > 0 else "more is forgotten" if cut.high < 0 else "no cut is shown"
            sentences.append(f"{text}: {shown}; 65 % is {aim}.")
        return sentences

    def _of_stages(self) -> list[str]:
        steps = [FULL, f"{OURS}, backbone alone", f"{OURS}, fused alone", OURS]
        present = [name for name in steps if self.has(name)]
        texts = []
        for before, after in itertools.pairwise(present):
            against = self.against(after, before)
            texts.append(f"{before} → {after} {points(against.mean)}")
        return [f"Where mean retention is won and lost: {'; '.join(texts)}."] if texts else []


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
