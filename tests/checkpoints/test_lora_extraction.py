"""A full fine-tune as an adapter: what PEFT and cpift make of it is the fine-tune, but for what its record says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpift.checkpoints.adapters import factors
from cpift.checkpoints.lora_extraction import RECORD, Extraction, extract_lora
from cpift.checkpoints.opening import open_models
from cpift.disk.files import read_json
from cpift.errors import CheckpointError

peft = pytest.importorskip("peft")
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen2": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16},
}
KINDS = [(kind, tied) for kind in SIZES for tied in (False, True)]
FULL = 64  # more than any matrix here has


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """θ0 of each kind, and beside it a fine-tune in which every parameter moved, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    for kind, tied in KINDS:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=40, tie_word_embeddings=tied, **SIZES[kind])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(root / f"{kind}-{tied}")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / f"{kind}-{tied}-tuned")
    return root


def made(base: Path, tuned: Path, out: Path, rank: int) -> Extraction:
    out.mkdir()
    return extract_lora(base, tuned, out, rank)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(40)[None]).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_at_full_rank_the_adapter_is_the_fine_tune(kind: str, tied: bool, models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, tuned = models / f"{kind}-{tied}", models / f"{kind}-{tied}-tuned"
    record = made(base, tuned, tmp_path / "adapter", FULL)
    assert record.relative < 1e-5
    pretrained, opened = open_models(base, {"adapter": tmp_path / "adapter", "tuned": tuned})
    for name in pretrained.names:
        assert torch.allclose(opened["adapter"].tensor(name), opened["tuned"].tensor(name), atol=1e-6), name
    ours = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(logits(ours), logits(AutoModelForCausalLM.from_pretrained(tuned)), atol=1e-4)


def test_the_record_says_what_the_rank_lost(models: Path, tmp_path: Path) -> None:
    base, tuned = models / "llama-False", models / "llama-False-tuned"
    record = made(base, tuned, tmp_path / "adapter", 3)
    assert read_json(tmp_path / "adapter" / RECORD)["relative"] == record.relative
    pretrained, opened = open_models(base, {"adapter": tmp_path / "adapter", "tuned": tuned})
    lost = {f"{one.module}.weight": one for one in record.modules}
    assert len(lost) == 2 + 2 * 7
    for name, one in lost.items():
        change = (opened["tuned"].tensor(name) - pretrained.tensor(name)).double()
        singular = torch.linalg.svdvals(change)
        assert one.lost == pytest.approx(float(singular[3:].norm()), rel=1e-4)  # no product of rank 3 is closer
        assert one.change == pytest.approx(float(singular.norm()), rel=1e-6)
        difference = opened["tuned"].tensor(name) - opened["adapter"].tensor(name)
        assert float(difference.norm()) == pytest.approx(one.lost, rel=1e-4)
    assert set(record.whole) == {f"model.{one}.weight" for one in NORMS}


NORMS = ["norm", *(f"layers.{n}.{one}_layernorm" for n in (0, 1) for one in ("input", "post_attention"))]


def test_what_was_adapted_comes_back(models: Path, tmp_path: Path) -> None:
    """An adapter that was merged: its rank is enough, and what it did not touch is in no file."""
    from transformers import AutoModelForCausalLM

    base, settings = models / "llama-True", {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    record = made(base, tmp_path / "tuned", tmp_path / "adapter", 4)
    assert record.relative < 1e-4
    assert {one.module.rpartition(".")[2] for one in record.modules} == {"q_proj", "up_proj"}
    assert record.whole == ()


@pytest.mark.parametrize("rows", [1, 7, 1500])
def test_factors_of_any_shape(rows: int) -> None:
    torch.manual_seed(2)
    change = torch.randn(rows, 5) @ torch.randn(5, 1300) + 1e-3 * torch.randn(rows, 1300)
    left, right = factors(change, 5)
    assert (left.shape, right.shape) == ((rows, 5), (5, 1300))
    best = float(torch.linalg.svdvals(change.double())[5:].norm())
    assert float((change - left @ right).norm()) <= 1.01 * best + 1e-4
    again = factors(change, 5)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])


def test_a_matrix_of_lower_rank_has_zero_columns() -> None:
    left, right = factors(torch.ones(3, 4), 8)
    assert torch.allclose(left @ right, torch.ones(3, 4), atol=1e-6)
    assert not left[:, 3:].any()


def changed(models: Path, tmp_path: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(models / "llama-False", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}, file)
    return tmp_path / "other"


def test_what_cannot_be_extracted_is_named(models: Path, tmp_path: Path) -> None:
    base, out = models / "llama-False", tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="has the same weights as its base"):
        made(base, base, out, 4)
    broken = changed(models, tmp_path, model__norm__weight=torch.full((16,), torch.nan))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds NaN or infinity"):
        extract_lora(base, broken, out, 4)
    with pytest.raises(CheckpointError, match="gpt2"):
        extract_lora(base, models / "gpt2-False-tuned", out, 4)
    assert not list(out.iterdir())


def test_another_vocabulary_is_another_layout(models: Path, tmp_path: Path) -> None:
    longer = changed(models, tmp_path, model__embed_tokens__weight=torch.zeros(44, 16))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        made(models / "llama-False", longer, tmp_path / "adapter", 4)


def test_a_rank_is_at_most_that_of_the_largest_matrix(models: Path, tmp_path: Path) -> None:
    base = models / "llama-False"
    record = made(base, models / "llama-False-tuned", tmp_path / "adapter", 10**9)
    assert record.rank == min(load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape)
    assert record.relative < 1e-4


def test_a_bias_of_a_weight_that_stayed_is_loaded(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = models / "qwen2-False"
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.bias", "o_proj.weight")):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    made(base, tmp_path / "tuned", tmp_path / "adapter", FULL)
    ours = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(logits(ours), logits(model), atol=1e-5)


def test_norms_alone_are_no_adapter(models: Path, tmp_path: Path) -> None:
    tuned = changed(models, tmp_path, model__norm__weight=torch.full((16,), 2.0))
    with pytest.raises(CheckpointError, match="norms or biases alone are no LoRA adapter"):
        made(models / "llama-False", tuned, tmp_path / "adapter", 4)


@pytest.mark.parametrize("kind", ["gpt_oss"])
def test_what_no_adapter_can_hold_is_named(kind: str, tmp_path: Path) -> None:
    """GPT-OSS has sinks, a parameter of the attention itself, and experts that are stacked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_experts_per_tok=1, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"sinks: changed, and lies in a module with adapted ones"):
        made(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", 4)
