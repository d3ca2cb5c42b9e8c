"""Tokenizers of models, ready to write conversations: with a chat template, an end and a padding token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cpift.data.chat_templates import TEMPLATES, prepare
from cpift.errors import CheckpointError, CpiftError, Problem
from cpift.pretrained import loading as pretrained
from cpift.pretrained.plain_tokenizer import PlainTokenizer, plain_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cpift.config.run import ModelConfig


def load_tokenizer(path: Path, model: ModelConfig | None = None, chats: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory; it has a chat template and a padding token.

    model: whose config says which template, if not the directory's own. chats: whether it has to write conversations.

    Raises:
        CheckpointError: no tokenizer there, no chat template, or no end-of-sequence token.
    """
    return checked_tokenizer(read_tokenizer(path), str(path), model, chats)


def load_row_tokenizer(path: Path, model: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, to write and count rows and for nothing else: where the folder is plain, transformers is
    not loaded for it."""
    plain = plain_tokenizer(path)
    return checked_tokenizer(read_tokenizer(path) if plain is None else for_rows(plain), str(path), model)


def for_rows(plain: PlainTokenizer) -> PreTrainedTokenizerBase:
    """A plain tokenizer as one of transformers, of which it has all that writing and counting rows asks for."""
    return cast("PreTrainedTokenizerBase", plain)


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """As it is in a local directory. Raises CheckpointError where there is none that can be read."""
    with _tokenizer_errors(path):
        return pretrained.load_tokenizer(path)


def read_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """As `read_tokenizer`, of a GGUF file."""
    with _tokenizer_errors(file):
        return pretrained.load_gguf_tokenizer(file)


def checked_tokenizer(
    tokenizer: PreTrainedTokenizerBase, where: str, model: ModelConfig | None = None, chats: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer with the config's template. Raises as `load_tokenizer`."""
    if model is not None:
        prepare(tokenizer, model)
    problems = []
    if tokenizer.chat_template is None:
        names = ", ".join(TEMPLATES)
        remedy = f"set model.chat_template to one of {names} or a file, or use an instruction-tuned checkpoint"
        problems.append(Problem(where, "the tokenizer has no chat template", remedy))
    if tokenizer.eos_token_id is None:
        problems.append(Problem(where, "the tokenizer has no end-of-sequence token", "set eos_token"))
    if problems and chats:
        raise CheckpointError("tokenizer", problems)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _tokenizer_errors(path: Path) -> Iterator[None]:
    """The libraries that read a tokenizer's files raise what they like, bare Exception too."""
    try:
        yield
    except CpiftError:
        raise
    except Exception as error:
        what = f"its tokenizer cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        remedy = "restore tokenizer.json and tokenizer_config.json, or save them with the transformers of the model"
        raise CheckpointError(f"model {path}", [Problem(str(path), what, remedy)]) from error
