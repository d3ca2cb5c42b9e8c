"""Tokenizers as files: tokens of several models in one, and what cannot be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpift.errors import CheckpointError
from cpift.pretrained.tokens import (
    differences_told,
    found_in,
    further,
    plain_flags,
    read_tokens,
    rows_for,
    settings_of,
    tokenizer_files,
)
from tests.helpers.toys import LETTERS, write_tokenizer


def tokenizer(folder: Path, *tokens: str, **changes: Any) -> Path:
    folder.mkdir()
    write_tokenizer(folder, tokens)
    content = json.loads((folder / "tokenizer.json").read_text())
    for name, value in changes.items():
        content["model"] |= {name: value} if name in content["model"] else {}
        content |= {name: value} if name in content else {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_tokens_of_others_are_added_and_the_library_finds_them(tmp_path: Path) -> None:
    base = read_tokens(tokenizer(tmp_path / "base", "<x>"))
    other = read_tokens(tokenizer(tmp_path / "other", "<y>", "<x>", "<far>", vocab={"a": 0, "b": 1, "e": 2, "ab": 3}))
    more = further(base, other, rows=8)
    assert list(more) == ["e", "<y>"]  # <far> is beyond the model's rows
    assert more["<y>"] is not None
    assert more["<y>"]["normalized"] is False
    assert more["e"] is None  # a word: texts are not searched for it
    made = base.with_added(more).with_added({"<new>": plain_flags()})
    files = tokenizer_files(base, made, moved=False)
    assert files["vocab.json"] is None
    (tmp_path / "made.json").write_text(json.dumps(files["tokenizer.json"]))
    assert found_in(tmp_path / "made.json") == made.numbers
    assert made.numbers["e"] == 9  # behind <x>
    assert tokenizer_files(base, base, moved=False) == {}
    assert rows_for(list(made.numbers.values()), 8) == 16
    assert rows_for(list(made.numbers.values()), None) == 12


def test_listed_tokens_of_the_settings_get_the_new_ones_too(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "base")
    listed = {"6": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed, "eos_token": "</s>"}))
    base = read_tokens(folder)
    fields = tokenizer_files(base, base.with_added({"<new>": plain_flags()}), moved=False)["tokenizer_config.json"]
    assert fields["added_tokens_decoder"] == listed | {"8": {"content": "<new>", **plain_flags()}}
    assert settings_of(folder)["eos_token"] == "</s>"


def test_words_of_others_get_rows_and_no_text_is_cut_into_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    words = {**{token: number for number, token in enumerate((*LETTERS, "ab"))}, "abc": 6, "Ġab": 7}
    base = read_tokens(tokenizer(tmp_path / "base", "<x>"))
    made = base.with_added(further(base, read_tokens(tokenizer(tmp_path / "other", "<y>", vocab=words)), rows=20))
    made.require_numbers()
    cut = Tokenizer.from_str(json.dumps(made.content)).encode("abc ab<y><x>").tokens
    assert cut == ["ab", "c", "Ġ", "ab", "<y>", "<x>"]
    assert list(made.numbers)[9:] == ["abc", "Ġab", "<y>"]
    with pytest.raises(CheckpointError, match=r"cannot have '' beside its other tokens"):
        made.with_added({"": plain_flags()}).require_numbers()


@pytest.mark.parametrize(
    ("number", "told"),
    [(20, ""), (-3, "integer `-3`, expected u32"), (10**12, "expected u32"), (8.5, "expected u32")],
)
def test_numbers_are_those_that_a_loaded_tokenizer_has(number: Any, told: str, tmp_path: Path) -> None:
    file = tokenizer(tmp_path / "odd", "<x>") / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][-1]["id"] = number
    file.write_text(json.dumps(content))
    if not told:
        assert list(read_tokens(file.parent).numbers.values()) == list(range(9))
        return
    with pytest.raises(CheckpointError, match=told):
        read_tokens(file.parent)


def test_a_number_that_no_embedding_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'b' is number 4,000,000,000"):
        read_tokens(tokenizer(tmp_path / "far", vocab={"a": 0, "b": 4 * 10**9}, merges=[]))


def test_settings_that_name_tokens_which_the_file_lacks_are_refused(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "base")
    read_tokens(folder).require_named()
    listed = {"9": {"content": "<far>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "added_tokens_decoder": listed}))
    with pytest.raises(CheckpointError, match=r"(?s)has '<pad>' as pad_token, .*'<far>' as added_tokens_decoder\.9"):
        read_tokens(folder).require_named()


def test_what_two_tokenizers_say_otherwise_is_told_or_refused(tmp_path: Path) -> None:
    base = read_tokens(tokenizer(tmp_path / "base", "<x>"))
    other = tokenizer(tmp_path / "other", "<x>", merges=[])
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"][-1]["special"] = True
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<x>"}}))
    told = "\n".join(differences_told(base, read_tokens(other)))
    assert "cuts words otherwise" in told
    assert "1 added tokens have other flags (<x>)" in told
    assert "its eos_token is '<x>', not '</s>'" in told
    unigram = read_tokens(
        tokenizer(tmp_path / "unigram", type="Unigram", vocab=[["a", -1.0], ["b", -2.0]], merges=None)
    )
    assert unigram.numbers["b"] == 1
    with pytest.raises(CheckpointError, match=r"is Unigram by bytes, θ0's is BPE by bytes"):
        further(base, unigram, 10)
    content = {**base.content, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}}
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"has 1 words that θ0's lacks \('b', …\), and Unigram would cut"):
        further(read_tokens(tmp_path / "base"), unigram, 10)


@pytest.mark.parametrize("content", ["{}", "[", '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": 3}}'])
def test_a_file_without_tokens_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_tokens(tmp_path)
    with pytest.raises(CheckpointError, match="save its tokenizer as"):
        read_tokens(tmp_path / "nowhere")
