"""Files of mergekit, axolotl, LLaMA-Factory and TRL are recognised as a whole, and answered with a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cpift.cli.main import app
from cpift.config.loading import load_config, read_yaml
from cpift.errors import ConfigError

Tensors = dict[str, torch.Tensor]


def answer(text: str, folder: Path) -> ConfigError:
    path = folder / "other.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return caught.value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "merge_method: ties\nmodels: 3",
            "mergekit's file, which `cpift merge` reads as it is → `cpift merge FILE OUT`",
        ),
        ("slices: []", "mergekit's file"),
        ("base_model: a\nmodels: [{model: b}]", "mergekit's file"),
        ("base_model: a\nexperts: [{source_model: b}]", "mergekit-moe's file"),
        ("base_model: a\nrl: dpo\ndatasets: [{path: org/x}]", "axolotl's file for preferences (dpo)"),
        ("model_name_or_path: a\nstage: dpo\ndataset: x", "LLaMA-Factory's file for preferences (dpo)"),
        ("model_name_or_path: a\ntemplate: llama3\ninfer_backend: vllm", "LLaMA-Factory's file for using a model"),
        (
            "model_name_or_path: a\ntemplate: x\nadapter_name_or_path: b\nexport_dir: c",
            "merge a b --method linear --out",
        ),
    ],
)
def test_what_no_command_says_is_named(text: str, told: str, tmp_path: Path) -> None:
    assert told in str(answer(text, tmp_path))


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (
            "base_model: org/base\nadapter: lora\ndatasets: [{path: org/alpaca, type: alpaca}, "
            "{path: json, data_files: my rows.jsonl}]",
            "cpift init org/alpaca 'my rows.jsonl' --model org/base",
        ),
        ("model_name_or_path: org/base\ndataset: identity,alpaca", "cpift init DATA... --model org/base"),
        ("model_name_or_path: org/base\ndataset_name: org/rows", "cpift init org/rows --model org/base"),
        ("model_name_or_path: a\ndatasets: [{path: org/b}, {path: org/c}]", "cpift init org/b org/c --model a"),
        ("dataset_name: org/rows\nlearning_rate: 1.0e-5", "cpift init org/rows --model MODEL"),
        ("model_name_or_path:\ndataset_name: [x, y]", "cpift init DATA --model MODEL"),
        ("model_name_or_path:\ndataset:", "cpift init DATA... --model MODEL"),
        ("base_model: [a]\ndatasets: org/b", "cpift init org/b --model MODEL"),
        ("base_model: a\ndatasets:", "cpift init DATA... --model a"),
        ("base_model: a\ndatasets: [{type: alpaca}, org/b, {path: [x]}]", "cpift init DATA org/b x --model a"),
        ("base_model: a\npretraining_dataset: [{path: org/c4}]", "cpift init org/c4 --model a"),
    ],
)
def test_files_of_trainers_are_answered_with_init(text: str, command: str, tmp_path: Path) -> None:
    (problem,) = answer(text, tmp_path).problems
    assert problem.remedy.startswith(f"{command}, then")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("init other.yml --model base", r"`cpift plan other\.yml` says"),
        ("merge a other.yml --out merged", r"`cpift merge other\.yml OUT` reads"),
        ("merge other.yml merged", "no file of mergekit's: it has no merge_method"),
    ],
)
def test_such_a_file_in_the_place_of_data_or_a_model_is_sent_where_it_belongs(
    command: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yml").write_text("base_model: a", encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        CliRunner().invoke(app, command.split(), catch_exceptions=False)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda it: it.stem
)
def test_our_own_files_are_taken_for_no_others(path: Path) -> None:
    assert read_yaml(path)
