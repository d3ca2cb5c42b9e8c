"""Files of mergekit, axolotl, LLaMA-Factory and TRL are recognised as a whole, and answered with a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import cpift
from cpift.cli.main import app
from cpift.config.loading import load_config, read_yaml
from cpift.errors import ConfigError
from cpift.merging.options import OPTIONS

Tensors = dict[str, torch.Tensor]
HEAD = "models: [{model: ft/a, parameters: {%s}}, {model: ft/b, parameters: {%s}}]\nbase_model: org/base\n"


def answer(text: str, folder: Path) -> ConfigError:
    path = folder / "other.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return caught.value


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (
            "merge_method: ties\ndtype: bfloat16\nparameters: {normalize: true, int8_mask: true}\n"
            + HEAD % ("density: 0.5, weight: 0.3", "density: 0.5, weight: 0.3"),
            "cpift merge org/base ft/a ft/b --method ties --density 0.5 --dtype bfloat16 --out merged",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]",
            "cpift merge a a=a b=b --method linear --weights a=1 --weights b=3 --out merged",
        ),
        (
            "merge_method: slerp\nbase_model: b\nparameters: {t: 0.25}\nmodels: [{model: a}, {model: b}]",
            "cpift merge b b a --method slerp --t 0.25 --epsilon 0.0316 --out merged",
        ),
        (
            "merge_method: task_arithmetic\nparameters: {weight: 0.4}\nout_dtype: float16\n" + HEAD % ("", ""),
            "cpift merge org/base ft/a ft/b --method task_arithmetic --weight 0.4 --dtype float16 --out merged",
        ),
    ],
)
def test_a_file_of_mergekit_is_answered_with_the_command(text: str, command: str, tmp_path: Path) -> None:
    (problem,) = answer(text, tmp_path).problems
    assert "mergekit" in problem.what
    assert problem.remedy == command


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 8]}]}]", "no 'passthrough'"),
        ("merge_method: linear\nslices: [{sources: []}, {sources: []}]", "puts layers of models together"),
        ("merge_method: linear\nmodules: {text: {models: []}}", "puts layers of models together"),
        ("base_model: a\nmodels: [{model: b}]", "it names no merge_method"),
        ("merge_method: [ties]\nmodels: 3", "no ['ties']"),
        ("merge_method: ties\nmodels: 3", "names no model to merge"),
        ("merge_method: linear\nmodels: [a, {parameters: {weight: 2}}]", "cpift merge a a=a MODEL=MODEL --method"),
        ("base_model: a\nexperts: [{source_model: b}]", "mergekit-moe's file"),
        ("base_model: a\nrl: dpo\ndatasets: [{path: org/x}]", "axolotl's file for preferences (dpo)"),
        ("model_name_or_path: a\nstage: dpo\ndataset: x", "LLaMA-Factory's file for preferences (dpo)"),
        ("model_name_or_path: a\ntemplate: llama3\ninfer_backend: vllm", "LLaMA-Factory's file for using a model"),
        (
            "model_name_or_path: a\ntemplate: x\nadapter_name_or_path: b\nexport_dir: c",
            "merge a b --method linear --out",
        ),
        ("merge_method: ties\n" + HEAD % ("density: [0, 1]", ""), "parameters.density: is no single number"),
        ("merge_method: ties\n" + HEAD % ("weight: 1", "weight: 2"), "mergekit elects signs by weight"),
        ("merge_method: ties\n" + HEAD % ("density: 1", "density: 0.5"), "parameters.density: differs (1, 0.5)"),
        ("merge_method: dare_ties\n" + HEAD % ("density: 0.5", "density: 0.5"), "the mean of what agrees, not the sum"),
        ("merge_method: dare_linear\n" + HEAD % ("", ""), "other elements are dropped than by mergekit"),
        ("merge_method: ties\ntokenizer_source: union\n" + HEAD % ("", ""), "tokenizer: cpift keeps BASE's"),
        ("merge_method: linear\nmodels: [{model: org/base+ft/lora}, {model: b}]", "the same if BASE is org/base"),
        (
            "merge_method: slerp\nbase_model: a\nslices: [{sources: [{model: a, layer_range: [0, 4]}, "
            "{model: b, layer_range: [0, 4]}]}]\nparameters: {t: [{filter: mlp, value: 1}, {value: 0.5}]}",
            "parameters.t: is no single number",
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


@pytest.mark.parametrize("command", ["init other.yml --model base", "merge other.yml a --out merged"])
def test_such_a_file_in_the_place_of_data_or_a_model_is_sent_to_plan(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yml").write_text("base_model: a", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"`cpift plan other\.yml` says"):
        CliRunner().invoke(app, command.split(), catch_exceptions=False)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda it: it.stem
)
def test_our_own_files_are_taken_for_no_others(path: Path) -> None:
    assert read_yaml(path)


# ---- the commands do what mergekit does: its formulas, in plain torch ------------------------------------------------


def weighted(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    return (tuned[0] + 3 * tuned[1]) / 4


def normalised_sum(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    return base + 2 * (0.2 * (tuned[0] - base) + 0.6 * (tuned[1] - base)) / 0.8


def spherical(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    angle = torch.arccos((base * tuned[0]).sum() / base.norm() / tuned[0].norm())
    if angle < 0.0316:
        return 0.75 * base + 0.25 * tuned[0]
    return (torch.sin(0.75 * angle) * base + torch.sin(0.25 * angle) * tuned[0]) / torch.sin(angle)


def elected(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    kept = []
    for one in tuned:
        update = (one - base).flatten()
        least = update.abs().sort(descending=True).values[update.numel() // 2 - 1]
        kept.append(torch.where(update.abs() >= least, update, 0.0).view_as(base))
    weights = torch.full((len(kept), 1, 1), 0.3)
    moved = torch.stack(kept) * weights
    agree = moved.sign() == torch.where(moved.sum(0) >= 0, 1.0, -1.0)
    divisor = (weights * agree).sum(0)
    return base + 1.5 * (moved * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("merge_method: linear\n" + HEAD % ("weight: 1", "weight: 3"), weighted),
        (
            "merge_method: task_arithmetic\nparameters: {normalize: true, lambda: 2}\n"
            + HEAD % ("weight: 0.2", "weight: 0.6"),
            normalised_sum,
        ),
        ("merge_method: slerp\nparameters: {t: 0.25}\nbase_model: org/base\nmodels: [{model: ft/a}]", spherical),
        ("merge_method: ties\nparameters: {density: 0.5, weight: 0.3, lambda: 1.5}\n" + HEAD % ("", ""), elected),
    ],
    ids=["linear", "task_arithmetic", "slerp", "ties"],
)
@pytest.mark.parametrize("size", [0.01, 0.5], ids=["near", "far"])
def test_the_command_computes_what_mergekit_computes(
    text: str, wanted: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor], size: float, tmp_path: Path
) -> None:
    if "ties" in text:
        pytest.importorskip("peft")
    draws = torch.Generator().manual_seed(0)
    base = torch.randn(8, 16, generator=draws)
    tuned = {name: base + size * torch.randn(8, 16, generator=draws) for name in ("a", "b")}
    (problem,) = answer(text, tmp_path).problems
    models, fields = spoken(problem.remedy)
    states = {name: {"w": base if name == "base" else tuned[name]} for name in models}
    merged: Any = cpift.merge_state_dicts({"w": base}, states, **fields)
    torch.testing.assert_close(merged["w"], wanted(base, list(tuned.values())), rtol=1e-5, atol=1e-5)


def spoken(command: str) -> tuple[list[str], dict[str, Any]]:
    """The models' names of a `cpift merge` command, and its options as keywords."""
    import typer

    words = shlex.split(command)
    merge = typer.main.get_command(app).commands["merge"]  # type: ignore[attr-defined]
    given = merge.make_context("merge", words[2:]).params
    fields = {name: value for name, value in given.items() if name in OPTIONS and value not in (None, [], ())}
    pairs = {name: float(value) for name, value in (one.split("=") for one in fields.pop("weights", ()))}
    typed = {name: float(value) if re.fullmatch(r"[\d.]+", value) else value for name, value in fields.items()}
    names = [model.partition("=")[0].rpartition("/")[2] for model in given["models"]]
    return names, {**typed, **({"weights": pairs} if pairs else {})}
