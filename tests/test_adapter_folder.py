"""`cpift extract-lora` and `cpift.extract_lora`: one finished folder, nothing of the user's touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import cpift
from cpift.checkpoints import lora_extraction
from cpift.cli.main import app
from cpift.errors import ChangedInput


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(root / "base")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(root / "tuned")
    return root


def test_the_command_says_what_the_rank_lost(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    arguments = ["extract-lora", str(models / "base"), str(models / "tuned"), "--rank", "4", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "extraction.json").read_text())
    assert f"Rank 4: 9 weights, of whose change {record['relative']:.1%} is lost" in done.output
    assert "Kept whole: 3 norms" in done.output
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(models / "base")
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1, "who may read one file may read all"
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"adapter"}, "nothing partial is left"
    before = (out / "adapter_model.safetensors").read_bytes()
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, cpift.ConfigError)
    assert "holds files" in str(again.exception)
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_wrong_arguments_come_back_together(models: Path, tmp_path: Path) -> None:
    with pytest.raises(cpift.ConfigError) as caught:
        cpift.extract_lora(tmp_path / "nowhere", models / "tuned", tmp_path, rank=0)
    for part in ("base: ", "no model folder", "rank: is 0"):
        assert part in str(caught.value)


def test_a_model_that_changes_meanwhile_is_named(models: Path, tmp_path: Path) -> None:
    """An adapter of half of one fine-tune and half of another would pass for that of either."""
    tuned = shutil.copytree(models / "tuned", tmp_path / "tuned")
    write = lora_extraction.write_json

    def meanwhile(path: Path, value: object) -> None:
        (tuned / "model.safetensors").touch()
        write(path, value)

    with (
        mock.patch.object(lora_extraction, "write_json", meanwhile),
        pytest.raises(ChangedInput, match="LoRA extraction"),
    ):
        cpift.extract_lora(models / "base", tuned, tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"tuned"}


def test_what_fails_leaves_nothing(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "adapter"
    full = mock.patch("safetensors.torch.save_file", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(OSError, match="No space"):
        cpift.extract_lora(models / "base", models / "tuned", out)
    assert not list(out.parent.iterdir())
