"""What a plan counts of a training worker's memory is what one holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cpift.cli.main import app
from cpift.config.loading import dump_config
from cpift.config.run import EvaluationConfig, ResourcesConfig
from cpift.config.training import TrainingConfig
from cpift.errors import ConfigError
from cpift.evaluation import scoring
from cpift.models.sources import load_model
from cpift.training import steps
from cpift.training.adapters import with_adapters
from cpift.training.fit import fit
from cpift.training.memory import fitting, recomputes, scoring_weights, training_memory, ways_to_save
from cpift.training.optimizers import OPTIMIZERS
from cpift.training.possible import impossible
from cpift.training.weights.reading import load_whole
from tests import memory_table
from tests.helpers.families import make_family
from tests.helpers.fits import spec, weights
from tests.helpers.held import held
from tests.helpers.small_runs import run_of, turns


def settings(**fields: Any) -> TrainingConfig:
    return TrainingConfig(**({"steps": 1, "batch_size": 3, "max_length": 24, "precision": "float32"} | fields))


@pytest.mark.parametrize("fields", [{}, {"batch_size": 1, "max_length": 9}, {"packing": True}])
def test_activations_are_those_of_a_real_pass(base: Path, fields: dict[str, Any]) -> None:
    training = settings(**fields)
    model: Any = load_model(base, torch.float32).train()
    counted = training_memory(base, training, 1, False)
    assert counted.activations == held(model, training)
    assert counted.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert counted.gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_are_trained_beside_weights_as_they_are_stored(base: Path, precision: Any) -> None:
    pytest.importorskip("peft")
    training = settings(lora={"rank": 2, "targets": ["q_proj", "down_proj"]}, precision=precision)
    narrow = precision == "bfloat16"
    assert training.lora is not None
    model: Any = with_adapters(load_whole(base, torch.float32, "cpu", narrow), training.lora, 0).train()
    counted = training_memory(base, training, 1, narrow)
    assert counted.activations == held(model, training)
    assert counted.weights == sum(parameter.nbytes for parameter in model.parameters())
    adapters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert (counted.gradients, counted.optimizer) == (adapters, 2 * adapters)
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    layers = [module.weight for module in linear if not module.weight.requires_grad and module is not model.lm_head]
    assert {weight.dtype for weight in layers} == {torch.bfloat16 if narrow else torch.float32}


def test_recomputed_layers_keep_less(base: Path) -> None:
    plain, again = (training_memory(base, settings(gradient_checkpointing=on), 1, False) for on in (False, True))
    assert 0 < again.activations < plain.activations
    assert (again.weights, again.optimizer) == (plain.weights, plain.optimizer)


@pytest.mark.slow
def test_layers_are_recomputed_where_memory_is_short_and_bits_stay(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = training_memory(base, settings(), 1, False).total / 0.8
    auto = settings(gradient_checkpointing="auto")
    assert [recomputes(base, auto, 1, False, there) for there in (1.01 * room, 0.99 * room)] == [False, True]
    assert [recomputes(base, settings(gradient_checkpointing=on), 1, False, 1) for on in (False, True)] == [False, True]
    told = [fitting("probe", base, auto, 1, limit) for limit in (int(1.01 * room), int(0.99 * room))]
    assert [(one.fits, one.recomputes) for one in told] == [(True, False), (True, True)]
    assert fitting("probe", base, settings(), 1, 10**9).recomputes is None
    made = []
    for name, there in (("short", 1000), ("large", 10**12)):
        monkeypatch.setattr(steps, "available_memory", lambda there=there: there)
        each = spec(base, tmp_path / name, gradient_checkpointing="auto", precision="float32", steps=2)
        with caplog.at_level("INFO", logger="cpift"):
            fit(each)
        made.append(weights(each.export))
    assert made[0] == made[1]
    said = [record.getMessage() for record in caplog.records if "gradient_checkpointing: auto" in record.getMessage()]
    assert ["computed twice" in line for line in said] == [True, False]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_an_optimizer_holds_what_is_counted(base: Path, name: Any) -> None:
    model = load_model(base, torch.float32)
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.0}]
    make = OPTIMIZERS[name]
    optimizer = torch.optim.AdamW(groups) if make is None else make(model, groups)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    counted = training_memory(base, settings(optimizer=name, ema=0.9), 2, False)
    assert counted.optimizer == sum(moment.nbytes for moment in moments) // 2
    assert counted.average == counted.weights == 2 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(base: Path) -> None:
    training = settings(batch_size=4)
    whole = training_memory(base, training, 1, False)
    assert fitting("probe", base, training, 1, whole.total).fits
    less = fitting("probe", base, training, 1, whole.total - 1)
    assert (less.fits, less.workers) == (False, None)
    assert [change for change, _ in less.ways] == ["gradient_checkpointing: true"]
    least = fitting("probe", base, training, 1, whole.weights)
    assert [change for change, _ in least.ways] == [
        "gradient_checkpointing: true",
        "batch_size: 1, gradient_accumulation: 4",
        "optimizer: adamw_8bit",
        "lora: {rank: 16}",
        "lora.base: nf4",
    ]
    taken = [memory.weights for _, memory in least.ways]
    assert taken[-1] < taken[-2]
    assert least.workers is not None
    shared = training_memory(base, settings(batch_size=1, gradient_checkpointing=True), least.workers, False)
    assert shared.total <= whole.weights < shared.total * least.workers


@pytest.mark.parametrize(
    "fields",
    [{}, {"keep_moments": True}, {"ema": 0.9, "packing": True}, {"optimizer": "muon"}, {"compile": True, "lora": {}}],
)
def test_no_change_is_told_that_a_config_may_not_have(fields: dict[str, Any]) -> None:
    told = [changed for _, changed in ways_to_save(settings(**fields), 1)]
    assert [TrainingConfig(**changed.model_dump()) for changed in told] == told
    assert len(told) > 1


def test_adapters_are_no_change_of_weights_that_are_shared_out() -> None:
    """`fsdp` with one worker shares nothing, but no config has it with `lora`."""
    told = [change for change, _ in ways_to_save(settings(), 1, "fsdp")]
    assert told[-2:] == ["resources.strategy: ddp, lora: {rank: 16}", "lora.base: nf4"]
    assert "lora" not in " ".join(change for change, _ in ways_to_save(settings(), 2, "fsdp"))
    with pytest.raises(ValueError, match="use ddp with lora"):
        ResourcesConfig(strategy="fsdp").refuse("probe", settings(lora={}))


@pytest.mark.parametrize("packing", [False, True])
def test_scores_of_all_pairs_are_counted_where_they_are_kept(base: Path, packing: bool) -> None:
    training = settings(attention="eager", packing=packing)
    model: Any = load_whole(base, torch.float32, "cpu", attention="eager").train()
    counted = {
        name: training_memory(base, settings(attention=name, packing=packing, precision="auto"), 1, False).activations
        for name in ("auto", "eager", "sdpa", "flash_attention_2", "flex")
    }
    assert counted["eager"] == held(model, training) > counted["sdpa"] == counted["auto"]
    assert counted["flash_attention_2"] == counted["flex"] <= counted["auto"]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_model_that_is_scored_holds_what_is_counted(base: Path, precision: Any) -> None:
    model = scoring._Room(base, EvaluationConfig(precision=precision), "cpu").model
    assert scoring_weights(base, precision == "bfloat16") == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.slow
def test_the_documents_table_is_what_is_counted() -> None:
    pytest.importorskip("peft")
    document = memory_table.DOCUMENT.read_text(encoding="utf-8")
    for row in (memory_table.ROWS[0], memory_table.ROWS[-1]):  # each takes seconds
        assert memory_table.line(row) in document, "write it anew: python -m tests.memory_table"


@pytest.mark.slow
def test_a_class_that_computes_nothing_again_is_known(tmp_path: Path) -> None:
    folder = make_family("gpt_neox_japanese", tmp_path, {})
    (problem,) = impossible(folder, settings(gradient_checkpointing=True), "probe")
    assert str(problem).startswith("probe.gradient_checkpointing: is true, and transformers' class")
    assert not recomputes(folder, settings(gradient_checkpointing="auto"), 1, False, 1)
    told = [change for change, _ in fitting("probe", folder, settings(), 1, 1).ways]
    assert told[0] == "batch_size: 1, gradient_accumulation: 3"


@pytest.mark.slow
def test_adapters_that_a_class_does_not_take_are_no_way(tmp_path: Path) -> None:
    training = TrainingConfig(steps=1, max_length=16, batch_size=1)
    told = fitting("probe", make_family("mamba", tmp_path, {}), training, 1, 1)
    assert [change for change, _ in told.ways] == ["gradient_checkpointing: true", "optimizer: adamw_8bit"]


def test_a_plan_for_a_gpu_says_what_fits(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    config = run_of(tmp_path / "rows", [turns("a", "b"), turns("c", "d")], {"path": str(base)})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    said = CliRunner().invoke(app, ["plan", str(file), "--gpu", "24GB"])
    assert said.exit_code == 0, said.output
    assert "probe on 24GB: fits, " in said.stdout
    assert "integration on 24GB: fits, " in said.stdout
    assert "regions and fusion on 24GB: fits, " in said.stdout
    assert "scoring on 24GB: fits, " in said.stdout
    small = CliRunner().invoke(app, ["plan", str(file), "--json", "--gpu", "10kB"])
    record = json.loads(small.stdout)
    first = record["gpu"][0]
    assert (first["section"], first["fits"]) == ("probe", False)
    assert {one["section"]: one["fits"] for one in record["holding"]} == {"regions and fusion": False, "scoring": False}
    assert first["memory"]["weights"] > 100_000
    refused = CliRunner().invoke(app, ["plan", str(file), "--gpu", "large"]).exception
    assert isinstance(refused, ConfigError)
    assert "--gpu: 'large' is no size" in str(refused)
