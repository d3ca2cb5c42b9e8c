"""The rows that a stage of a fine-tune goes over.

They are read from their sources one by one and kept as tokens in files that are mapped. So a data set may be larger
than memory and is still one that a row's number finds: workers share it out, and a resumed fine-tune goes on in it, as
in any other. Each worker keeps its own (8 bytes a token; packed rows 12 more), so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cpift.config.run import TaskConfig
from cpift.data.packing import packed
from cpift.data.tasks import (
    balanced_sample,
    count_examples,
    mixture,
    pick_examples,
    read_examples,
    same_rows,
    tokenised_dataset,
)
from cpift.data.templates import checked_templates
from cpift.data.use import RowUse, UseRecord
from cpift.rows.examples import Example
from cpift.training.spec import FitSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def stage_data(
    spec: FitSpec,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    uses: dict[str, UseRecord] | None = None,
) -> Dataset:
    """The rows that a stage goes over in every epoch, with column `input_ids` among others; kept in `folder`.

    `uses` gets how many rows of each task these are (`RowUse.record`).
    """
    chosen = [task for task in spec.tasks if task.name in spec.stages[index].tasks]
    length = spec.training.max_length
    parts = []
    with same_rows({task.name: task.train_data for task in chosen}, spec.rows):
        for task, examples in zip(chosen, _examples(spec, chosen), strict=True):
            use, file = RowUse(length), folder / f"stage-{index}-{task.name}.arrow"
            with checked_templates():  # by `preflight`
                parts.append(tokenised_dataset(examples, tokenizer, length, file, use))
            if uses is not None:
                uses[task.name] = use.record
    mixed = mixture(parts, spec.seed + index, spec.training.mixing)
    return packed(mixed, length, folder / f"stage-{index}-packed.arrow") if spec.training.packing else mixed


def _examples(spec: FitSpec, tasks: list[TaskConfig]) -> list[Iterable[Example]]:
    sources = [task.train_data for task in tasks]
    if not spec.balanced:
        return [read_examples(source) for source in sources]
    places = balanced_sample([range(count_examples(source)) for source in sources], spec.samples_per_task, spec.seed)
    return [pick_examples(source, rows) for source, rows in zip(sources, places, strict=True)]
