"""Rows that hold several examples: every class that is listed gives each what it gives it alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpift.config.training import ATTENTIONS, TrainingConfig
from cpift.pretrained.attention import (
    APART,
    FLASH,
    IMPLEMENTATIONS,
    check_attention,
    keeps_apart,
    mixing,
    not_attending,
    takes_lengths,
)
from cpift.training.batches import Abilities, Batches
from tests.helpers.classes import tiny
from tests.helpers.families import make_family
from tests.helpers.flash import use_flash

LENGTHS = (9, 5, 12)


@torch.no_grad()
def logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of three examples alone, and in one row, as a fine-tune gives it to the model."""
    made = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 64, (length,), generator=made).tolist() for length in LENGTHS]
    alone = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows])
    lengths = takes_lengths(model.config)
    make = Batches(SimpleNamespace(pad_token_id=0), Abilities(1 << 20, chooses=False, lengths=lengths))  # type: ignore[arg-type]
    batch = make([{"input_ids": row, "labels": row} for row in rows])
    assert ("cu_seq_lens_q" in batch) == lengths
    inputs = {name: value for name, value in batch.items() if name not in ("attention_mask", "labels")}
    return alone, model(**inputs, use_cache=False).logits[0]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(APART))
def test_a_listed_class_keeps_examples_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    assert keeps_apart(model.config.to_dict())
    alone, together = logits(model)
    assert apart(together, alone) < 1e-4
    use_flash(monkeypatch)
    model.config._is_quantized = True  # else GPT-2, which has no linear layer, would be asked for the dtype of one
    for name in ("eager", "flash_attention_2"):
        model.config._attn_implementation = name
        for values in logits(model):
            assert (apart(values, alone) < 1e-4) == (name == "eager" or kind in FLASH), name


@pytest.mark.parametrize("kind", ["gpt_oss", "opt", "bloom"])
def test_of_others_some_do_not(kind: str) -> None:
    model = tiny(kind)
    assert not keeps_apart(model.config.to_dict())
    assert apart(*logits(model)) > 1e-3


def test_layers_of_another_kind_are_not_known(tmp_path: Path) -> None:
    assert keeps_apart({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]})
    assert not keeps_apart({"model_type": "llama", "layer_types": ["full_attention", "linear_attention"]})
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (problem,) = mixing(tmp_path, "probe.packing")
    assert str(problem).startswith("probe.packing: is true, and with model_type 'mamba' examples")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert mixing(tmp_path, "probe.packing") == []


def asked(attention: Any, **fields: Any) -> TrainingConfig:
    return TrainingConfig(steps=1, attention=attention, **fields)


@pytest.mark.parametrize(
    ("family", "fields", "refused"),
    [
        ("llama", {}, {"flex": "heads are 8 wide, and it takes 16 to"}),
        ("llama", {"head_dim": 16, "attention_dropout": 0.1}, {"flex": "drops a share of its attention"}),
        ("qwen3", {"head_dim": 512}, {"flash_attention_2": "heads are 512 wide, and it takes 1 to 256"}),
        ("gemma2", {"head_dim": 16}, {"sdpa": "transformers' Gemma2ForCausalLM has no such attention"}),
        ("qwen3", {"head_dim": 16}, {}),
        ("olmoe", {"head_dim": 16}, {"flex": "transformers' OlmoeForCausalLM has no such attention"}),
        ("gpt2", {}, {"flex": "transformers' GPT2LMHeadModel has no such attention"}),
        ("mamba", {}, dict.fromkeys(("sdpa", "flash_attention_2", "flex"), "MambaForCausalLM has no such")),
    ],
)
def test_an_attention_that_a_class_does_not_have_is_refused(
    family: str, fields: dict[str, Any], refused: dict[str, str], tmp_path: Path
) -> None:
    folder = make_family(family, tmp_path, fields)
    for name in ("auto", "eager", "sdpa", "flash_attention_2", "flex"):
        problems = [str(problem) for problem in not_attending(folder, asked(name), "probe.attention")]
        assert len(problems) == (name in refused)
        if problems:
            assert problems[0].startswith(f"probe.attention: {name}: ")
            assert refused[name] in problems[0]


def test_an_attention_that_this_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_attention([asked(name) for name in ("auto", "eager", "sdpa")], "cpu") == []
    assert set(ATTENTIONS) == set(IMPLEMENTATIONS)
    (problem,) = check_attention([asked("flex")], "cpu")
    assert str(problem).startswith("attention: flex trains on GPUs alone, and fine-tunes have none")
    assert check_attention([asked("flex")], "cuda") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check_attention([asked("flash_attention_2")], "cuda")
    assert "needs flash-attn, which is not installed" in str(problem)
    for fields, said in (({"compile": True}, "not known with compiled"), ({"precision": "float32"}, "bfloat16")):
        with pytest.raises(ValueError, match=said):
            asked("flash_attention_2", **fields)
