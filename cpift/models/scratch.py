"""A small Llama with random weights and a byte-level tokenizer, made on the spot: for tests and dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cpift.config.inputs import ScratchModel
from cpift.pretrained.plain_tokenizer import PlainTokenizer, with_post_processor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SPECIAL = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}  # in the order of their ids
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
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bytes_only(),
        **_SPECIAL,
        model_max_length=scratch.max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def scratch_row_tokenizer() -> PlainTokenizer:
    """The same, to write and count rows and for nothing else."""
    from tokenizers import AddedToken

    backend = with_post_processor(_bytes_only())
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL.values()])
    return PlainTokenizer(backend, _SPECIAL, template=_CHAT_TEMPLATE)


def _bytes_only() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def make_scratch_model(scratch: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of the given size with tied embeddings, in float32; the same weights for the same fields."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scratch.seed)
        return LlamaForCausalLM(_config(scratch, tokenizer))


def write_scratch_config(scratch: ScratchModel, folder: Path) -> None:
    """The config.json of `make_scratch_model`, before there is one."""
    config = _config(scratch, make_scratch_tokenizer(scratch))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _config(scratch: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
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
