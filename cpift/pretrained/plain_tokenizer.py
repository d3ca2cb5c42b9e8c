"""The tokenizer of a common model folder by its files alone: what rows are written and counted with before a run.

transformers' tokenizers wrap one of `tokenizers`. `plain_tokenizer` reads that where its files hold nothing which
transformers would change in it, for a release that the tests compare it with, and a class that `plain` knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpift.errors import CheckpointError
from cpift.pretrained.architecture import config_text, known_class
from cpift.pretrained.loading import code_problems
from cpift.untrusted.json import MODEL_CONFIG, UnreadableError, read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_CONFIG, _FILE, _TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
# Fields of tokenizer_config.json, beside special tokens, that decide nothing of how a text is written and counted.
_SILENT = {
    "model_max_length": (int, float),
    "model_input_names": (list,),
    **dict.fromkeys(("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token"), (bool,)),
    **dict.fromkeys(("is_local", "local_files_only"), (bool,)),
    **dict.fromkeys(("backend", "errors", "name_or_path"), (str,)),
}
_ONE_OF: Mapping[str, Sequence[Any]] = {  # that decide nothing with these values
    "padding_side": ("left", "right"),
    "add_prefix_space": (False,),
    "split_special_tokens": (False,),
}
_ELSEWHERE = ("special_tokens_map.json", "added_tokens.json")  # read where the config lists no added tokens
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PARTS: Mapping[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
}


class PlainTokenizer:
    """What is asked of a fast tokenizer of transformers to write and count rows, with the same names and answers."""

    is_fast = True

    def __init__(
        self, backend: Tokenizer, special: Mapping[str, str], extra: Sequence[str] = (), template: str | None = None
    ):
        """special: of _SPECIAL. extra: special tokens without a name. All are tokens of `backend`."""
        self._backend, self._special, self._extra = backend, dict(special), tuple(extra)
        self.chat_template: Any = template

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False, verbose: bool = True
    ) -> dict[str, Any]:
        encoded = self._backend.encode(text, add_special_tokens=add_special_tokens)
        found: dict[str, Any] = {"input_ids": encoded.ids}
        return found | {"offset_mapping": encoded.offsets} if return_offsets_mapping else found

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: self._special[name] for name in _SPECIAL if name in self._special}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys((*self.special_tokens_map.values(), *self._extra)))

    @property
    def all_special_ids(self) -> list[int]:
        numbers = map(self._backend.token_to_id, self.all_special_tokens)
        return [number for number in numbers if number is not None]

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self._backend.get_added_tokens_decoder())

    @property
    def eos_token(self) -> str | None:
        return self._special.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self._special.get("pad_token")

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        self._special["pad_token"] = token

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def convert_ids_to_tokens(self, number: int) -> str | None:
        return self._backend.id_to_token(number)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        return str(self.chat_template)

    def _id(self, name: str) -> int | None:
        return self._backend.token_to_id(self._special[name]) if name in self._special else None


def plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """The tokenizer of a model folder; None where transformers has to be asked, which says too what is wrong."""
    try:
        config = json.loads(config_text(folder))
        fields = read_object(folder / _CONFIG, MODEL_CONFIG)
        if known_class(folder) is None or code_problems(folder, "") or not _plain_files(folder, fields):
            return None
        template = _template(folder, fields)
    except (CheckpointError, UnreadableError, OSError, UnicodeDecodeError):
        return None
    backend = _backend(folder / _FILE)
    if backend is None or not _unchanged(backend, fields) or not _as_its_class(backend, config, fields):
        return None
    special = {**_DEFAULTS.get(_class(fields), {}), **{name: fields[name] for name in _SPECIAL if name in fields}}
    named = {name: token for name, token in special.items() if token is not None}
    extra: list[str] = next((fields[name] for name in _EXTRA if fields.get(name)), [])
    return PlainTokenizer(backend, named, extra, template) if _are_special(backend, [*named.values(), *extra]) else None


def with_post_processor(backend: Tokenizer) -> Tokenizer:
    """As transformers has a tokenizer that says nothing of what is put around a text: nothing is."""
    from tokenizers import processors

    if backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return backend


def _backend(file: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file))
    except Exception:  # the library raises it bare; whoever reads it with transformers says what is wrong
        return None
    return None if found.truncation or found.padding else with_post_processor(found)


def _plain_files(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether nothing but tokenizer.json, its config and a template is read, and every field is known."""
    if (folder / "tekken.json").exists() or (folder / "additional_chat_templates").exists():
        return False
    if "added_tokens_decoder" not in fields and any((folder / name).exists() for name in _ELSEWHERE):
        return False
    checked = (*_SPECIAL, *_EXTRA, "added_tokens_decoder", *_ONE_OF)
    rest = {name: value for name, value in fields.items() if name not in checked}
    plain = {"tokenizer_class": (str,), "chat_template": (str,), **_SILENT}
    lists = [fields[name] for name in _EXTRA if name in fields]
    return (
        all(name in plain and type(value) in plain[name] for name, value in rest.items())
        and all(fields[name] in values for name, values in _ONE_OF.items() if name in fields)
        and all(fields[name] is None or type(fields[name]) is str for name in _SPECIAL if name in fields)
        and len(lists) <= 1
        and all(type(one) is list and all(type(token) is str for token in one) for one in lists)
    )


