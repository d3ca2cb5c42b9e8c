"""The paper's model families at toy width: trained with earlier cores frozen, on packed rows that equal single ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpift.checkpoints import Checkpoint
from cpift.config import RegionsConfig, TrainingConfig
from cpift.config_inputs import ScratchModel
from cpift.data import load_examples
from cpift.finetune import fit
from cpift.fit_spec import FitSpec, StageSpec
from cpift.models import load_model, load_tokenizer
from cpift.packing import packed
from cpift.regions import save_regions, select_regions
from cpift.scratch import make_scratch_tokenizer
from cpift.tokens import IGNORED, CompletionCollator, tokenised_dataset

from .fits import fit_spec, procedural

# What sets a family apart at any width: grouped queries, sliding windows shorter than a row, biases, tied embeddings,
# soft caps, experts. Gemma's attention heads are wider than its width divided by their number.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 12},
    "qwen2": {"num_key_value_heads": 4, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "gemma2": {"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 20},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {"num_key_value_heads": 2, "shared_expert_intermediate_size": 24, **_EXPERTS},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 12, **_EXPERTS},
    "olmoe": {"num_key_value_heads": 2, **_EXPERTS},
}
FUSED = {"qwen3_moe": "qwen3_moe, experts stacked"}  # the same model as its class has it
TASKS = (procedural("addition", "addition", 60), procedural("reverse", "reverse", 60))


def make_family(family: str, folder: Path, **saving: Any) -> Path:
    """A model of random weights and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_scratch_tokenizer(ScratchModel())
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        **size,
        **special,
        **FAMILIES[family],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return folder


PROMPT = ("llama", "mistral", "qwen2", "gemma2", "qwen3_moe")  # the others are slow together


def _families() -> list[Any]:
    return [
        family if family in PROMPT else pytest.param(family, marks=pytest.mark.slow)
        for family in [*FAMILIES, *FUSED.values()]
    ]


@pytest.fixture(scope="module", params=_families())
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = next((name for name, title in FUSED.items() if title == request.param), request.param)
    return make_family(family, tmp_path_factory.mktemp(family), save_original_format=family == request.param)


def spec(base: Path, out: Path, *stages: StageSpec, regions: Path | None = None) -> FitSpec:
    training = TrainingConfig(steps=5, batch_size=2, learning_rate=3e-3, max_length=96, packing=True, log_every=1)
    return fit_spec(base, out, TASKS, stages, training, seed=0, regions=regions)


def test_a_few_steps_lower_the_loss_and_leave_frozen_cores(base: Path, tmp_path: Path) -> None:
    probe = fit(spec(base, tmp_path / "probe", StageSpec(("addition",))))
    assert probe["log"][-1]["loss"] < probe["log"][0]["loss"]
    (tmp_path / "regions").mkdir()
    tuned = {"addition": Checkpoint(tmp_path / "probe" / "export")}
    save_regions(select_regions(Checkpoint(base), tuned, RegionsConfig(p=0.1)), tmp_path / "regions")
    stage = StageSpec(("reverse",), frozen=("addition",))
    (frozen,) = fit(spec(base, tmp_path / "next", stage, regions=tmp_path / "regions"))["frozen"]
    assert frozen["moved"] == 0
    assert frozen["elements"] == int(0.1 * Checkpoint(base).numel)


@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_packed_token_has_the_loss_that_it_has_alone(base: Path, attention: str | None) -> None:
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    if attention is not None:
        model.set_attn_implementation(attention)
    model.config.use_cache = False  # as while training
    rows = tokenised_dataset(load_examples(TASKS[1].train)[:12], tokenizer, 96)
    alone = sorted(loss for row in rows for loss in losses(model, [row], tokenizer))
    together = sorted(losses(model, list(packed(rows, 96)), tokenizer))
    assert len(together) == len(alone) > 50
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=2e-5)


@torch.no_grad()
def losses(model: Any, rows: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """Of each label of a batch."""
    batch = CompletionCollator(tokenizer)(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    kept: list[float] = found[labels.flatten() != IGNORED].tolist()
    return kept
