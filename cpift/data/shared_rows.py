"""Test rows whose prompt some task trains on: what is scored on them was seen in training."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Literal

from cpift.data.tasks import read_examples

if TYPE_CHECKING:
    from cpift.config.run import RunConfig
    from cpift.rows.examples import Example


class SharedRows:
    """Counts test rows whose prompt some task trains on: see all tests first, then all training rows."""

    def __init__(self) -> None:
        self._tests: dict[int, Counter[str]] = defaultdict(Counter)
        self._sizes: Counter[str] = Counter()
        self._found: dict[tuple[str, str], set[int]] = defaultdict(set)

    def see(self, task: str, split: str, example: Example) -> None:
        """Look at a row of a task's `test` or `train`."""
        key = hash((tuple((turn.role, turn.content) for turn in example.distinct), example.tools))
        if split == "test":
            self._tests[key][task] += 1
            self._sizes[task] += 1
        elif key in self._tests:
            for tested in self._tests[key]:
                self._found[tested, task].add(key)

    def notes(self) -> list[str]:
        """One sentence for each pair of tasks that share prompts."""
        sentences = []
        for (tested, trained), keys in self._found.items():
            count = sum(self._tests[key][tested] for key in keys)
            rows = f"{count:,} of {self._sizes[tested]:,} rows"
            sentences.append(
                f"tasks.{tested}.test: {rows} have a prompt that tasks.{trained}.train has too; "
                "what is scored on them was seen in training"
            )
        return sentences


def shared_rows(config: RunConfig) -> list[str]:
    """`SharedRows.notes` of all rows of a run."""
    shared = SharedRows()
    splits: tuple[Literal["test", "train"], ...] = ("test", "train")
    for split in splits:
        for task in config.every_task:
            source = task.source(split)
            for example in read_examples(source) if source is not None else ():
                shared.see(task.name, split, example)
    return shared.notes()
