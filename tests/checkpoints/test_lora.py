"""Adapters as PEFT computes them: every field of its config, every start, every class of module."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpift.checkpoints.checkpoint import Checkpoint
from cpift.checkpoints.lora_config import FIELDS, Neutral
from cpift.checkpoints.opening import open_checkpoint, open_models
from cpift.errors import CheckpointError

peft = pytest.importorskip("peft")
TINY: dict[str, Any] = {
    "llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 16},
}
PLAIN = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("bases")
    for kind, size in TINY.items():
        for name, tied in ((kind, False), (f"{kind}-tied", True)):
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, vocab_size=40, tie_word_embeddings=tied, attention_bias=True, **size)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
    return root


def trained(base: Path, out: Path, **settings: Any) -> Any:
    """PEFT's own model with every trainable parameter moved, and saved into `out`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **(PLAIN | settings))
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return model.eval()


@pytest.fixture(scope="module")
def plain(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without anything special."""
    folder = tmp_path_factory.mktemp("plain") / "a"
    trained(bases / "llama", folder)
    return folder


def off(model: Any, adapter: Path, base: Path) -> float:
    """How far the logits of the adapter as a checkpoint are from those of PEFT's model."""
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False).eval()
    _, models = open_models(base, {"a": adapter})
    opened = models["a"].apart()
    state = {name: opened.tensor(name) for name in opened.names}
    ours.load_state_dict(state, strict=True)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        return float((ours(ids).logits - model(ids).logits).abs().max())


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(adapter, Checkpoint(base))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "pissa_niter_2", "olora"]
)
def test_every_start_is_what_peft_computes_or_is_refused(bases: Path, tmp_path: Path, start: Any) -> None:
    model = trained(bases / "llama", tmp_path / "a", init_lora_weights=start)
    if start in FIELDS["init_lora_weights"].values:  # type: ignore[union-attr]
        assert off(model, tmp_path / "a", bases / "llama") < 1e-5
    else:
        assert "path_initial_model_for_weight_conversion" in refusal(tmp_path / "a", bases / "llama")


def test_a_start_that_was_converted_is_plain(bases: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **PLAIN)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases / "llama"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert off(model.eval(), tmp_path / "a", bases / "llama") < 1e-5


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("llama", {"use_rslora": True, "rank_pattern": {"1.mlp.down_proj": 3}, "alpha_pattern": {"^model.*q_p.*": 7}}),
        ("llama", {"bias": "all", "target_modules": "all-linear"}),
        ("llama", {"bias": "lora_only", "modules_to_save": ["norm", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "layers_to_transform": None}),
        ("llama", {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["down_proj"]}),
        ("gpt2", {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["lm_head", "c_proj"], "fan_in_fan_out": False, "bias": "all"}),
    ],
)  # fmt: skip
def test_settings_mean_what_peft_computes(bases: Path, tmp_path: Path, base: str, settings: Any) -> None:
    model = trained(bases / base, tmp_path / "a", **settings)
    assert off(model, tmp_path / "a", bases / base) < 1e-5


