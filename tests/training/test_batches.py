"""Batches: the loss and the gradients of padded rows, from less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpift.data.tokenise import CompletionCollator
from cpift.training.batches import Abilities, Batches
from tests.helpers.classes import tiny

TOKENIZER: Any = SimpleNamespace(pad_token_id=0)


def rows(*lengths: int) -> list[dict[str, Any]]:
    """Rows whose last third has labels, one of them its first token too."""
    made = []
    for seed, length in enumerate(lengths):
        ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        begin = length - max(1, length // 3) if seed else 0
        made.append({"input_ids": ids, "labels": [-100] * begin + ids[begin:]})
    return made


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "position_ids" in batch:
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}
    labels = (batch["labels"][:, 1:] != -100).sum()
    found: torch.Tensor = model(**batch, use_cache=False, num_items_in_batch=labels).loss
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_moe", "opt", "mamba"])
def test_loss_and_gradients_are_those_of_padded_rows(kind: str) -> None:
    model, data = tiny(kind), rows(9, 5, 31, 2)
    abilities = Abilities.of(model)
    assert bool(abilities.width) == (kind not in ("opt", "mamba"))
    losses, gradients = [], []
    for batch in (CompletionCollator(TOKENIZER)(data), Batches(TOKENIZER, abilities)(data)):
        model.zero_grad()
        losses.append(loss(model, batch))
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, expected in gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_rows_lie_behind_each_other_where_that_costs_less() -> None:
    make = Batches(TOKENIZER, Abilities(width=16, chooses=True))
    joined = make(rows(9, 5, 31, 2))
    assert joined["input_ids"].shape == (1, 47)
    assert joined["position_ids"][0].tolist() == [*range(9), *range(5), *range(31), *range(2)]
    assert int(joined["attention_mask"].sum()) == 47
    assert joined["logits_to_keep"].tolist() == [*range(8), 12, *range(34, 44), 45]
    following = joined["input_ids"][0, joined["logits_to_keep"] + 1]
    assert joined["shift_labels"].tolist() == [following.tolist()]
    alike = make(rows(64, 64, 64))  # no padding to save, and more pairs of tokens
    assert alike["input_ids"].shape == (3, 64)
    assert "position_ids" not in alike
    assert make([row | {"position_ids": [0] * len(row["input_ids"])} for row in rows(9, 5)])["input_ids"].shape == (
        2,
        16,
    )


def test_a_model_gets_what_it_understands() -> None:
    plain = Batches(TOKENIZER, Abilities(width=0, chooses=False))(rows(9, 5))
    assert set(plain) == {"input_ids", "attention_mask", "labels"}
