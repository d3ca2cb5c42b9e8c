"""How much of a task's rows a fine-tune learns from: those whose prompt alone fills `max_length` teach nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, cast

LOST = 0.1  # a larger share of rows left out or cut is worth a warning


class UseRecord(TypedDict):
    """`RowUse` as training.json keeps it."""

    max_length: int
    rows: int
    left_out: int
    cut: int
    used: int


class RowFacts(UseRecord):
    """The rows of a task in one fine-tune, as a plan has them; of the first `rows` of `in_all` where `all` is false."""

    task: str
    field: str  # of the config: which `max_length`
    all: bool
    in_all: int
    tokens: int  # of the rows that are used


@dataclass
class RowUse:
    """Of one task at one `max_length`. `cut`: longer than it, and learnt from up to it."""

    max_length: int
    rows: int = 0
    left_out: int = 0
    cut: int = 0

    def add(self, length: int, learnable: bool) -> None:
        """Count a row of so many tokens, of which some are learnt within `max_length` or none."""
        self.rows += 1
        self.left_out += not learnable
        self.cut += learnable and length > self.max_length

    @property
    def used(self) -> int:
        return self.rows - self.left_out

    @property
    def warns(self) -> bool:
        """Whether so many rows are left out or cut that somebody should know."""
        return max(self.left_out, self.cut) > LOST * self.rows

    @property
    def record(self) -> UseRecord:
        return cast(UseRecord, asdict(self) | {"used": self.used})

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RowUse:
        return cls(**{name: int(record[name]) for name in ("max_length", "rows", "left_out", "cut")})

    def __str__(self) -> str:
        if not self.left_out and not self.cut:
            return f"all {self.rows:,} rows used whole"
        left_out = f"; {self.left_out:,} left out, for the prompt alone fills max_length" if self.left_out else ""
        cut = f", {self.cut:,} of them cut at {self.max_length:,} tokens" if self.cut else ""
        return f"{self.used:,} of {self.rows:,} rows used{cut}{left_out}"


@dataclass
class TokenUse(RowUse):
    """With the tokens of the rows that are used, each up to `max_length`."""

    tokens: int = 0

    def add(self, length: int, learnable: bool) -> None:
        super().add(length, learnable)
        self.tokens += min(length, self.max_length) * learnable

    def facts(self, task: str, name: str, every: bool, total: int) -> RowFacts:
        """name: the field that gives `max_length`. every: whether all rows were counted, `total` of them."""
        where = {"task": task, "field": name, "all": every, "in_all": total}
        return cast(RowFacts, where | asdict(self) | {"used": self.used})


def use_sentences(title: str, record: Sequence[Mapping[str, UseRecord]]) -> Iterator[tuple[str, bool]]:
    """A sentence for each task of a fine-tune, and whether it is a warning; `record`: by stage, from training.json."""
    for stage in record:
        for task, counts in stage.items():
            use = RowUse.of(counts)
            remedy = ". Raise max_length, or shorten the rows" if use.warns else ""
            yield f"{title}, task {task}: {use}{remedy}", use.warns