def _template(folder: Path, fields: Mapping[str, Any]) -> str | None:
    file = folder / _TEMPLATE
    return file.read_text(encoding="utf-8") if file.exists() else fields.get("chat_template")


def _unchanged(backend: Tokenizer, fields: Mapping[str, Any]) -> bool:
    """Whether the added tokens that the config lists are those of tokenizer.json."""
    added = {str(number): _flags(token) for number, token in backend.get_added_tokens_decoder().items()}
    listed = fields.get("added_tokens_decoder", {})
    return isinstance(listed, dict) and all(added.get(number) == token for number, token in listed.items())


def _flags(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in _FLAGS}


def _are_special(backend: Tokenizer, tokens: Sequence[str]) -> bool:
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return special.issuperset(tokens)


# ---- classes of tokenizers -----------------------------------------------------------------------------------------

_DEFAULTS: Mapping[str, Mapping[str, str]] = {  # special tokens that a class has where the config names none
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}


def _class(fields: Mapping[str, Any]) -> str:
    return str(fields.get("tokenizer_class")).removesuffix("Fast")


def _as_it_is(backend: Tokenizer, config: Mapping[str, Any]) -> bool:
    """transformers takes tokenizer.json as it is, but for the words of some models of Mistral."""
    kind = config["model_type"]
    return kind != "qwen2" and (kind != "mistral" or backend.get_vocab_size() <= 100_000)


def _as_qwen(backend: Tokenizer, config: Mapping[str, Any]) -> bool:
    """transformers builds it anew of vocabulary and merges: whether that gives the same."""
    model: Any = backend.model
    return (
        config["model_type"] in ("qwen2", "qwen3")
        and type(model).__name__ == "BPE"
        and all(getattr(model, name) is None for name in ("dropout", "unk_token"))
        and all(getattr(model, name) == "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        and not any(getattr(model, name) for name in ("fuse_unk", "byte_fallback", "ignore_merges"))
        and {name: _part(getattr(backend, name)) for name in _QWEN_PARTS} == _QWEN_PARTS
        and _numbered_in_order(backend)
    )


def _numbered_in_order(backend: Tokenizer) -> bool:
    """Whether the added tokens that are not in the vocabulary have the numbers after it, without a gap."""
    model: Any = backend.model
    added = sorted(backend.get_added_tokens_decoder().items())
    numbers = [number for number, token in added if model.token_to_id(token.content) is None]
    first = backend.get_vocab_size(with_added_tokens=False)
    return numbers == list(range(first, first + len(numbers)))


_CLASSES: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "TokenizersBackend": _as_it_is,
    "PreTrainedTokenizer": _as_it_is,
    "Qwen2Tokenizer": _as_qwen,
}


def _as_its_class(backend: Tokenizer, config: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    check = _CLASSES.get(_class(fields))
    return check is not None and check(backend, config)


def _part(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())
