"""Rows as tokens, by the definition: one after the other, and in memory. A task of lm-eval over such rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from cpift.data.tokenise import learnable, tokenise
from cpift.rows.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenised_dataset(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Columns `input_ids` and `labels`, in the examples' order; of those that something is learnt from."""
    rows: list[dict[str, Any]] = [tokenise(example, tokenizer, max_length) for example in examples]
    return Dataset.from_list([row for row in rows if learnable(row)])


# A task of lm-eval over JSON lines with `prompt` and `answer`; file: theirs.
LM_EVAL_TASK = """task: local_kinds
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}:"
doc_to_choice: ["noun", "verb", "name"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
