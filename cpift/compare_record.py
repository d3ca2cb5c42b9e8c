"""What a comparison found, as JSON lines: a header, then one line a model with its score on every test row.

Small enough to commit beside the text that cites it: whoever doubts an interval computes it again without a GPU, the
data or the models. `rows_of` and `Header` are all that tables, plots and sentences are made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpift.artifacts import write_text
from cpift.errors import ConfigError, Problem
from cpift.measures import Scores, TaskItems, bootstrap

BASE, PROBES = "θ0", "own probes"
_DIGITS = 5


@dataclass(frozen=True)
class Header:
    """How the comparison was made."""

    name: str
    config: dict[str, Any]  # the run, every field
    comparison: dict[str, Any]  # the comparison's own fields
    tasks: dict[str, str]  # name → metric
    seeds: list[int]
    parameters: int
    versions: dict[str, str]
    device: str
    commit: str | None
    confidence: float
    resamples: int
    overlaps: list[dict[str, Any]] = field(default_factory=list)  # a seed: jaccard, chance, groups


@dataclass(frozen=True)
class Row:
    """One model: a method trained with one seed.

    scores: by task `score` (None where the metric is the loss), `loss`, and `items`: each test row's score, or where
    the metric is the loss [loss, answer tokens]. tokens (None: not counted) and seconds: all that was made for it.
    """

    method: str
    kind: str  # reference | probe | sft | merge | cpift | part | variant | curve | forgetting
    seed: int
    budget: str | None
    pair: tuple[str, str] | None
    fields: dict[str, Any]
    groups: list[list[str]]
    tokens: int | None
    seconds: float
    scores: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Record:
    header: Header
    rows: list[Row]

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the methods of these kinds, in the order in which they were made."""
        return list(dict.fromkeys(row.method for row in self.rows if row.kind in kinds))

    def rows_of(self, method: str) -> list[Row]:
        """A method's rows, one a seed, in the header's order of seeds."""
        found = {row.seed: row for row in self.rows if row.method == method}
        return [found[seed] for seed in self.header.seeds]

    def scores(self, methods: Sequence[str]) -> Scores:
        """Everything that intervals are computed from, for these methods."""
        items = [self._items(methods, task, metric) for task, metric in self.header.tasks.items()]
        return bootstrap(items, methods, self.header.resamples, 0, self.header.confidence)

    def _items(self, methods: Sequence[str], task: str, metric: str) -> TaskItems:
        found = np.array([[row.scores[task]["items"] for row in self.rows_of(method)] for method in methods])
        if metric != "loss":
            return TaskItems(task, found.astype(float), np.ones(found.shape[-1]), True)
        return TaskItems(task, found[..., 0] * found[..., 1], found[0, 0, :, 1], False)


def kept_scores(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scores of one model as `Row.scores` keeps them, from an evaluation's `scores.json`."""
    return {
        task: {
            "score": None if one["score"] is None else round(one["score"], _DIGITS),
            "loss": round(one["loss"], _DIGITS),
            "items": [_item(one["metric"], example) for example in one["examples"]],
        }
        for task, one in scores.items()
    }


def _item(metric: str, example: dict[str, Any]) -> Any:
    if metric == "loss":
        return [round(example["loss"], _DIGITS), example["tokens"]]
    score = round(example["score"], _DIGITS)
    return int(score) if score == int(score) else score


def write_record(record: Record, path: Path) -> None:
    lines: Iterable[Any] = [asdict(record.header), *(asdict(row) for row in record.rows)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines))


def read_record(path: Path) -> Record:
    """Raises ConfigError where the file is not a comparison's."""
    try:
        first, *others = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [Row(**{**row, "pair": tuple(row["pair"]) if row["pair"] else None}) for row in others]
        return Record(Header(**first), rows)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(str(path), [Problem("file", str(error), "make it with `cpift compare`")]) from None
