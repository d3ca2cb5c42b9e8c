"""Models by a formula that every machine computes alike, with a tokenizer of a few tokens: small enough to be made and
merged in any tool's own environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, INNER = 8, 12
LETTERS = ("a", "b", "c", "d", "Ġ")
SPECIAL = ("<s>", "</s>")


def make_toy(
    folder: Path,
    seed: int,
    layers: int = 3,
    tokens: Sequence[str] = (),
    rows: int = 0,
    tied: bool = False,
    **config: Any,
) -> Path:
    """A Llama in bf16. tokens: added ones, beside SPECIAL; rows: of embeddings, if there are more of them."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder, tokens)
    rows = rows or len(vocabulary)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": vocabulary["<s>"],
        "eos_token_id": vocabulary["</s>"],
    }
    (folder / "config.json").write_text(json.dumps(settings | config))
    shapes = shapes_of(layers, rows, tied)
    tensors = {name: formula(shape, 7 * seed + number) for number, (name, shape) in enumerate(shapes.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def formula(shape: Sequence[int], seed: int) -> torch.Tensor:
    """bf16, every value exact in it."""
    places = torch.arange(int(torch.tensor(shape).prod()))
    return ((((places * (31 + 2 * seed) + 17 * seed) % 61) - 30).float() / 64).view(*shape).bfloat16()


def shapes_of(layers: int, rows: int, tied: bool) -> dict[str, tuple[int, ...]]:
    square, out, back = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDTH)}
    for layer in range(layers):
        before = f"model.layers.{layer}."
        found |= {f"{before}self_attn.{name}_proj.weight": square for name in "qkvo"}
        found |= {f"{before}mlp.{name}_proj.weight": out for name in ("gate", "up")}
        found |= {f"{before}mlp.down_proj.weight": back}
        found |= {f"{before}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,)} | ({} if tied else {"lm_head.weight": (rows, WIDTH)})


def write_tokenizer(folder: Path, tokens: Sequence[str], letters: Sequence[str] = LETTERS) -> dict[str, int]:
    """A byte-level BPE tokenizer; its tokens by number."""
    vocabulary = {token: number for number, token in enumerate((*letters, "ab"))}
    added = {token: len(vocabulary) + number for number, token in enumerate((*SPECIAL, *tokens))}
    byte_level: Mapping[str, Any] = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": token in SPECIAL, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token, number in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **byte_level},
        "post_processor": {"type": "ByteLevel", **byte_level},
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": vocabulary,
            "merges": ["a b"],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return vocabulary | added
