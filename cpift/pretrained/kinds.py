"""Common classes of language models: their layers, and the fields and values of config.json that each is known to take.

Nothing is refused by these tables: `plain.plain_class` asks the class itself about whatever is not in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A class, by its `model_type`. Dimensions: `plain.sizes_of`."""

    network: str
    matrices: Mapping[str, str]  # of a layer → outputs and inputs
    norms: Mapping[str, str]  # of a layer
    fields: Mapping[str, Callable[[Any], bool]]  # beside FIELDS
    biased: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by the field that says so: which matrices
    tied: bool = False  # where config.json does not say
    padding: int | None = None  # the padding token, where it does not say
    unused: tuple[str, ...] = ()  # fields that are of no use with the values that FIELDS and `fields` let pass


def whole_number(value: Any) -> bool:
    return type(value) is int and value > 0


def _whole_or_none(value: Any) -> bool:
    return value is None or whole_number(value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _small(value: Any) -> bool:
    return type(value) is float and 0 < value <= 1


def _fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _flag(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str


def _token(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _tokens(value: Any) -> bool:
    return _token(value) or (type(value) is list and bool(value) and all(map(_token, value)) and None not in value)


def _decimal(value: Any) -> bool:
    return type(value) is float and 0 < value < float("inf")


def _decimal_or_none(value: Any) -> bool:
    return value is None or _decimal(value)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == one and type(value) is type(one) for one in values)


def _list_of(*values: Any) -> Callable[[Any], bool]:
    one_of = _one_of(*values)
    return lambda value: type(value) is list and all(map(one_of, value))


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _as_it_is(value: Any) -> bool:
    """Rotary positions without any scaling."""
    return (
        isinstance(value, dict)
        and set(value) == {"rope_theta", "rope_type"}
        and value["rope_type"] == "default"
        and _number(value["rope_theta"])
    )


def _as_llama3(value: Any) -> bool:
    """The scaling of Llama 3."""
    if not isinstance(value, dict) or set(value) != {"rope_type", *_LLAMA3} or value["rope_type"] != "llama3":
        return False
    factor, low, high, places = (value[name] for name in _LLAMA3)
    return all(map(_decimal, (factor, low, high))) and factor >= 1 and low < high and whole_number(places)


def _rope(value: Any) -> bool:
    if _as_it_is(value) or not isinstance(value, dict):
        return _as_it_is(value)
    rest = {name: one for name, one in value.items() if name != "rope_theta"}
    return _number(value.get("rope_theta")) and _as_llama3(rest)


def _rope_of_two(value: Any) -> bool:
    """Of layers that see all and of those that see a window."""
    kinds = {"full_attention", "sliding_attention"}
    return isinstance(value, dict) and set(value) == kinds and all(map(_as_it_is, value.values()))


def _rope_in_part(value: Any) -> bool:
    """With the part of a head that is turned: all of it."""
    whole = isinstance(value, dict) and value.get("partial_rotary_factor") == 1.0
    return whole and _as_it_is({name: one for name, one in value.items() if name != "partial_rotary_factor"})


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), whole_number),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), whole_number),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "unk_token_id"), _token),
    **dict.fromkeys(("dtype", "torch_dtype"), _one_of("bfloat16", "float16", "float32")),
    **dict.fromkeys(("model_type", "transformers_version", "_name_or_path", "_model_name_or_path"), _text),
    **dict.fromkeys(("use_cache", "tie_word_embeddings"), _flag),
    "architectures": lambda value: type(value) is list and len(value) == 1,
    "attention_dropout": _fraction,
    "eos_token_id": _tokens,
    "initializer_range": _small,
    "rms_norm_eps": _small,
    "rope_parameters": _rope,
    "rope_scaling": lambda value: value is None or _as_llama3(value),
    "rope_theta": _number,
}
NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "architectures"),
)
_SILU = {"hidden_act": _one_of("silu")}
_WINDOW = {"sliding_window": _whole_or_none}
_QKV = {"self_attn.q_proj": "q h", "self_attn.k_proj": "k h", "self_attn.v_proj": "k h"}
_GATED = {"mlp.gate_proj": "i h", "mlp.up_proj": "i h", "mlp.down_proj": "h i"}
_LLAMA = {**_QKV, "self_attn.o_proj": "h q", **_GATED}
_TWO = {"input_layernorm": "h", "post_attention_layernorm": "h"}
_FOUR = {**_TWO, "pre_feedforward_layernorm": "h", "post_feedforward_layernorm": "h"}
_HEADS = {"self_attn.q_norm": "d", "self_attn.k_norm": "d"}
_ATTENTION = {"attention_bias": (*_QKV, "self_attn.o_proj")}
_TANH = _one_of("gelu_pytorch_tanh")
_GEMMA = {
    "hidden_act": _TANH,
    "hidden_activation": _TANH,
    "attention_bias": _flag,
    "head_dim": whole_number,
    "use_bidirectional_attention": _one_of(None, False),
}
_GEMMA2 = {
    **_WINDOW,
    "layer_types": _list_of("full_attention", "sliding_attention"),
    "cache_implementation": _one_of("hybrid"),
    "attn_logit_softcapping": _decimal_or_none,
    "final_logit_softcapping": _decimal_or_none,
    "query_pre_attn_scalar": whole_number,
}
_QWEN = {
    **_SILU,
    **_WINDOW,
    "use_sliding_window": _one_of(False),
    "layer_types": _list_of("full_attention"),
    "max_window_layers": whole_number,
}
_NO_WINDOW = ("sliding_window", "use_sliding_window", "layer_types")

