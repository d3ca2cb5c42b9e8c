"""The rows that a stage of a fine-tune goes over.

They are kept as tokens in files that are mapped, made once for all workers and fine-tunes of a run. So a data set may
be larger than memory and is still one that a row's number finds: workers share it out, and a resumed fine-tune goes on
in it, as in any other.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from cpift.config.inputs import DataSource, needed
from cpift.data.on_disk import rows_on_disk
from cpift.data.packing import packed_rows
from cpift.data.tasks import balanced_sample, mixture, same_rows
from cpift.data.token_files import TokenFiles, TokenRows
from cpift.data.use import UseRecord
from cpift.disk.files import digest
from cpift.errors import DataError, Problem
from cpift.training.spec import FitSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def stage_data(
    spec: FitSpec, index: int, tokenizer: PreTrainedTokenizerBase, uses: dict[str, UseRecord] | None = None
) -> Dataset:
    """The rows that a stage goes over in every epoch, with columns `input_ids` and `labels` among others.

    Examples whose prompt alone fills `max_length` have nothing to learn from; they are left out. `uses` gets how many
    rows of each task these are (`RowUse.record`).

    Raises:
        DataError: no example of a task is left.
    """
    chosen = [task for task in spec.tasks if task.name in spec.stages[index].tasks]
    with same_rows({task.name: task.train_data for task in chosen}, spec.rows):
        kept = _tokens(spec, tokenizer, {task.name: task.trained_rows(spec.training) for task in chosen})
    places = _places(spec, [task.name for task in chosen], kept)
    for task, tokens, places_of in zip(chosen, kept, places, strict=True):
        record = _use(tokens, places_of)
        if uses is not None:
            uses[task.name] = record
    parts = [tokens.chosen(places_of) for tokens, places_of in zip(kept, places, strict=True)]
    mixed = mixture(parts, spec.seed + index, spec.training.mixing)
    length = spec.training.max_length
    if not spec.training.packing:
        return mixed
    made_of = [[tokens.name for tokens in kept], places, spec.seed + index, spec.training.mixing.model_dump()]
    return _packed(mixed, length, spec.scratch / f"packed-{index}-{digest(made_of)[:12]}.arrow")


def held_out_rows(spec: FitSpec, index: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows whose loss a stage watches: of its tasks one after the other, as `stage_data` has rows.

    Raises:
        DataError: a task has none, or none of them has anything to learn from.
    """
    from datasets import concatenate_datasets

    tasks = [task for task in spec.tasks if task.name in spec.stages[index].tasks]
    watched = {task.name: task.watched_rows(spec.training) for task in tasks}
    sources = {name: needed(source, f"tasks.{name}.validation", "evaluate_every") for name, source in watched.items()}
    kept = _tokens(spec, tokenizer, sources)
    for tokens in kept:
        _use(tokens, None)
    return concatenate_datasets([tokens.rows for tokens in kept])


def _tokens(spec: FitSpec, tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, DataSource]) -> list[TokenRows]:
    files = TokenFiles(spec.tokens, tokenizer)
    with same_rows(sources) as rows:
        return [files.rows(source, rows[name], spec.training.max_length) for name, source in sources.items()]


def _places(spec: FitSpec, tasks: Sequence[str], kept: Sequence[TokenRows]) -> Sequence[Sequence[int] | None]:
    """Of each task, which rows of its source are gone over; None: all."""
    if not spec.balanced:
        shares = spec.shares or {}
        return [_some(len(rows), shares.get(task), spec.seed, task) for task, rows in zip(tasks, kept, strict=True)]
    return balanced_sample([range(len(tokens)) for tokens in kept], spec.samples_per_task, spec.seed)


def _some(rows: int, share: float | None, seed: int, task: str) -> list[int] | None:
    """A share of the rows, rounded up, at random."""
    if share is None:
        return None
    return sorted(random.Random(f"{seed}/{task}").sample(range(rows), math.ceil(Fraction(str(share)) * rows)))


def _use(tokens: TokenRows, places: Sequence[int] | None) -> UseRecord:
    use = tokens.use(places)
    if not use.used:
        what = f"no reply begins within {use.max_length} tokens"
        raise DataError("training data", [Problem("max_length", what, "raise max_length")])
    if use.left_out:
        _log.warning("%d of %d examples left out: prompt ≥ %d tokens", use.left_out, use.rows, use.max_length)
    return use.record


def _packed(mixed: Dataset, length: int, file: Path) -> Dataset:
    """By the first worker that needs it; the others wait."""
    from datasets import Dataset

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        return Dataset.from_file(str(file)) if file.is_file() else rows_on_disk(packed_rows(mixed, length), file)
