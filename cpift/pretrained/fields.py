"""Every field of `config.json` and `generation_config.json`: what it means where a tune's differs from θ0's.

The fused model has the backbone's files. A field by which a model computes makes a tune's weights wrong under them: an
error. So does a field that is in no table and that the model's class reads. A field that may be meant, or that nobody
reads, is told. Values are compared with the class's defaults filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpift.disk.facts import remembered
from cpift.errors import CheckpointError, Problem
from cpift.pretrained.architecture import effective_config, known_class, reads_field
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object

Effect = Literal["computes", "meant", "silent"]
GENERATION = "generation_config.json"

_COMPUTES = {
    "size": (
        "hidden_size intermediate_size num_hidden_layers n_embd n_layer n_layers n_inner d_model ffn_dim "
        "ffn_hidden_size expansion_ratio word_embed_proj_dim intermediate_size_mlp hidden_size_per_layer_input "
        "num_layers encoder_layers decoder_layers encoder_ffn_dim decoder_ffn_dim dff attention_hidden_size lru_width "
        "shared_intermediate_size block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim laurel_rank "
        "altup_num_inputs altup_active_idx altup_coef_clip altup_correct_scale"
    ),
    "attention": (
        "num_attention_heads num_key_value_heads n_head n_heads num_heads num_kv_heads head_dim global_head_dim "
        "attention_bias use_bias qkv_bias use_qkv_bias bias no_bias enable_bias sliding_window use_sliding_window "
        "max_window_layers layer_types _sliding_window_pattern sliding_window_pattern attention_chunk_size "
        "query_pre_attn_scalar attn_logit_softcapping qk_layernorm use_qk_norm clip_qkv multi_query alibi "
        "attn_config scale_attn_weights scale_attn_by_inverse_layer_idx attention_multiplier "
        "use_bidirectional_attention is_causal attn_temperature_tuning floor_scale attn_scale kv_lora_rank "
        "q_lora_rank qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim num_kv_shared_layers "
        "attention_types attention_layers window_size is_decoder add_cross_attention block_size "
        "full_attn_alpha_factor full_attn_beta_factor linear_attn_alpha_factor linear_attn_beta_factor "
        "mlp_alpha_factor mlp_beta_factor full_attention_interval encoder_attention_heads decoder_attention_heads "
        "kv_channels attention_out_bias attn_layer_period attn_layer_offset attn_layer_indices attention_window_size "
        "block_types full_attn_idxs"
    ),
    "positions": (
        "rope_parameters rope_theta rope_scaling rope_local_base_freq rotary_pct rotary_dim rotary_emb_base "
        "partial_rotary_factor no_rope_layers no_rope_layer_interval rope_interleave "
        "original_max_position_embeddings learned_pos_emb position_embedding_type n_positions n_ctx max_seq_len "
        "embedding_fraction"
    ),
    "norms and activations": (
        "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon norm_type hidden_act "
        "hidden_activation activation_function activation layer_norm_elementwise_affine do_layer_norm_before "
        "_remove_final_layer_norm apply_residual_connection_post_layernorm use_parallel_residual parallel_attn "
        "new_decoder_architecture num_ln_in_parallel_attn mlp_bias swiglu_alpha swiglu_limit "
        "activation_sparsity_pattern afn mixer_rms_eps"
    ),
    "scales": (
        "final_logit_softcapping logit_scale logits_scaling embedding_multiplier residual_multiplier lm_head_bias "
        "scale_depth scale_emb dim_model_base scale_embedding logits_soft_cap"
    ),
    "experts": (
        "num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok norm_topk_prob "
        "moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step mlp_only_layers moe_layers "
        "interleave_moe_layer_step routed_scaling_factor n_group topk_group first_k_dense_replace scoring_func "
        "topk_method moe_topk moe_k moe_num_experts moe_num_shared_experts num_shared_experts moe_layer_start_index "
        "moe_layer_end_index moe_layer_interval moe_norm_min moe_renormalize num_expert_group num_experts_per_token "
        "mlp_layer_types expert_layer_period expert_layer_offset"
    ),
    "state spaces": (
        "state_size expand conv_kernel use_conv_bias time_step_rank residual_in_fp32 intermediate_conv "
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
        "linear_num_value_heads linear_head_dim linear_num_heads n_groups time_step_limit mamba_n_heads mamba_d_head "
        "mamba_n_groups mamba_d_state mamba_d_conv mamba_expand mamba_dt_rank mamba_conv_bias mamba_proj_bias "
        "conv_bias conv_L_cache conv1d_width"
    ),
    "class": ("model_type is_encoder_decoder"),
}
_MEANT = {
    "how long a text may be; with some rotary scalings, also positions": ("max_position_embeddings"),
    "where texts begin and end": (
        "bos_token_id eos_token_id pad_token_id eod_token_id sep_token_id decoder_start_token_id"
    ),
}
_SILENT = {
    "read elsewhere: fusion.vocabulary, tied tensors, quantisation, code": (
        "vocab_size tie_word_embeddings quantization_config compression_config auto_map architectures"
    ),
    "while training only": (
        "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop emb_pdrop hidden_dropout_prob "
        "attention_probs_dropout_prob resid_dropout residual_dropout embedding_dropout dropout layerdrop "
        "classifier_dropout router_aux_loss_coef output_router_logits router_jitter_noise input_jitter_noise "
        "num_nextn_predict_layers aux_loss_alpha aux_loss_coef z_loss_coefficient seq_aux activation_dropout "
        "embed_dropout encoder_layerdrop decoder_layerdrop"
    ),
    "how weights start": (
        "initializer_range init_std init_device time_step_scale time_step_min time_step_max time_step_init_scheme "
        "time_step_floor rescale_prenorm_residual init_method lambda_std_dev w_init_variance_scale "
        "final_w_init_variance_scale"
    ),
    "the same values in another way": (
        "use_cache pretraining_tp slow_but_exact chunk_size_feed_forward use_mambapy use_associative_scan "
        "reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32 dtype torch_dtype "
        "attn_implementation _attn_implementation _attn_implementation_autoset experts_implementation "
        "num_logits_to_keep use_mamba_kernels mamba_chunk_size chunk_size"
    ),
    "labels": (
        "_name_or_path transformers_version id2label label2id problem_type return_dict output_attentions "
        "output_hidden_states summary_type summary_use_proj summary_activation summary_proj_to_labels "
        "summary_first_dropout unsloth_version unsloth_fixed task_specific_params use_return_dict torchscript"
    ),
}
_GENERATION_SILENT = (
    "transformers_version _from_model_config use_cache return_dict_in_generate output_attentions output_hidden_states "
    "output_scores output_logits cache_implementation cache_config compile_config disable_compile trust_remote_code"
)
_KINDS: Mapping[Effect, Mapping[str, str]] = {"computes": _COMPUTES, "meant": _MEANT, "silent": _SILENT}
FIELDS: Mapping[str, Effect] = {
    name: effect for effect, kinds in _KINDS.items() for names in kinds.values() for name in names.split()
}


@dataclass(frozen=True)
class Difference:
    """A field in which a tune differs from θ0; None where one of them has no such field."""

    field: str
    mine: Any
    theirs: Any
    effect: Effect

    @property
    def what(self) -> str:
        return f"is {_short(self.theirs)}, in θ0 {_short(self.mine)}"


def computing_problems(base: Path, tune: Path) -> list[Problem]:
    """Fields by which the tune computes otherwise than θ0: its weights are wrong in a model with θ0's."""
    remedy = (
        "give tunes that compute as θ0 does; if this one was trained with θ0's value, write that into its config.json"
    )
    differences = [difference for difference in config_differences(base, tune) if difference.effect == "computes"]
    for difference in differences:
        if difference.field == "model_type":  # all else follows from it
            return [Problem(f"config.json, {difference.field}", difference.what, "use fine-tunes of one model")]
    return [Problem(f"config.json, {difference.field}", difference.what, remedy) for difference in differences]


