"""config.json of the models whose classes are known without asking them, at toy width."""

from __future__ import annotations

from typing import Any

from cpift.pretrained.kinds import FIELDS, KINDS

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A config of a kind, with those of the changes that it has fields for."""
    known = {**FIELDS, **KINDS[kind].fields}
    own = {"model_type": kind, "architectures": [KINDS[kind].network]}
    whole = {"head_dim": 8} if "head_dim" in known else {}
    return SIZES | own | whole | {name: value for name, value in changes.items() if name in known}
