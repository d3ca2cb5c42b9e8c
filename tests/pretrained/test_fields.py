"""What config.json's fields do, by the models of transformers: every field of the families is in the table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.pretrained import fields as model_fields
from cpift.pretrained.architecture import model_config, reads_field, skeleton
from cpift.pretrained.fields import FIELDS, computing_problems, setting_notes

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
MOE = {"num_key_value_heads": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**MOE, "num_experts": 4, "head_dim": 8},
    "olmoe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {},
    "falcon": {},
}
# Read elsewhere, or another kind of answer instead of other logits.
KEPT = {"vocab_size", "tie_word_embeddings", "return_dict", "output_attentions", "output_hidden_states"}
KEPT |= {"output_router_logits"}


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value + 0.25 if isinstance(value, float) else None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_known_and_silent_ones_change_no_logit(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"vocab_size": 40} if family == "gpt2" else SIZE
    config = AutoConfig.for_model(family, **{**size, "bos_token_id": 0, "eos_token_id": 0, **FAMILIES[family]})
    fields = config.to_dict()
    assert set(fields) <= set(FIELDS), set(fields) - set(FIELDS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(1, 30)[None]
    silent = copy.deepcopy(config)
    new = {name: other_value(value) for name, value in fields.items() if FIELDS[name] == "silent" and name not in KEPT}
    new = {name: value for name, value in new.items() if value is not None}
    assert new
    for name, value in new.items():
        setattr(silent, name, value)
    other = AutoModelForCausalLM.from_config(silent, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=1e-6)


def folder_of(folder: Path, family: str, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": family, "initializer_range": 0.5, **SIZE, **FAMILIES.get(family, {}), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("llama", {"rope_theta": 500000.0}, "rope_parameters"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rms_norm_eps": 0.5}, "rms_norm_eps"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("mistral", {"sliding_window": 4}, "sliding_window"),
        ("gemma2", {"attn_logit_softcapping": 0.1}, "attn_logit_softcapping"),
        ("gemma2", {"query_pre_attn_scalar": 1}, "query_pre_attn_scalar"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ],
)
def test_what_computes_otherwise_is_a_problem(tmp_path: Path, family: str, changes: Any, field: str) -> None:
    base, tune = folder_of(tmp_path / "base", family), folder_of(tmp_path / "tune", family, **changes)
    assert [problem.where for problem in computing_problems(base, tune)] == [f"config.json, {field}"]
    models = [type(skeleton(folder))(model_config(folder)).eval() for folder in (base, tune)]
    models[1].load_state_dict(models[0].state_dict())
    logits = [model(torch.arange(1, 30)[None]).logits for model in models]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("rwkv", "rescale_every", 3),
        ("llama", "rms_norm_eps", 0.5),
        ("gpt2", "n_inner", 8),
        ("llama", "of_2030", 1),
        ("llama", "pretraining_tp", 2),
    ],
)
def test_a_field_in_no_table_is_a_problem_where_the_class_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, field: str, value: Any
) -> None:
    monkeypatch.setattr(model_fields, "FIELDS", {name: does for name, does in FIELDS.items() if name != field})
    base, tune = folder_of(tmp_path / "base", family), folder_of(tmp_path / "tune", family, **{field: value})
    read = field not in ("of_2030", "pretraining_tp")
    assert [problem.where for problem in computing_problems(base, tune)] == [f"config.json, {field}"] * read
    assert [note.split(" is ")[0] for note in setting_notes(base, tune)] == [f"config.json, {field}"] * (not read)


def test_a_field_is_read_under_its_other_name_too(tmp_path: Path) -> None:
    assert reads_field(folder_of(tmp_path / "base", "gpt2"), "n_head")  # as config.num_attention_heads


def test_another_class_is_one_problem(tmp_path: Path) -> None:
    (problem,) = computing_problems(folder_of(tmp_path / "base", "llama"), folder_of(tmp_path / "tune", "qwen3"))
    assert problem.where == "config.json, model_type"


def test_the_same_values_written_otherwise_are_no_difference(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", "llama", torch_dtype="bfloat16", use_cache=True)
    said = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False}
    tune = folder_of(tmp_path / "tune", "llama", dtype="float32", use_cache=False, transformers_version="4.30", **said)
    assert computing_problems(base, tune) == []
    assert list(setting_notes(base, tune)) == []


def test_what_may_be_meant_or_is_not_known_is_told(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", "llama")
    tune = folder_of(tmp_path / "tune", "llama", max_position_embeddings=64, eos_token_id=[3, 4], of_2030={"a": 1})
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 1.0, "do_sample": True}))
    (tune / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "do_sample": True, "x": 1}))
    assert computing_problems(base, tune) == []
    notes = list(setting_notes(base, tune))
    assert [note.split(" is ")[0] for note in notes] == [
        "config.json, eos_token_id",
        "config.json, max_position_embeddings",
        "config.json, of_2030",
        "generation_config.json, eos_token_id",
        "generation_config.json, x",
    ]
