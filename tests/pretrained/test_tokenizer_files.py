"""Whether two tokenizers are one, and whose chat template a fused model gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpift.config.inputs import ScratchModel
from cpift.models.scratch import make_scratch_tokenizer
from cpift.pretrained.tokenizer_files import chat_template, other_tokenizer, shared_template, template_note


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_scratch_tokenizer(ScratchModel()).save_pretrained(folder)
    return folder


def pad(tokenizer: Any) -> None:
    tokenizer.enable_padding(length=16)


def truncate(tokenizer: Any) -> None:
    tokenizer.enable_truncation(8)


def add(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<new>"])


@pytest.mark.parametrize(("change", "other"), [(pad, False), (truncate, False), (add, True)])
def test_padding_and_truncation_are_no_other_tokenizer(
    saved: Path, tmp_path: Path, change: Callable[[Any], None], other: bool
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(saved / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() != (saved / "tokenizer.json").read_bytes()
    assert other_tokenizer(saved, tmp_path) is other


def test_merges_written_in_two_ways_are_one_tokenizer(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    for name, merges in (("old", ["a b"]), ("new", [["a", "b"]]), ("other", [["b", "a"]])):
        (tmp_path / name).mkdir()
        content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "padding": None}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content, indent=len(name)))
    assert not other_tokenizer(tmp_path / "old", tmp_path / "new")
    assert other_tokenizer(tmp_path / "old", tmp_path / "other")


def with_template(folder: Path, template: object, *, inside: bool = False) -> Path:
    folder.mkdir()
    if inside:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    elif template is not None:
        (folder / "chat_template.jinja").write_text(str(template))
    return folder


def test_the_template_of_a_folder(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert chat_template(saved) == AutoTokenizer.from_pretrained(saved).chat_template
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert chat_template(with_template(tmp_path / "named", named, inside=True)) == "D"
    assert chat_template(with_template(tmp_path / "plain", "P", inside=True)) == "P"
    assert chat_template(with_template(tmp_path / "none", None)) is None


@pytest.mark.parametrize(
    ("backbone", "tunes", "shared"), [(None, ["A", "A"], "A"), (None, ["A", "B"], None), ("Z", ["A", "A"], None)]
)
def test_the_template_that_tunes_share(tmp_path: Path, backbone: str | None, tunes: list[str], shared: str) -> None:
    base = with_template(tmp_path / "base", backbone)
    folders = [with_template(tmp_path / str(number), one) for number, one in enumerate(tunes)]
    assert shared_template(base, folders) == shared
    assert "chat template" in str(template_note(base, folders[0]))
    assert template_note(folders[0], shutil.copytree(folders[0], tmp_path / "copy")) is None