def test_experts_apart_and_routers_are_adapted_as_their_tensors(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    size = TINY["llama"] | {"intermediate_size": 24}
    MixtralForCausalLM(MixtralConfig(vocab_size=40, num_local_experts=4, **size)).save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    generator, factors = torch.Generator().manual_seed(0), {}
    names = [f"model.layers.0.block_sparse_moe.{name}" for name in ("experts.1.w1", "experts.3.w2", "gate")]
    for name in names:
        rows, columns = base.tensors[f"{name}.weight"].shape
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    (tmp_path / "a").mkdir()
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    _, models = open_models(tmp_path / "base", {"a": tmp_path / "a"})
    for name in names:
        b, a = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
        wanted = base.tensor(f"{name}.weight") + 2 * b @ a
        torch.testing.assert_close(models["a"].tensor(f"{name}.weight"), wanted, rtol=0, atol=1e-5)
    stacked = {"base_model.model.model.layers.0.mlp.experts.down_proj": torch.zeros(4, 16, 24)}
    save_file(stacked, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="θ0 has it as several tensors in its files → merge it with PEFT"):
        open_models(tmp_path / "base", {"a": tmp_path / "a"})


def test_the_table_has_the_fields_of_peft() -> None:
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert set(FIELDS) == set(fields)
    saved = peft.LoraConfig().to_dict()
    for name, field in FIELDS.items():
        if isinstance(field, Neutral):
            assert json.loads(json.dumps(saved[name])) in field.values, name


@pytest.mark.parametrize("name", [*(name for name, field in FIELDS.items() if isinstance(field, Neutral)), "of_2030"])
def test_every_field_that_is_not_neutral_is_named(bases: Path, plain: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(plain, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    for value in ({"x": 1}, "lora_ga", 1, [7]):
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
        assert f"adapter_config.json, {name}: is {json.dumps(value)}" in refusal(tmp_path / "a", bases / "llama")


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType])
def test_other_methods_are_refused_with_a_remedy_that_peft_has(bases: Path, tmp_path: Path, kind: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    if kind != "LORA":
        merges = hasattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "merge_and_unload")
        assert ("merge_and_unload" in refusal(tmp_path, bases / "llama")) is merges
    else:
        assert "adapter_config.json, r: is not there" in refusal(tmp_path, bases / "llama")


def test_what_training_alone_uses_is_silent(bases: Path, tmp_path: Path) -> None:
    model = trained(bases / "llama", tmp_path / "a", lora_dropout=0.5, velora_config={"num_groups": 4})
    assert off(model, tmp_path / "a", bases / "llama") < 1e-5
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")


NAMES = {
    "llama-tied": {"in": "embed_tokens", "out": "lm_head", "linear": "q_proj", "norm": "norm"},
    "gpt2-tied": {"in": "wte", "out": "lm_head", "linear": "c_attn", "norm": "ln_f"},
}
TIED = [  # targets, modules_to_save, ensure_weight_tying; whether PEFT's model has two tensors then
    (["linear"], ["in"], False, True),
    (["linear"], ["out"], False, True),
    (["linear"], ["in", "out"], False, True),
    (["linear"], ["in", "out"], True, False),
    (["out"], ["in"], False, True),
    (["linear", "in"], [], False, True),
    (["linear", "out"], [], False, True),
    (["in", "out"], [], False, True),
    (["in", "out"], [], True, False),
    (["linear"], ["norm"], False, False),
]


@pytest.mark.parametrize("base", ["llama-tied", pytest.param("gpt2-tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("targets", "whole", "ensured", "apart"), TIED)
def test_a_tied_base_is_changed_as_peft_computes_it(
    bases: Path, tmp_path: Path, base: str, targets: list[str], whole: list[str], ensured: bool, apart: bool
) -> None:
    targets, whole = ([NAMES[base][name] for name in names] for names in (targets, whole))
    model = trained(
        bases / base, tmp_path / "a", target_modules=targets, modules_to_save=whole, ensure_weight_tying=ensured
    )
    assert off(model, tmp_path / "a", bases / base) < 2e-5
    pretrained, models = open_models(bases / base, {"a": tmp_path / "a"})
    assert pretrained.names == models["a"].names
    assert pretrained.is_apart is apart


@pytest.mark.slow
@pytest.mark.parametrize(("base", "tokens"), [("llama", 43), ("llama-tied", 37), ("llama-tied", 43)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
def test_resized_embeddings_fit_where_asked_for(
    bases: Path, tmp_path: Path, base: str, settings: dict[str, Any], tokens: int
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(bases / base)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **(PLAIN | settings)))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    both = min(tokens, 40)
    rows = adapted.get_input_embeddings()(torch.arange(both)).detach()
    head = adapted.get_output_embeddings()(torch.eye(16)).detach().T[:both]
    pretrained, models = open_models(bases / base, {"a": tmp_path / "a"}, "base")
    fitted = models["a"].apart() if pretrained.is_apart else models["a"]
    last = "lm_head.weight" if "lm_head.weight" in fitted.tensors else "model.embed_tokens.weight"
    for name, wanted in (("model.embed_tokens.weight", rows), (last, head)):
        torch.testing.assert_close(fitted.tensor(name)[:both], wanted, rtol=0, atol=1e-5)
        assert torch.equal(fitted.tensor(name)[both:], pretrained.tensor(name)[both:])
        assert fitted.tensors[name].shape == (40, 16)
    _, as_it_is = open_models(bases / base, {"a": tmp_path / "a"})
    assert as_it_is["a"].tensors["model.embed_tokens.weight"].shape == (tokens, 16)
