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
from tests.helpers.toys import write_tokenizer


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
    more = further(base, other, rows=10)
    assert list(more) == ["e", "<y>"]  # <far> is beyond the model's rows
    assert more["<y>"]["normalized"] is False
    assert more["e"]["normalized"] is True
    made = base.with_added(more).with_added({"<new>": plain_flags()})
    files = tokenizer_files(base, made, moved=False)
    assert files["vocab.json"] is None
    (tmp_path / "made.json").write_text(json.dumps(files["tokenizer.json"]))
    assert found_in(tmp_path / "made.json") == made.numbers
    assert made.numbers["e"] == 9
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


def test_what_two_tokenizers_say_otherwise_is_told_or_refused(tmp_path: Path) -> None:
    base = read_tokens(tokenizer(tmp_path / "base", "<x>"))
    other = tokenizer(tmp_path / "other", "<x>", merges=["b c"])
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


@pytest.mark.parametrize("content", ["{}", "[", '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": 3}}'])
def test_a_file_without_tokens_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_tokens(tmp_path)
    with pytest.raises(CheckpointError, match="save its tokenizer as"):
        read_tokens(tmp_path / "nowhere")