KINDS: Mapping[str, Kind] = {
    "llama": Kind(
        "LlamaForCausalLM",
        _LLAMA,
        _TWO,
        {
            **_SILU,
            **dict.fromkeys(("attention_bias", "mlp_bias", "is_llama_config"), _flag),
            "head_dim": _whole_or_none,
            "pretraining_tp": whole_number,
            "rope_interleaved": _one_of(False),
        },
        biased={**_ATTENTION, "mlp_bias": tuple(_GATED)},
    ),
    "mistral": Kind("MistralForCausalLM", _LLAMA, _TWO, {**_SILU, **_WINDOW, "head_dim": _whole_or_none}),
    "qwen2": Kind("Qwen2ForCausalLM", _LLAMA, _TWO, _QWEN, biased={"": tuple(_QKV)}, unused=_NO_WINDOW),
    "qwen3": Kind(
        "Qwen3ForCausalLM",
        _LLAMA,
        {**_TWO, **_HEADS},
        {**_QWEN, "attention_bias": _flag, "head_dim": whole_number},
        biased=_ATTENTION,
        unused=_NO_WINDOW,
    ),
    "gemma": Kind("GemmaForCausalLM", _LLAMA, _TWO, _GEMMA, biased=_ATTENTION, tied=True, padding=0),
    "gemma2": Kind("Gemma2ForCausalLM", _LLAMA, _FOUR, {**_GEMMA, **_GEMMA2}, biased=_ATTENTION, tied=True, padding=0),
    "gemma3_text": Kind(
        "Gemma3ForCausalLM",
        _LLAMA,
        {**_FOUR, **_HEADS},
        {
            **_GEMMA,
            **_GEMMA2,
            **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), whole_number),
            "rope_local_base_freq": _number,
            "rope_parameters": _rope_of_two,
            "rope_scaling": _one_of(None),
        },
        biased=_ATTENTION,
        tied=True,
        padding=0,
    ),
    "phi3": Kind(
        "Phi3ForCausalLM",
        {"self_attn.o_proj": "h q", "self_attn.qkv_proj": "f h", "mlp.gate_up_proj": "g h", "mlp.down_proj": "h i"},
        _TWO,
        {
            **_SILU,
            **_WINDOW,
            **dict.fromkeys(("embd_pdrop", "resid_pdrop"), _fraction),
            "original_max_position_embeddings": whole_number,
            "rope_parameters": _rope_in_part,
            "rope_scaling": _one_of(None),
        },
        padding=32000,
    ),
    "olmo2": Kind(
        "Olmo2ForCausalLM",
        _LLAMA,
        {"post_attention_layernorm": "h", "post_feedforward_layernorm": "h"}
        | {"self_attn.q_norm": "q", "self_attn.k_norm": "k"},
        {**_SILU, "attention_bias": _flag},
        biased=_ATTENTION,
        padding=1,
    ),
    "smollm3": Kind(
        "SmolLM3ForCausalLM",
        _LLAMA,
        _TWO,
        {
            **_QWEN,
            **dict.fromkeys(("attention_bias", "mlp_bias"), _flag),
            **dict.fromkeys(("no_rope_layer_interval", "pretraining_tp"), whole_number),
            "no_rope_layers": _list_of(0, 1),
        },
        biased={**_ATTENTION, "mlp_bias": tuple(_GATED)},
        tied=True,
        padding=128004,
        unused=("use_sliding_window", "layer_types"),
    ),
    "granite": Kind(
        "GraniteForCausalLM",
        _LLAMA,
        _TWO,
        {
            **_SILU,
            **dict.fromkeys(("attention_bias", "mlp_bias"), _flag),
            **dict.fromkeys(("embedding_multiplier", "logits_scaling"), _decimal),
            **dict.fromkeys(("residual_multiplier", "attention_multiplier"), _decimal),
        },
        biased={**_ATTENTION, "mlp_bias": tuple(_GATED)},
    ),
}
