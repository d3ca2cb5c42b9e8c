"""Where in a model a parameter lies, told by its name: the layer's number, and the kind of module."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cpift.method.changes import Change, together

KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down", "norm", "embed", "head", "other")

Cell = tuple[int | None, str]  # layer (None outside layers) and kind of module

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


def by_module(tensors: Mapping[str, Change]) -> dict[Cell, Change]:
    """Changes by layer and kind, layers first and in order; what the model does not have has no entry."""
    parts: dict[Cell, list[Change]] = {}
    for name, change in tensors.items():
        parts.setdefault((layer_of(name), kind_of(name)), []).append(change)
    order = sorted(parts, key=lambda cell: (cell[0] is None, cell[0] or 0, KINDS.index(cell[1])))
    return {cell: together(parts[cell]) for cell in order}
