"""Each `optimizer` trains, goes on where it was, and moves no frozen bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cpift.config.run import ResourcesConfig
from cpift.errors import ConfigError
from cpift.models.sources import load_model
from cpift.pipeline.preflight import preflight
from cpift.training.fit import FitHooks, fit
from cpift.training.optimizers import MuonAndAdamW, muon
from cpift.training.spec import FitSpec, StageSpec
from tests.helpers.fits import spec, weights
from tests.helpers.small_runs import run_of, turns

NEEDS_8BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
RATES = {"adafactor": 0.1, "muon": 1e-2, "adamw_8bit": 3e-3}


class _Killed(Exception):
    pass


def staged(base: Path, regions: Path, out: Path, optimizer: str) -> FitSpec:
    stages = (StageSpec(("add",)), StageSpec(("rev",), frozen=("add",)))
    fields = {"optimizer": optimizer, "learning_rate": RATES[optimizer], "checkpoint_every": 2, "steps": 4}
    return replace(spec(base, out, *stages, **fields), regions=regions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", ["adafactor", "muon", pytest.param("adamw_8bit", marks=[NEEDS_8BIT, pytest.mark.slow])]
)
def test_a_fit_learns_freezes_and_is_resumed_bit_for_bit(
    base: Path, regions: Path, tmp_path: Path, optimizer: str
) -> None:
    whole, broken = (staged(base, regions, tmp_path / name, optimizer) for name in ("whole", "broken"))
    record = fit(whole)
    first = [row["loss"] for row in record["log"] if row["stage"] == 0]
    assert first[-1] < first[0]
    (frozen,) = record["frozen"]
    assert frozen["moved"] == 0 < frozen["elements"]
    kept: list[Path] = []

    def stop(folder: Path, where: dict[str, Any]) -> None:
        if (where["stage"], where["step"]) == (1, 2):
            kept.append(folder)
            raise _Killed

    with pytest.raises(_Killed):
        fit(broken, FitHooks(on_checkpoint=stop))
    fit(broken, FitHooks(resume_from=kept[0]))
    assert weights(broken.export) == weights(whole.export)
    fit(replace(whole, training=whole.training.model_copy(update={"optimizer": "adamw"})))
    assert weights(broken.export) != weights(whole.export)


def test_muon_and_adamw_step_as_each_does_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    alone = copy.deepcopy(model)
    settings = {"lr": 0.01, "weight_decay": 0.1}

    def groups(network: nn.Module, matrix: bool) -> list[dict[str, Any]]:
        return [settings | {"params": [p for p in network.parameters() if (p.ndim == 2) is matrix]}]

    both = MuonAndAdamW(groups(model, True), groups(model, False))
    parts = [
        torch.optim.Muon(groups(alone, True), adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(alone, False)),
    ]
    for step in range(4):
        if step == 2:  # a checkpoint in between
            state = copy.deepcopy(both.state_dict())
            both = MuonAndAdamW(groups(model, True), groups(model, False))
            both.load_state_dict(state)
            both.param_groups[0]["lr"] = parts[0].param_groups[0]["lr"] = 0.02  # as a schedule does
        for network, optimizers in ((model, [both]), (alone, parts)):
            network(torch.full((2, 5), step + 1.0)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_embeddings_norms_and_the_head_are_adamws(base: Path) -> None:
    model = load_model(base, torch.float32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others = muon(model, [{"params": list(model.parameters()), "lr": 1.0, "weight_decay": 0.0}]).param_groups
    assert {names[id(p)].split(".")[-2] for p in matrices["params"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {names[id(p)].split(".")[-2].split("_")[-1] for p in others["params"]} <= {
        *("tokens", "head", "layernorm", "norm")
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"integration__optimizer": "adafactor", "resources": {"workers": 2, "strategy": "fsdp"}},
            "integration.optimizer: adafactor keeps whole tensors, and resources.strategy: fsdp shares them out",
        ),
        ({"probe__optimizer": "sgd"}, "probe.optimizer"),
        (
            {"probe__gather": "bfloat16", "probe__precision": "auto"},
            "probe.gather: bfloat16 is of weights that are sharded; set resources.strategy",
        ),
        (
            {"probe__gather": "bfloat16", "probe__precision": "float32", "resources": {"strategy": "fsdp"}},
            "gather: bfloat16 makes products bfloat16, and precision is float32",
        ),
    ],
)
def test_what_does_not_know_shares_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        preflight(run_of(tmp_path, [turns("a", "b"), turns("c", "d")], **fields))


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, [turns("a", "b"), turns("c", "d")], probe__optimizer="adamw_8bit")
    assert config.resources == ResourcesConfig()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"probe\.optimizer: adamw_8bit needs bitsandbytes, which is not installed"):
        preflight(config)
