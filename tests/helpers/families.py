"""Model families at toy width, random weights, and what sets each apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cpift.config.inputs import ScratchModel
from cpift.models.scratch import make_scratch_tokenizer

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


ROTATIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def make_family(family: str, folder: Path, fields: Mapping[str, Any] | None = None, **saving: Any) -> Path:
    """A model of random weights and its tokenizer; `fields` in place of those of FAMILIES."""
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
        **(FAMILIES[family] if fields is None else fields),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return folder


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **IMAGES},
        "image_token_index": 3,
    },
    "qwen2_vl": {
        "text_config": {"num_key_value_heads": 2, "rope_parameters": ROTATIONS, **TEXT},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8},
    },
}
