"""What config.json makes a model: the class, its modules, its tied parameters; without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpift.errors import CheckpointError
from cpift.pretrained.architecture import effective_config, kept_wide, narrowing, skeleton, tied_names

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
SMALL_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}


def folder_of(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


VISION = TINY | {"image_size": 28, "patch_size": 14}
TIED = {
    "LlamaForCausalLM": ({"model_type": "llama", **TINY}, {}),
    "Qwen2ForCausalLM": (
        {"model_type": "qwen2", "tie_word_embeddings": True, **TINY},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "Gemma2ForCausalLM": ({"model_type": "gemma2", **TINY}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "GPT2LMHeadModel": ({"model_type": "gpt2", **SMALL_GPT2}, {"lm_head.weight": "transformer.wte.weight"}),
    "GPTNeoXForCausalLM": (
        {"model_type": "gpt_neox", "tie_word_embeddings": True, **TINY},
        {"lm_head.weight": "gpt_neox.embed_in.weight"},
    ),
    "Gemma3ForConditionalGeneration": (
        {"model_type": "gemma3", "text_config": TINY, "vision_config": VISION},
        {"lm_head.weight": "model.language_model.embed_tokens.weight"},
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_the_class_decides_what_is_tied(tmp_path: Path, name: str) -> None:
    config, tied = TIED[name]
    folder = folder_of(tmp_path / "model", **config)
    assert type(skeleton(folder)).__name__ == name
    assert tied_names(folder) == tied
    assert all(parameter.is_meta for parameter in skeleton(folder).parameters())
    assert effective_config(folder)["tie_word_embeddings"] is bool(tied)


def test_the_same_text_is_built_once_and_the_class_that_is_named_wins(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", model_type="llama", **TINY)
    other = folder_of(tmp_path / "other", model_type="llama", **TINY)
    assert skeleton(one) is skeleton(other)
    for name in ("OurLlama", "LlamaModel"):  # one without a head is named by some files of language models
        unknown = folder_of(tmp_path / name, model_type="llama", architectures=[name], **TINY)
        assert type(skeleton(unknown)).__name__ == "LlamaForCausalLM"
    named = folder_of(tmp_path / "named", model_type="llama", architectures=["LlamaForTokenClassification"], **TINY)
    assert type(skeleton(named)).__name__ == "LlamaForTokenClassification"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "never_heard_of"},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "llama", **TINY, "num_attention_heads": 0},
        {"auto_map": {"AutoConfig": "configuration_x.X"}, "model_type": "x"},
        {"model_type": "vit"},
    ],
)
def test_what_transformers_cannot_build_is_said_in_a_line(tmp_path: Path, config: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        skeleton(folder_of(tmp_path / "model", **config))


def test_what_a_class_computes_in_float32_is_not_gathered_narrow(tmp_path: Path) -> None:
    routed = folder_of(tmp_path / "routed", model_type="gpt_oss", head_dim=8, num_local_experts=2, **TINY)
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert {name.split(".")[-2] for name in kept_wide(routed)} == norms
    (problem,) = narrowing(routed, "probe.gather")
    assert "computes in float32 with model.layers.0.input_layernorm.weight, …" in str(problem)
    plain = folder_of(tmp_path / "plain", model_type="llama", **TINY)
    assert (kept_wide(plain), narrowing(plain, "probe.gather")) == ([], [])
