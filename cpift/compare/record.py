"""What a comparison found, as JSON lines: a header, then one line a model with its score on every test row.

Small enough to commit beside the text that cites it: whoever doubts an interval computes it again without a GPU, the
data or the models. `rows_of` and `Header` are all that tables, plots and sentences are made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from cpift.config.loading import Fields
from cpift.disk.files import write_text
from cpift.errors import ConfigError, Problem
from cpift.evaluation.measures import References, Scores, TaskItems, bootstrap
from cpift.evaluation.metrics import metric_of
from cpift.evaluation.scores import Score, ScoredExample
from cpift.untrusted.json import RECORD, parse_json, read_bytes

BASE, PROBES = "θ0", "own probes"
OURS, RECOMMENDED = "CPI-FT", "CPI-FT, recommended"
_DIGITS = 5


@dataclass(frozen=True)
class Header:
    """How the comparison was made."""

    __pydantic_config__ = ConfigDict(extra="forbid")

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
    methods: list[str] = field(default_factory=list)  # of the whole comparison, made or not
    train_rows: dict[str, int] = field(default_factory=dict)  # by task; empty in records from before they were counted
    chance: dict[str, float] = field(default_factory=dict)  # what guessing scores, of choices; empty in older records
    protocol: str | None = None  # sha256 of the text that fixed it beforehand; None: there was none
    # By task, `admitted` and `reasons`, decided on other seeds; None: these scores decide which tasks means are over.
    admission: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Row:
    """One model: a method trained with one seed.

    scores: by task `score` (None where the metric is the loss), `loss`, and `items`: each test row's score, or where
    the metric is the loss [loss, answer tokens]. tokens (None: not counted) and seconds: all that was made for it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: str
    kind: str  # reference | probe | sft | merge | cpift | part | variant | curve | forgetting | arrival
    seed: int
    budget: str | None
    pair: tuple[str, str] | None
    fields: Fields
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
        by_seed = {row.seed: row for row in self.rows if row.method == method}
        return [by_seed[seed] for seed in self.header.seeds]

    @property
    def references(self) -> References:
        """What every method is measured against."""
        decided = None
        if self.header.admission is not None:
            decided = {
                task: "" if one["admitted"] else f"not admitted beforehand, {'; '.join(one['reasons'])}"
                for task, one in self.header.admission.items()
            }
        return References(BASE, PROBES, self.header.tasks, self.header.chance, decided)

    def scores(self, methods: Sequence[str]) -> Scores:
        """Everything that intervals are computed from, for these methods."""
        items = [self._items(methods, task, metric) for task, metric in self.header.tasks.items()]
        return bootstrap(items, methods, self.header.resamples, 0, self.header.confidence)

    def _items(self, methods: Sequence[str], task: str, metric: str) -> TaskItems:
        items = np.array([[row.scores[task]["items"] for row in self.rows_of(method)] for method in methods])
        if not metric_of(metric).by_loss:
            return TaskItems(task, items.astype(float), np.ones(items.shape[-1]), True)
        return TaskItems(task, items[..., 0] * items[..., 1], items[0, 0, :, 1], False)


def joined(first: Record, second: Record) -> Record:
    """Two pieces of one comparison, made at different times or on different machines, as one. Where both have a method
    with a seed, the second's row stays; methods come in the order in which the comparison has them.

    Raises ConfigError where they are not of the same comparison: another run, or one name for two methods.
    """
    problems = [
        Problem(f"{what}", "differs between the pieces", "keep records of different set-ups in different files")
        for what, one, other in (
            ("run", _recipe(first.header.config), _recipe(second.header.config)),
            ("tasks", first.header.tasks, second.header.tasks),
            ("protocol", first.header.protocol, second.header.protocol),
            ("admission", _tasks(first), _tasks(second)),
            *((name, first.header.comparison.get(name), second.header.comparison.get(name)) for name in _SHARED),
        )
        if _differ(one, other)
    ]
    described = {row.method: (row.fields, row.budget) for row in first.rows}
    for row in second.rows:
        if described.get(row.method, (row.fields, row.budget)) != (row.fields, row.budget):
            problems.append(Problem(row.method, "has other fields in the two pieces", "give the new one another name"))
            described.pop(row.method)
    if problems:
        raise ConfigError("records to be joined", problems)
    return _joined(first, second)


