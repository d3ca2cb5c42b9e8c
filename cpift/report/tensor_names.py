"""Where in a model a parameter lies, told by its name: the layer's number, and the kind of module."""

from __future__ import annotations

import re

KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "norm", "embed", "head", "other")

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# The first pattern that matches decides; names follow the decoder families of transformers.
_PATTERNS = (
    ("norm", r"norm|\bln_?\w*\b|layernorm"),
    ("embed", r"embed|\bwte\b|\bwpe\b"),
    ("head", r"lm_head|embed_out"),
    ("qkv", r"qkv|query_key_value|c_attn|\bWqkv\b"),
    ("q", r"\bq_proj\b|\bquery\b|\bwq\b"),
    ("k", r"\bk_proj\b|\bkey\b|\bwk\b"),
    ("v", r"\bv_proj\b|\bvalue\b|\bwv\b"),
    ("o", r"\bo_proj\b|\bout_proj\b|attn\.c_proj|attention\.dense|\bwo\b"),
    ("gate", r"\bgate_proj\b|\bw1\b"),
    ("up", r"\bup_proj\b|gate_up_proj|\bc_fc\b|\bfc1\b|\bfc_in\b|dense_h_to_4h|\bw3\b"),
    ("down", r"\bdown_proj\b|mlp\.c_proj|\bfc2\b|\bfc_out\b|dense_4h_to_h|\bw2\b"),
)


def layer_of(name: str) -> int | None:
    """The number of the block a parameter belongs to; None outside blocks (embedding, final norm, head)."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def kind_of(name: str) -> str:
    """The module kind, one of `KINDS`."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other")
