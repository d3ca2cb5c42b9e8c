"""A tokenizer that is read without transformers says of a text what transformers' says, or is not read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpift.config.inputs import ScratchModel
from cpift.models.scratch import make_scratch_tokenizer, scratch_row_tokenizer
from cpift.pretrained.kinds import KINDS
from cpift.pretrained.loading import load_tokenizer
from cpift.pretrained.plain_tokenizer import _QWEN_PARTS, PlainTokenizer, plain_tokenizer
from tests.helpers.kinds import config_of

TEXTS = ("Hallo, 123 Wörter\n\n<|end|> and  more <|x|>", "", "<|start|>u\nit's 7", "\ud7ff\U0001f600 \t")
EXTRA = {"id": 259, "content": "<|x|>", "special": True}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
LISTED = {"content": "<|end|>", "special": True} | PLAIN
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
AROUND = TEMPLATE | {
    "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [256], "tokens": ["<|start|>"]}},
}
# What is said of a folder: fields of tokenizer_config.json and of tokenizer.json, other files; and whether it is plain.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str], bool]] = {
    "as it is saved": ({}, {}, {}, True),
    "the older name": ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, {}, True),
    "nothing around": ({}, {"post_processor": None}, {}, True),
    "a token before": ({"add_bos_token": True}, {"post_processor": AROUND}, {}, True),
    "a space before": ({"padding_side": "left"}, {"pre_tokenizer": PREFIXED}, {}, True),
    "no padding token": ({"pad_token": None, "model_input_names": ["input_ids"]}, {}, {}, True),
    "listed": ({"added_tokens_decoder": {"257": LISTED}}, {}, {"special_tokens_map.json": '{"eos_token": "x"}'}, True),
    "further ones": ({"additional_special_tokens": ["<|x|>"]}, {"more": EXTRA | PLAIN}, {}, True),
    "its template in the config": ({"chat_template": "{{ messages }}\r\n"}, {}, {"chat_template.jinja": ""}, True),
    "a template with other line ends": ({}, {}, {"chat_template.jinja": "a\r\nb"}, True),
    "listed otherwise": ({"added_tokens_decoder": {"257": LISTED | {"lstrip": True}}}, {}, {}, False),
    "told elsewhere": ({}, {}, {"special_tokens_map.json": '{"eos_token": "<|pad|>"}'}, False),
    "added elsewhere": ({}, {}, {"added_tokens.json": '{"<|new|>": 259}'}, False),
    "no special token": ({}, {"more": EXTRA | PLAIN | {"special": False}, "eos": "<|x|>"}, {}, False),
    "a token that is not there": ({"eos_token": "<|none|>"}, {}, {}, False),
    "a token of the model's": ({"image_token": "<|end|>"}, {}, {}, False),
    "a token with flags": ({"eos_token": {"__type": "AddedToken"} | LISTED}, {}, {}, False),
    "several templates": ({"chat_template": [{"name": "default", "template": "x"}]}, {}, {}, False),
    "cut": (
        {},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {},
        False,
    ),
    "another class": ({"tokenizer_class": "GemmaTokenizer"}, {}, {}, False),
    "no class": ({"tokenizer_class": None}, {}, {}, False),
    "another's words": ({"tokenizer_class": "Qwen2Tokenizer"}, {}, {}, False),
    "splits special tokens": ({"split_special_tokens": True}, {}, {}, False),
    "of Mistral's own": ({}, {}, {"tekken.json": "{}"}, False),
    "damaged": ({}, {"model": {"type": "none"}}, {}, False),
    "unknown model": ({}, {}, {"config.json": '{"model_type": "gpt2"}'}, False),
}


def folder_of(folder: Path, kind: str, fields: dict[str, Any], parts: dict[str, Any], files: dict[str, str]) -> Path:
    make_scratch_tokenizer(ScratchModel()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_of(kind, vocab_size=300)))
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokens = json.loads(file.read_text())
    tokens["added_tokens"] += [parts.pop("more")] if "more" in parts else []
    tokens["model"] |= parts.pop("of the model", {})
    fields = fields | ({"eos_token": parts.pop("eos")} if "eos" in parts else {})
    file.write_text(json.dumps(tokens | parts))
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    for name, text in files.items():
        (folder / name).write_text(text)
    if files.get("chat_template.jinja") == "":
        (folder / "chat_template.jinja").unlink()
    return folder


def same(plain: PlainTokenizer, other: Any) -> None:
    assert plain._backend.to_str() == other.backend_tokenizer.to_str()
    names = ("is_fast", "special_tokens_map", "all_special_tokens", "all_special_ids", "added_tokens_decoder")
    for name in (*names, "chat_template", "eos_token", "eos_token_id", "pad_token", "pad_token_id"):
        assert getattr(plain, name) == getattr(other, name), name
    assert plain.convert_ids_to_tokens(257) == other.convert_ids_to_tokens(257)
    assert plain.get_chat_template(None, None) == other.get_chat_template(None, None)
    for text in TEXTS:
        for arguments in ({}, {"add_special_tokens": False, "return_offsets_mapping": True}):
            mine, theirs = plain(text, verbose=False, **arguments), other(text, verbose=False, **arguments)
            assert mine == {name: theirs[name] for name in mine}


@pytest.mark.parametrize("name", CASES)
def test_it_is_transformers_or_none(name: str, tmp_path: Path) -> None:
    fields, parts, files, answers = CASES[name]
    folder = folder_of(tmp_path, "llama", dict(fields), dict(parts), files)
    plain = plain_tokenizer(folder)
    assert (plain is not None) is answers
    if plain is not None:
        same(plain, load_tokenizer(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models_decide_the_class(kind: str, tmp_path: Path) -> None:
    for place, name in enumerate(("TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2TokenizerFast")):
        ends = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        parts = {**_QWEN_PARTS, "of the model": ends} if name.startswith("Qwen") else {}
        more = {"pad_token": "<|end|>", "unk_token": "<|pad|>"} if parts else {}
        folder = folder_of(tmp_path / str(place), kind, {"tokenizer_class": name} | more, parts, {})
        plain = plain_tokenizer(folder)
        assert (plain is not None) is (kind in ("qwen2", "qwen3") if parts else kind != "qwen2")
        if plain is not None:
            same(plain, load_tokenizer(folder))


def test_that_of_a_model_made_on_the_spot() -> None:
    same(scratch_row_tokenizer(), make_scratch_tokenizer(ScratchModel()))


def test_files_of_transformers_without_its_index() -> None:
    code = (
        "import sys; from cpift.pretrained.release import without_index; without_index();"
        "from transformers.utils import chat_template_utils as t; import transformers;"
        "chat = [[{'role': 'user', 'content': 'a'}]];"
        "text = t.render_jinja_template(conversations=chat, chat_template='{{ messages }}');"
        "print(text[0][0], transformers.__version__, [n for n in ('torch', 'transformers.models') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import transformers

    assert done.stdout == f"[{{'role': 'user', 'content': 'a'}}] {transformers.__version__} []\n"