def _tasks(record: Record) -> dict[str, bool]:
    """What was decided beforehand of each task; empty where nothing was."""
    return {task: one["admitted"] for task, one in (record.header.admission or {}).items()}


_SHARED = ("stages", "heuristic")  # of a comparison: what a method's name does not tell


def _differ(one: Any, other: Any) -> bool:
    """Whether two descriptions disagree. A field that only one of them has is newer than the other, and at its default
    there."""
    if isinstance(one, dict) and isinstance(other, dict):
        return any(_differ(one[name], other[name]) for name in one.keys() & other.keys())
    return bool(one != other)


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    """A run's fields without those that say where it is made."""
    return {name: value for name, value in config.items() if name not in ("resources", "tracking")}


def _joined(first: Record, second: Record) -> Record:
    again = {(row.method, row.seed) for row in second.rows}
    rows = [row for row in first.rows if (row.method, row.seed) not in again] + second.rows
    methods = (*second.header.methods, *first.header.methods, *(row.method for row in first.rows + second.rows))
    order = {method: place for place, method in enumerate(dict.fromkeys(methods))}
    seeds = sorted({*first.header.seeds, *second.header.seeds})
    overlaps = {overlap["seed"]: overlap for overlap in (*first.header.overlaps, *second.header.overlaps)}
    comparison = second.header.comparison | {"methods": _patterns(first, second)}
    kept_overlaps = [overlaps[seed] for seed in seeds]
    header = replace(second.header, seeds=seeds, overlaps=kept_overlaps, comparison=comparison)
    return Record(header, sorted(rows, key=lambda row: (seeds.index(row.seed), order[row.method])))


def _patterns(first: Record, second: Record) -> list[str]:
    """Which methods two pieces are about: the pieces of a whole are about all."""
    patterns = list(dict.fromkeys([*first.header.comparison["methods"], *second.header.comparison["methods"]]))
    names = {row.method for record in (first, second) for row in record.rows}
    return ["*"] if names >= set(second.header.methods) else patterns


def finished(record: Record) -> Record:
    """The part of a record that every seed in it has every method of: what intervals over seeds can be taken from.

    Seeds that have all methods, or as long as there is none, the one that has most. Not changed where it is whole.
    """
    by_seed = {seed: {row.method for row in record.rows if row.seed == seed} for seed in record.header.seeds}
    most = max(by_seed.values(), key=len)
    complete = [seed for seed, methods in by_seed.items() if methods >= set().union(*by_seed.values())]
    seeds = complete or [next(seed for seed, methods in by_seed.items() if methods == most)]
    overlaps = [overlap for overlap in record.header.overlaps if overlap["seed"] in seeds]
    header = replace(record.header, seeds=seeds, overlaps=overlaps)
    return Record(header, [row for row in record.rows if row.seed in seeds])


def kept_scores(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """The scores of one model as `Row.scores` keeps them, from an evaluation's `scores.json`."""
    return {
        task: {
            "score": None if score["score"] is None else round(score["score"], _DIGITS),
            "loss": round(score["loss"], _DIGITS),
            "items": [_item(score["metric"], example) for example in score["examples"]],
        }
        for task, score in scores.items()
    }


def _item(metric: str, example: ScoredExample) -> Any:
    if metric_of(metric).by_loss:
        return [round(example["loss"], _DIGITS), example["tokens"]]
    score = round(example["score"], _DIGITS)
    return int(score) if score == int(score) else score


def write_record(record: Record, path: Path) -> None:
    write_text(path, record_text(record))


def record_text(record: Record) -> str:
    """A line of JSON for the header and for every row."""
    lines: Iterable[Any] = [asdict(record.header), *(asdict(row) for row in record.rows)]
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


# What a file says is taken only in the form that was written; a field that is not known is an error.
_HEADER = TypeAdapter(Header)
_ROW = TypeAdapter(Row)


def read_record(path: Path) -> Record:
    """Raises ConfigError where the file is not a comparison's."""
    try:
        lines = read_bytes(path, RECORD.size).splitlines()
        first, *others = [parse_json(line, RECORD) for line in lines]
        first.pop("written_by", None)
        return Record(_HEADER.validate_python(first), [_ROW.validate_python(row) for row in others])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(str(path), [Problem("file", str(error), "make it with `cpift compare`")]) from None
