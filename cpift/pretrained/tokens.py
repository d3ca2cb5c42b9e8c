"""Tokens of models by their tokenizer.json, and the tokenizer of a model that has the tokens of several.

Numbers are those that the library of tokenizers gives, whatever a file says of them; nothing of a model is run. Added
tokens stay added ones, which are found in a text before it is cut; words are put to the vocabulary of BPE, which is cut
by merges, and by no others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpift.errors import CheckpointError, Problem
from cpift.pretrained.tokenizer_files import TEMPLATE, chat_template
from cpift.untrusted.json import INDEX, MODEL_CONFIG, UnreadableError, read_object

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
Flags = Mapping[str, bool]  # of an added token
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST = 1 << 24  # numbers of tokens
_PLAIN = {**dict.fromkeys(_FLAGS, False), "normalized": True}
# Older forms of the same, which would say nothing of tokens that were added.
_OLDER = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BESIDE = ("special_tokens_map.json", TEMPLATE, "generation_config.json")  # that speak of tokens
_KEEP = "set fusion.vocabulary: pretrained to keep θ0's tokens, or the name of a task to keep its own"
_SAVE = "save its tokenizer as tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"


@dataclass(frozen=True)
class Tokens:
    """A tokenizer. content: its file; numbers: of every token; added: those that are added, by token."""

    folder: Path
    content: Mapping[str, Any]
    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def kind(self) -> tuple[str, bool]:
        """How it writes tokens: the type of its model, and whether by bytes."""
        parts = json.dumps([self.content.get("pre_tokenizer"), self.content.get("decoder")])
        return str(self.content["model"].get("type")), '"ByteLevel"' in parts

    @property
    def merges(self) -> Any:
        """What of its model decides how a text is cut, beside its tokens."""
        found = self.content["model"].get("merges")
        return [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in found or []]

    def with_added(self, more: Mapping[str, Flags | None]) -> Tokens:
        """The same with tokens more, after all that there are. more: the flags of added ones, None of words."""
        first = 1 + max(self.numbers.values(), default=-1)
        numbers = {**self.numbers, **{token: first + place for place, token in enumerate(more)}}
        added = {
            token: {"id": numbers[token], "content": token, **flags}
            for token, flags in more.items()
            if flags is not None
        }
        content = {**self.content, "added_tokens": [*(self.content.get("added_tokens") or []), *added.values()]}
        if None in more.values():  # a word's number is after those of added tokens, which then need to be said as well
            content["model"] = {**self.content["model"], "vocab": numbers}
        return Tokens(self.folder, content, numbers, {**self.added, **added})

    def require_numbers(self) -> None:
        """Raise CheckpointError where the library of tokenizers would number them otherwise."""
        found = _numbers_in(self.content)
        if wrong := sorted(
            token for token in found.keys() | self.numbers if found.get(token) != self.numbers.get(token)
        ):
            what = f"cannot have {', '.join(map(repr, wrong[:3]))} beside its other tokens"
            remedy = "leave such tokens out of fusion.tokens, or keep another tokenizer (fusion.vocabulary)"
            raise CheckpointError(f"tokenizer of {self.folder}", [Problem(FILE, what, remedy)])

    def require_named(self) -> None:
        """Raise CheckpointError where its settings name a token that it lacks, which gets a number when it is loaded:
        that of no row, or of another token."""
        named = {**_special(self.folder), **_listed(self.folder)}
        problems = [
            Problem(SETTINGS, f"has {token!r} as {name}, and {FILE} has no such token", _SAVE)
            for name, token in named.items()
            if token not in self.numbers
        ]
        if problems:
            raise CheckpointError(f"tokenizer of {self.folder}", problems[:8])


def read_tokens(folder: Path) -> Tokens:
    """Raises CheckpointError where there is no tokenizer.json that can be read."""
    file = folder / FILE
    return _read_tokens(folder, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=20)
def _read_tokens(folder: Path, changed: int) -> Tokens:
    try:
        content = read_object(folder / FILE, INDEX)
        numbers = _numbers_in(content)
        added = {str(one["content"]): dict(one) for one in content.get("added_tokens") or []}
    except FileNotFoundError:
        problem = Problem(FILE, f"is not in {folder}", _SAVE)
    except UnreadableError as error:
        problem = error.problem(FILE)
    except Exception as error:  # the library has no other class for what it cannot read
        problem = Problem(FILE, f"holds no tokens that can be read ({type(error).__name__}: {error!s:.200})", _SAVE)
    else:
        return Tokens(folder, content, numbers, added)
    raise CheckpointError(f"tokenizer of {folder}", [problem])


def _numbers_in(content: Mapping[str, Any]) -> dict[str, int]:
    """Every token, in the order of numbers, as the library of tokenizers reads a file's content."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_str(json.dumps(content)).get_vocab()
    ordered = sorted(found.items(), key=lambda one: (one[1], one[0]))
    if ordered and ordered[-1][1] >= _MOST:
        raise ValueError(f"{ordered[-1][0]!r} is number {ordered[-1][1]:,}; at most {_MOST:,} rows are made")
    return dict(ordered)


