"""A folder's tokenizer and chat template as files: whether two are the same, and which template a fused model gets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpift.disk.files import file_sha256
from cpift.untrusted.json import INDEX, MODEL_CONFIG, UnreadableError, read_bytes, read_object

TEMPLATE = "chat_template.jinja"
_TOKENIZER = "tokenizer.json"
_MODELS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt")  # of folders without tokenizer.json
_BATCHES = ("padding", "truncation")  # how texts are made equally long, not which tokens they are


def other_tokenizer(folder: Path, other: Path) -> bool:
    """Whether two folders make other tokens of a text; False where one of them has no tokenizer."""
    both = [name for name in (_TOKENIZER, *_MODELS) if (folder / name).is_file() and (other / name).is_file()]
    if _TOKENIZER in both:
        return not _same_bytes(folder, other, _TOKENIZER) and _tokens(folder) != _tokens(other)
    return any(not _same_bytes(folder, other, name) for name in both)


def chat_template(folder: Path) -> str | None:
    """The template of a folder's conversations, None if it has none or it cannot be read."""
    try:
        if (folder / TEMPLATE).is_file():
            return read_bytes(folder / TEMPLATE, MODEL_CONFIG.size).decode("utf-8")
        path = folder / "tokenizer_config.json"
        stated = read_object(path, MODEL_CONFIG).get("chat_template") if path.is_file() else None
    except (UnreadableError, UnicodeDecodeError, OSError):
        return None
    if isinstance(stated, list):  # several by name
        named = {
            str(template.get("name")): template.get("template") for template in stated if isinstance(template, dict)
        }
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def shared_template(backbone: Path, tunes: Iterable[Path]) -> str | None:
    """The template that all tunes have, where the backbone has none of its own."""
    templates = {chat_template(folder) for folder in tunes}
    return templates.pop() if chat_template(backbone) is None and len(templates) == 1 else None


def template_note(base: Path, tune: Path) -> str | None:
    """What to say of a tune's template that is not θ0's."""
    mine, theirs = chat_template(base), chat_template(tune)
    if theirs is None or mine == theirs:
        return None
    if mine is None:
        return "has a chat template, θ0 has none; the fused model gets it if every tune has the same"
    return "its chat template differs from θ0's; the fused model gets the backbone's"


def _same_bytes(folder: Path, other: Path, name: str) -> bool:
    return file_sha256(folder / name) == file_sha256(other / name)


def _tokens(folder: Path) -> Any:
    """What of tokenizer.json decides the tokens, in one way of writing; the hash of one that cannot be read."""
    path = folder / _TOKENIZER
    try:
        parts = {key: value for key, value in read_object(path, INDEX).items() if key not in (*_BATCHES, "version")}
    except UnreadableError:
        return file_sha256(path)
    model = parts.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):  # older files join the two of a merge
        merges = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in model["merges"]]
        parts["model"] = {**model, "merges": merges}
    return parts
