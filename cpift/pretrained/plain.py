"""Common classes of language models by their config.json alone: parameters, shapes and what is tied, without torch.

`plain_class` answers for a config.json that holds nothing but fields of `kinds`, with values that their class takes,
and for a release of transformers that the tests compare it with. It refuses nothing: all else is asked of the class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cpift.pretrained.kinds import FIELDS, KINDS, NEEDED, Kind, whole_number
from cpift.pretrained.release import checked_release

Shape = tuple[int, ...]
_MOST_LAYERS = 1000  # a config.json may say anything


@dataclass(frozen=True)
class PlainClass:
    """What a class says of a config.json. Names are those of the class's parameters."""

    shapes: Mapping[str, Shape]  # of all, tied ones under both names
    ties: Mapping[str, str]  # tied name → the parameter that it is
    embeddings: tuple[str, ...]  # with a row for every token
    vocabulary: int
    said: Mapping[str, Any]  # config.json in one way of writing: where two are equal, they mean the same

    @property
    def own(self) -> dict[str, Shape]:
        """Of what is no other's tied name."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.ties}

    @property
    def transposed(self) -> dict[str, bool]:
        """Of every matrix product by its module's name, whether its weight is [inputs, outputs]."""
        names = [name for name, shape in self.shapes.items() if len(shape) == 2]
        return {name.removesuffix(".weight"): name == self.embeddings[0] for name in names}


@lru_cache(maxsize=16)
def plain_class(text: str) -> PlainClass | None:
    """What the class says of a config.json of this text; None where it has to be asked itself."""
    config = json.loads(text)
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None or checked_release() is None or not _takes(kind, config):
        return None
    sizes, embedding, head = sizes_of(config), "model.embed_tokens.weight", "lm_head.weight"
    shapes: dict[str, Shape] = {embedding: _shape("v h", sizes)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(kind, config, sizes).items()}
    shapes |= {"model.norm.weight": _shape("h", sizes), head: _shape("v h", sizes)}
    ties = {head: embedding} if config.get("tie_word_embeddings", kind.tied) else {}
    return PlainClass(shapes, ties, (embedding, head), config["vocab_size"], _said(kind, config, sizes))


def _layer(kind: Kind, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Shape]:
    biased = {name for said, names in kind.biased.items() if not said or config.get(said) for name in names}
    found = {f"{name}.weight": _shape(dims, sizes) for name, dims in (*kind.matrices.items(), *kind.norms.items())}
    return found | {f"{name}.bias": _shape(kind.matrices[name].split()[0], sizes) for name in biased}


def _shape(dims: str, sizes: Mapping[str, int]) -> Shape:
    return tuple(sizes[dim] for dim in dims.split())


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Dimensions: vocabulary, hidden, intermediate, of a head, of all queries, of all keys; queries, keys and values
    together (f); gate and up together (g)."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    return {"v": config["vocab_size"], "h": hidden, "i": inner, "d": head, "q": queries, "k": keys} | {
        "f": queries + 2 * keys,
        "g": 2 * inner,
    }


def _said(kind: Kind, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """config.json with some defaults of its class, and its rotary positions as newer releases write them."""
    said = {"attention_bias": False, "mlp_bias": False, **config, "head_dim": sizes["d"]}
    for name in kind.unused:
        said.pop(name, None)
    if kind.padding is None and said.get("pad_token_id") is None:
        said.pop("pad_token_id", None)
    if "rope_parameters" not in kind.fields and "rope_theta" in said:
        scaling = said.pop("rope_scaling", None) or {"rope_type": "default"}
        said["rope_parameters"] = {"rope_theta": said.pop("rope_theta"), **scaling}
    return said


def _takes(kind: Kind, config: Mapping[str, Any]) -> bool:
    """Whether every field is known, and its class makes a model of the values."""
    known = {**FIELDS, **kind.fields}
    needed = (*NEEDED, *(["head_dim"] if kind.fields.get("head_dim") is whole_number else []))
    if not all(name in known and known[name](value) for name, value in config.items()):
        return False
    if not all(name in config for name in needed) or config["architectures"] != [kind.network]:
        return False
    if "rope_parameters" in config and not config.keys().isdisjoint(("rope_scaling", "rope_theta")):
        return False
    layers = [value for name, value in config.items() if name in ("layer_types", "no_rope_layers")]
    if config["num_hidden_layers"] > _MOST_LAYERS or any(len(one) != config["num_hidden_layers"] for one in layers):
        return False
    heads, size, padding = config["num_attention_heads"], config["vocab_size"], config.get("pad_token_id", kind.padding)
    whole = config["hidden_size"] % heads == 0 and heads % config["num_key_value_heads"] == 0
    ends = config.get("eos_token_id")
    tokens = [config.get("bos_token_id"), padding, *(ends if isinstance(ends, list) else [ends])]
    return whole and all(token is None or token < size for token in tokens)