def tower_problems(base: Path, tune: Path) -> list[Problem]:
    """Fields by which a text-only model computes otherwise than the language model inside θ0: those of the table that
    both have. The kind's name differs, and so do rotary sections, which are alike for text."""
    mine, theirs = effective_config(base).get("text_config"), effective_config(tune)
    if not isinstance(mine, dict):
        return [Problem("config.json", "of θ0 has no text_config", "give a θ0 that has a language model inside")]
    mine, theirs = _of_text(mine), _of_text(theirs)
    remedy = "give a fine-tune of this very language model"
    return [
        Problem(f"config.json, {one.field}", f"of the text model {one.what}", remedy)
        for one in _differences(mine, theirs, lambda name: FIELDS.get(name, "meant"))
        if one.effect == "computes" and one.field in mine and one.field in theirs
    ]


def _of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    rotary = config.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary:
        plain = rotary.get("rope_type", "default") in ("default", "mrope")
        kept = {name: value for name, value in rotary.items() if name != "mrope_section"}
        rotary = kept | ({"rope_type": "default"} if plain else {})
    return {name: value for name, value in config.items() if name != "model_type"} | {"rope_parameters": rotary}


def setting_notes(base: Path, tune: Path) -> Iterator[str]:
    """Differences that may be meant; the fused model has the backbone's values."""
    for difference in config_differences(base, tune):
        if difference.effect == "meant":
            yield f"config.json, {difference.field} {difference.what}; the fused model has the backbone's"
    for difference in generation_differences(base, tune):
        yield f"{GENERATION}, {difference.field} {difference.what}; the fused model has the backbone's"


