"""Merges of models with other tokens (`fusion.vocabulary` by tokens): what is written, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cpift
from cpift.checkpoints.checkpoint import Checkpoint
from cpift.config.loading import parse_config
from cpift.console.view import quiet
from cpift.errors import ConfigError
from cpift.merging.planning import check_methods
from cpift.pipeline.engine import NoEngine
from cpift.pipeline.pipeline import Pipeline
from cpift.pipeline.shared import SharedWork
from tests.helpers.toys import make_toy

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    make_toy(root / "base", 0, layers=2)
    make_toy(root / "one", 1, layers=2, tokens=("<a>", "<b>"))
    make_toy(root / "two", 2, layers=2, tokens=("<b>", "<c>"), rows=16)
    return root


def merged(toys: Path, out: Path, **fields: Any) -> cpift.MergeResult:
    return cpift.merge(toys / "base", {name: toys / name for name in ("one", "two")}, out, **fields)


def test_a_union_is_merged_and_its_tokenizer_fits(toys: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"vocabulary": "union", "pad_to_multiple_of": 8, "density": 0.5, "normalize": False}
    result = merged(toys, tmp_path / "out", method="ties", **fields)
    assert all(check["passed"] for check in result.checks)
    assert "has the row that was made for it" in result.checks[-1]["name"]
    assert "Tokens: union; missing rows: pretrained." in (result.path / "README.md").read_text()
    out = Checkpoint(result.path)
    assert out.tensors[EMBEDDING].shape == out.tensors["lm_head.weight"].shape == (16, 8)
    assert out.config["vocab_size"] == 16
    row = out.tensor(EMBEDDING)[10]  # <c>, which `two` alone has: no model moves from it
    assert torch.equal(row, Checkpoint(toys / "two").tensor(EMBEDDING)[9])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.path)
    assert tokenizer("ab<c><a>b").input_ids == [5, 10, 8, 1]
    assert tokenizer.eos_token_id == out.config["eos_token_id"] == 7


def test_a_tasks_tokens_come_with_what_speaks_of_them(toys: Path, tmp_path: Path) -> None:
    base = make_toy(tmp_path / "padded", 0, layers=2, pad_token_id=5)  # no token of `two` is for padding
    result = cpift.merge(
        base, {n: toys / n for n in ("one", "two")}, tmp_path / "out", method="linear", vocabulary="two"
    )
    config = Checkpoint(result.path).config
    assert (config.get("pad_token_id"), config["eos_token_id"]) == (None, 7)
    assert Checkpoint(result.path).tensors[EMBEDDING].shape == (10, 8)
    assert (result.path / "tokenizer_config.json").read_text()
    kept, written = (json.loads((x / "tokenizer.json").read_text()) for x in (toys / "two", result.path))
    assert written == kept
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("two", "one")]
    stacked = merged(toys, tmp_path / "stacked", method="passthrough", vocabulary="union", slices=slices)
    out = Checkpoint(stacked.path)
    assert (out.config["num_hidden_layers"], out.config["vocab_size"]) == (2, 11)
    assert "Layers, one slice after another: two 0–0; one 0–0." in (stacked.path / "README.md").read_text()
    assert torch.equal(out.tensor("lm_head.weight")[8:10], Checkpoint(toys / "one").tensor("lm_head.weight")[8:10])


def test_base_models_without_a_chat_template_merge_in_another_dtype(toys: Path, tmp_path: Path) -> None:
    out = Checkpoint(merged(toys, tmp_path / "out", method="linear", vocabulary="union", dtype="float32").path)
    assert {info.kind for info in out.tensors.values()} == {"F32"}
    rows = [Checkpoint(toys / name).tensor(EMBEDDING)[:8].float() for name in ("one", "two")]
    assert torch.equal(out.tensor(EMBEDDING)[:8], sum(rows) / 2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "by numbers": ({}, "or set fusion.vocabulary: base to keep θ0's tokens"),
    "no vocabulary": ({"tokens": {"<a>": {"source": "one"}}}, "are of a vocabulary by tokens; set fusion.vocabulary"),
    "no model": ({"vocabulary": "three"}, "fusion.vocabulary: 'three' is no model; there are pretrained, one, two"),
    "no source": ({"vocabulary": "union", "tokens": {"<a>": {"source": "x"}}}, "fusion.tokens: 'x' is no model"),
    "no such token": (
        {"vocabulary": "union", "tokens": {"<c>": {"source": "one"}}},
        "fusion.tokens.<c>: asks for '<c>' of one, which has no such token",
    ),
    "forced by nothing": (
        {"vocabulary": "union", "tokens": {"<a>": {"force": True}}},
        "has no source to be taken from",
    ),
    "two rows": (
        {"vocabulary": "union", "tokens": {"<a>": {"source": "one", "token": "a", "token_id": 3}}},
        "give one of token and token_id",
    ),
    "by cpift": ({"vocabulary": "union", "method": "cpift"}, "fusion.vocabulary: cpift's core regions are of θ0's"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_united_has_a_name(kind: str, toys: Path, tmp_path: Path) -> None:
    fields, told = REFUSED[kind]
    with pytest.raises(ConfigError) as caught:
        merged(toys, tmp_path / "out", **{"method": "linear", **fields})
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_models_with_other_tokens_are_swept_without_core_regions(toys: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "completion": "b"}\n' * 3)
    test = {"test": {"file": str(tmp_path / "rows.jsonl")}, "metric": "loss"}
    raw: dict[str, Any] = {
        "name": "x",
        "model": {"path": str(toys / "base"), "chat_template": "chatml"},
        "tasks": [{"name": name, "checkpoint": {"path": str(toys / name)}, **test} for name in ("one", "two")],
        "fusion": {"method": "linear", "vocabulary": "union"},
        "output": str(tmp_path / "out"),
    }
    config = parse_config(raw, tmp_path, "x")
    run = Pipeline(config, NoEngine(), quiet())
    SharedWork([run], NoEngine(), quiet()).prepare()
    assert not run.artifacts.regions.path.exists()
    (problem,) = check_methods(config, "regions")
    assert "makes other layers or tokens, and `cpift regions` is of" in problem.what
    assert check_methods(config, "fuse") == []
