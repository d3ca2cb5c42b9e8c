"""A small Llama with random weights and a byte-level tokenizer, made on the spot: for tests and dry runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpift.config.inputs import ScratchModel

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_PAD, _START, _END = "<|pad|>", "<|start|>", "<|end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'][0] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>a\n' }}{% endif %}"
)


def make_scratch_tokenizer(scratch: ScratchModel) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255 in the byte-level alphabet's order), three special tokens; any text round-trips.

    A turn of the chat template is `<|start|>`, the first letter of the role, a newline, the text, `<|end|>`, a newline.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token=_PAD,
        bos_token=_START,
        eos_token=_END,
        model_max_length=scratch.max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def make_scratch_model(scratch: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of the given size with tied embeddings, in float32; the same weights for the same fields."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.heads,
        max_position_embeddings=scratch.max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scratch.seed)
        return LlamaForCausalLM(config)