def further(base: Tokens, other: Tokens, rows: int) -> dict[str, Flags | None]:
    """Tokens of a model of so many rows that `base` lacks, in their order: flags of added ones, None of words.

    Raises CheckpointError where the two write tokens in other ways, or where words of the one would have texts cut
    otherwise by the other.
    """
    if base.kind != other.kind:
        said = [f"{kind} {'by bytes' if by_bytes else 'by characters'}" for kind, by_bytes in (other.kind, base.kind)]
        what = f"is {said[0]}, θ0's is {said[1]}: the same text has other tokens in the two"
        raise CheckpointError(f"tokenizer of {other.folder}", [Problem(FILE, what, _KEEP)])
    new = [token for token, number in other.numbers.items() if number < rows and token not in base.numbers]
    words = [token for token in new if token not in other.added]
    if words and base.kind[0] != "BPE":
        what = (
            f"has {len(words):,} words that θ0's lacks ({words[0]!r}, …), and {base.kind[0]} would cut texts into them"
        )
        raise CheckpointError(f"tokenizer of {other.folder}", [Problem(FILE, what, _KEEP)])
    return {
        token: None if token not in other.added else {flag: bool(other.added[token].get(flag)) for flag in _FLAGS}
        for token in new
    }


def plain_flags() -> Flags:
    """Of a token that is no model's."""
    return dict(_PLAIN)


def differences_told(base: Tokens, other: Tokens) -> Iterator[str]:
    """What two tokenizers say otherwise of the same texts and tokens."""
    if base.kind == other.kind and base.merges != other.merges:
        yield "its tokenizer cuts words otherwise: texts are cut as by the tokenizer that is kept"
    flags = [
        token
        for token in base.added.keys() & other.added.keys()
        if any(bool(base.added[token].get(flag)) != bool(other.added[token].get(flag)) for flag in _FLAGS)
    ]
    if flags:
        yield f"{len(flags)} added tokens have other flags ({', '.join(sorted(flags)[:3])}): the first model's are kept"
    mine, theirs = (_special(one.folder) for one in (base, other))
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            yield f"its {name} is {theirs[name]!r:.40}, not {mine[name]!r:.40}: that of the tokenizer that is kept"


def _special(folder: Path) -> dict[str, Any]:
    fields = settings_of(folder)
    found = {name: fields[name] for name in _NAMED if fields.get(name)}
    return {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}


def _listed(folder: Path) -> dict[str, Any]:
    """Tokens that its settings list as added, by where."""
    listed = settings_of(folder).get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    return {f"added_tokens_decoder.{number}": one.get("content") for number, one in entries if isinstance(one, dict)}


def settings_of(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none. Raises CheckpointError."""
    try:
        return read_object(folder / SETTINGS, MODEL_CONFIG)
    except FileNotFoundError:
        return {}
    except UnreadableError as error:
        raise CheckpointError(f"tokenizer of {folder}", [error.problem(SETTINGS)]) from error


def tokenizer_files(kept: Tokens, made: Tokens, moved: bool) -> dict[str, Any]:
    """By name, the small files of a model whose tokenizer is `kept` with the tokens of `made`: fields, text, or None
    for a file that it does not have. moved: the model's folder is another than that of `kept`."""
    if made.numbers == kept.numbers and not moved:
        return {}
    fields = settings_of(kept.folder)
    if isinstance(fields.get("added_tokens_decoder"), dict):
        more = {token: one for token, one in made.added.items() if token not in kept.added}
        entries = {str(one["id"]): {name: one[name] for name in ("content", *_FLAGS)} for one in more.values()}
        fields = {**fields, "added_tokens_decoder": {**fields["added_tokens_decoder"], **entries}}
    found = {**dict.fromkeys(_OLDER), FILE: made.content, SETTINGS: fields or None}
    return found | ({name: _content(kept.folder / name) for name in _BESIDE} if moved else {})


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Put the tokenizer of a folder in the place of that which a model in `out` has; without a template of its own it
    has the model's."""
    template = chat_template(folder) or chat_template(out)
    for name in (FILE, SETTINGS, "special_tokens_map.json", *_OLDER, TEMPLATE):
        (out / name).unlink(missing_ok=True)
    for name in (FILE, SETTINGS, "special_tokens_map.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if template is not None:
        (out / TEMPLATE).write_text(template, encoding="utf-8")


def _content(file: Path) -> Any:
    if not file.is_file():
        return None
    if file.suffix != ".json":
        return file.read_text(encoding="utf-8")
    try:
        return read_object(file, MODEL_CONFIG)
    except UnreadableError as error:
        raise CheckpointError(f"tokenizer of {file.parent}", [error.problem(file.name)]) from error


def found_in(file: Path) -> dict[str, int]:
    """Every token and its number, as the library of tokenizers reads a file."""
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(file)).get_vocab())


def rows_for(numbers: Sequence[int], multiple: int | None) -> int:
    """Rows of an embedding with a row for each of these numbers, as many as a multiple of `multiple`."""
    needed = 1 + max(numbers, default=-1)
    return needed if not multiple else -(-needed // multiple) * multiple
