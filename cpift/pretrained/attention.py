"""Which models keep the examples of one row apart: they build their mask from `position_ids` that begin again at 0.

Not all do. Recurrent layers carry their state from one example into the next, distances that are added to scores
(ALiBi) are counted through, and some classes make their mask without positions: each trains on, and what it learns of
an example depends on which others are in its row. So classes are listed, and a test compares every one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpift.errors import Problem
from cpift.pretrained.architecture import CONFIG
from cpift.untrusted.json import MODEL_CONFIG, read_object

# By `model_type`, classes of attention alone.
_APART = (
    "apertus arcee cohere cohere2 cwm deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe exaone4 flex_olmo "
    "gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium "
    "hunyuan_v1_dense hunyuan_v1_moe llama ministral ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmoe "
    "persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma"
)
APART = frozenset(_APART.split())
_ATTENTION = {"full_attention", "sliding_attention"}


def keeps_apart(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json gives each example of a row what it would give it alone."""
    layers = config.get("layer_types")
    return config.get("model_type") in APART and (layers is None or set(layers) <= _ATTENTION)


def mixing(folder: Path, where: str) -> list[Problem]:
    """Why rows of several examples cannot be given to the model in a folder; empty if they can. `where`: the field."""
    config = read_object(folder / CONFIG, MODEL_CONFIG)
    if keeps_apart(config):
        return []
    what = f"is true, and with model_type {config.get('model_type')!r} examples in one row are not known to stay apart"
    return [Problem(where, what, "write false: each example then has a row of its own")]
