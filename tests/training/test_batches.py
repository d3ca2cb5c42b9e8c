"""Batches: the loss and the gradients of padded rows, from less."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpift.data.packing import packed_rows
from cpift.data.tokenise import CompletionCollator
from cpift.errors import CheckpointError
from cpift.training import steps
from cpift.training.batches import Abilities, Batches
from tests.helpers.classes import tiny
from tests.helpers.fits import spec
from tests.helpers.flash import use_flash

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


def outcome(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a batch."""
    model.zero_grad()
    found = loss(model, batch)
    found.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": found.detach()} | {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_every_attention_gives_the_same_loss_and_gradients(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any batch: padded rows, packed rows (all of them at once for a flash kernel, padding left out)."""
    use_flash(monkeypatch)
    model, data = tiny(kind), rows(9, 5, 31, 2)
    expected = outcome(model, CompletionCollator(TOKENIZER)(data))
    given = list(packed_rows(data, 36)) if packed else data
    for name in ("eager", "flash_attention_2", *(["sdpa"] if kind == "llama" else [])):
        model.config._attn_implementation = name
        batch = Batches(TOKENIZER, Abilities.of(model))(given)
        assert ("cu_seq_lens_q" in batch) == (name == "flash_attention_2")
        found = outcome(model, batch)
        torch.testing.assert_close(found.pop("loss"), expected["loss"], rtol=1e-5, atol=0)
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-5, msg=f"{name} {parameter}")


def test_a_flash_kernel_is_not_taken_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "device_of", lambda _: "cuda")
    monkeypatch.setattr(steps, "resolved", lambda *_: "float32")
    monkeypatch.setattr("cpift.pretrained.attention.importlib.util.find_spec", lambda name: name)
    with pytest.raises(CheckpointError) as refused:
        steps.require_possible(spec(base, tmp_path, attention="flash_attention_2"))
    said = [str(problem) for problem in refused.value.problems]
    assert said[0].startswith("attention: flash_attention_2 needs flash-attn, and transformers does not take")
    assert said[1].startswith("attention: flash_attention_2 computes in bfloat16, which this GPU does not")


def test_a_flash_kernel_is_told_where_examples_begin() -> None:
    packed = list(packed_rows(rows(9, 5, 31, 2), 36))
    assert [len(row["input_ids"]) for row in packed] == [16, 31]
    batch = Batches(TOKENIZER, Abilities(16, chooses=False, lengths=True))(packed)
    assert batch["input_ids"].shape == (1, 47)
    assert batch["position_ids"][0].tolist() == [*range(9), *range(5), *range(2), *range(31)]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 9, 14, 16, 47]
    assert (batch["cu_seq_lens_q"].dtype, batch["max_length_q"], batch["max_length_k"]) == (torch.int32, 31, 31)
    assert [int(batch["labels"][0, begin]) for begin in (0, 9, 14, 16)] == [-100] * 4


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
