"""`cpift diff` and `cpift.diff`: what a fine-tune changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import cpift
from cpift.cli.main import app


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(root / "base")
    model.model.layers[1].self_attn.q_proj.weight.data[0] += 0.5
    model.model.norm.weight.data[3] = 2.0
    model.save_pretrained(root / "tuned")
    return root


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["diff", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_says_how_much_and_where(models: Path, tmp_path: Path) -> None:
    out = run(models / "base", models / "tuned", "--out", tmp_path / "diff.json")
    record = json.loads((tmp_path / "diff.json").read_text())
    assert "17 of " in out
    assert "Largest |Δ|: 1, in model.norm.weight" in out
    assert {(row["layer"], row["module"]) for row in record["modules"] if row["changed"]} == {(1, "q"), (None, "norm")}
    moved = {row["tensor"]: row for row in record["tensors"] if row["changed"]}
    assert set(moved) == {"model.layers.1.self_attn.q_proj.weight", "model.norm.weight"}
    assert moved["model.norm.weight"]["relative"] == pytest.approx(0.25)
    assert record["share"] == 17 / record["elements"]
    assert json.loads(run(models / "base", models / "tuned", "--json")) == record
    table = run(models / "base", models / "tuned", "--show", "changed").splitlines()
    assert next(line for line in table if line.split()[:1] == ["1"]).split()[1] == "6.25"
    assert [path.name for path in tmp_path.iterdir()] == ["diff.json"]


def test_python_has_the_same(models: Path) -> None:
    found = cpift.diff(models / "base", models / "tuned")
    assert found.modules[1, "q"].changed == 16
    assert found.modules[0, "q"].changed == 0
    assert found.whole == cpift.diff(models / "base", models / "tuned").whole
    assert found.of_kind("norm").largest == 1.0


def test_an_adapter_is_the_model_that_it_makes(models: Path, tmp_path: Path) -> None:
    cpift.extract_lora(models / "base", models / "tuned", tmp_path / "adapter", rank=2)
    found = cpift.diff(models / "base", tmp_path / "adapter").tensors["model.layers.1.self_attn.q_proj.weight"]
    whole = cpift.diff(models / "base", models / "tuned").tensors["model.layers.1.self_attn.q_proj.weight"]
    assert found.l2 == pytest.approx(whole.l2, rel=0.01)


def test_a_model_beside_itself_has_not_changed(models: Path) -> None:
    assert "No element changed" in run(models / "base", models / "base")


def test_wrong_arguments_come_back_together(models: Path, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    done = CliRunner().invoke(
        app, ["diff", str(models / "base"), str(models), "--show", "most", "--out", str(tmp_path / "there.json")]
    )
    assert isinstance(done.exception, cpift.ConfigError)
    for part in ("--show: is 'most'", "there.json exists"):
        assert part in str(done.exception)
    with pytest.raises(cpift.ConfigError, match="vocabulary: is 'all'"):
        cpift.diff(models / "base", models / "tuned", vocabulary="all")
    assert (tmp_path / "there.json").read_text() == "{}"