def config_differences(base: Path, tune: Path) -> list[Difference]:
    """Every field in which config.json of two folders differs and that is not silent; none where the tune has no such
    file. Raises CheckpointError."""
    if not (tune / "config.json").is_file():
        return []
    if (base / "config.json").read_bytes() == (tune / "config.json").read_bytes():
        return []
    if _known_alike(base, tune):
        return []
    return list(_differences(effective_config(base), effective_config(tune), lambda name: _effect(base, name)))


def _known_alike(base: Path, tune: Path) -> bool:
    """Whether two config.json of a class that need not be asked differ in silent fields alone."""
    mine, theirs = known_class(base), known_class(tune)
    if mine is None or theirs is None:
        return False
    names = {name for name in (*mine.said, *theirs.said) if FIELDS.get(name) != "silent"}
    both = [{name: known.said[name] for name in names if name in known.said} for known in (mine, theirs)]
    return both[0] == both[1]


def _effect(base: Path, name: str) -> Effect:
    """What a field means, by the table; of one that is not in it, by whether the class of θ0 reads it."""
    return FIELDS.get(name) or ("computes" if reads_field(base, name) else "meant")


def generation_differences(base: Path, tune: Path) -> list[Difference]:
    """Every field in which generation_config.json of two folders differs, defaults filled in."""
    mine, theirs = (_generation(folder) for folder in (base, tune))
    if mine == theirs:
        return []
    mine, theirs = (_without_defaults(settings) for settings in (mine, theirs))
    return [
        Difference(name, mine.get(name), theirs.get(name), "meant")
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def fields_table() -> str:
    """The table of docs/supported.md."""
    happens = {
        "computes": "an error of `plan`: the tune computes otherwise",
        "meant": "told by `plan`; the fused model has the backbone's",
        "silent": "no influence on the merged weights, or read elsewhere",
    }
    rows = ["| where a tune differs from θ0 in | fields | what happens |", "|---|---|---|"]
    for effect, kinds in _KINDS.items():
        for kind, names in kinds.items():
            listed = ", ".join(f"`{name}`" for name in names.split())
            rows.append(f"| {kind} | {listed} | {happens[effect]} |")
    rows.append(f"| what the code of the model's class reads | any other | {happens['computes']} |")
    rows.append("| anything else in `config.json` | any other | told by `plan`, as what may be meant |")
    listed = ", ".join(f"`{name}`" for name in _GENERATION_SILENT.split())
    rows.append(f"| `{GENERATION}` | all but {listed} | told by `plan`; the fused model has the backbone's |")
    rows.append(
        "| the chat template | | told by `plan`; the fused model has the backbone's, or the tunes' if it has none |"
    )
    return "\n".join(rows)


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], effect_of: Callable[[str], Effect], prefix: str = ""
) -> Iterator[Difference]:
    for name in sorted(mine.keys() | theirs.keys()):
        one, other = _plain(mine.get(name)), _plain(theirs.get(name))
        if name.endswith("_config") and isinstance(one, dict) and isinstance(other, dict) and name not in FIELDS:
            yield from _differences(one, other, effect_of, f"{prefix}{name}.")
        elif one != other and (effect := effect_of(name)) != "silent":
            yield Difference(f"{prefix}{name}", one, other, effect)


def _plain(value: Any) -> Any:
    """A value as JSON has it; rotary settings without the older name of their kind."""
    if isinstance(value, dict):
        return {
            str(key): _plain(element) for key, element in value.items() if not (key == "type" and "rope_type" in value)
        }
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value


def _generation(folder: Path) -> dict[str, Any]:
    """Settings of generation: the file's, or what transformers takes from config.json where there is no file."""
    file = folder / GENERATION
    try:
        config = read_object(file, MODEL_CONFIG) if file.is_file() else _from_config(folder)
    except UnreadableError as error:
        raise CheckpointError(f"model {folder}", [error.problem(GENERATION)]) from error
    silent = _GENERATION_SILENT.split()
    return {name: value for name, value in config.items() if value is not None and name not in silent}


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    defaults = remembered("generation defaults", [], _generation_defaults)
    return {name: value for name, value in settings.items() if value != defaults.get(name)}


def _generation_defaults() -> dict[str, Any]:
    from transformers import GenerationConfig

    return dict(GenerationConfig._get_default_generation_params())


def _from_config(folder: Path) -> dict[str, Any]:
    config = effective_config(folder)
    return {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
